"""Enrolled people of a simulated site, and crops of them as the cameras see them on a night: to measure with.

Nobody adapts to these people. They are cut from pictures by boxes as a detector draws them, one crop for each
walk, from the moment in which the person is seen best of a few.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from resight.training.film import Shot, Sighting, View
from resight.training.nights import Night, SimulatedSite
from resight.training.people import Person, sample_people
from resight.training.sightings import jitter
from resight.training.street import Walk, walk_by

MOMENTS = (0.35, 0.5, 0.65)  # of a walk, when the walker is well within the picture
VISIBLE = 0.6  # share of somebody that a usable crop shows


@dataclass(frozen=True)
class LineupCrop:
    """One crop of somebody enrolled, or of a stranger.

    Attributes:
        image: JPEG.
        person: number in the lineup.
        camera: name.
        time_s: Unix seconds.
    """

    image: bytes
    person: int
    camera: str
    time_s: float


def lineup(site: SimulatedSite, count: int) -> tuple[Person, ...]:
    """The people whom queries search for, the same on every night."""
    return sample_people(count, np.random.default_rng([site.seed, 4]), world="site")


def photograph(site: SimulatedSite, night: Night, people: tuple[Person, ...], *, take: int) -> Iterator[LineupCrop]:
    """Let the people pass every camera of a night once and cut a crop of each.

    Args:
        site: whose cameras.
        night: whose light.
        people: who passes.
        take: number of the take: others give other walks of the same people on the same night.
    """
    for camera in range(night.cameras):
        rng = np.random.default_rng([site.seed, 5, night.number, camera, take])
        look = site.look(night, camera)
        walks = walk_by(rng.permutation(len(people)).tolist(), look, 2.0, rng)
        view = View(look, people, walks, seed=int(rng.integers(2**31)))
        for number, walk in enumerate(walks):
            shot, sighting, time_s = _best(view, number, walk)
            if sighting is not None:
                image = _cut(shot, sighting, rng)
                yield LineupCrop(image, walk.person, site.name(camera), night.start_s + time_s)


def _best(view: View, number: int, walk: Walk) -> tuple[Shot, Sighting | None, float]:
    """The first moment that shows enough of a walker; without one nobody is told."""
    for share in MOMENTS:
        time_s = walk.start_s + share * walk.seconds
        shot = view.shot(time_s)
        for sighting in shot.sightings:
            if sighting.walk == number and sighting.visible >= VISIBLE:
                return shot, sighting, time_s
    return shot, None, time_s


def _cut(shot: Shot, sighting: Sighting, rng: np.random.Generator) -> bytes:
    left, top, right, bottom = (round(side) for side in jitter(sighting.box, rng))
    buffer = io.BytesIO()
    Image.fromarray(shot.pixels[top:bottom, left:right]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
