"""Enrolled people of a simulated site, and crops of them as the cameras see them on a night: to measure with.

Nobody adapts to these people. They are cut from pictures by boxes as a detector draws them, one crop for each
walk, from the moment in which the person is seen best of a few.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from resight.training.crops import UNKNOWN, CropStore, write_store
from resight.training.film import Shot, Sighting, View
from resight.training.nights import Night, SimulatedSite
from resight.training.people import Person
from resight.training.sightings import jitter
from resight.training.street import Walk, walk_by

MOMENTS = (0.35, 0.5, 0.65)  # of a walk, when the walker is well within the picture
VISIBLE = 0.6  # share of somebody that a usable crop shows
TOGETHER = 2.0  # people in a picture at a time, in the mean


def lineup(site: SimulatedSite, count: int) -> tuple[Person, ...]:
    """The people whom queries search for, the same on every night."""
    return site.people(count, np.random.default_rng([site.seed, 4]))


def photograph(
    root: Path, site: SimulatedSite, night: Night, people: tuple[Person, ...], *, take: int, split: str
) -> CropStore:
    """Let the people pass every camera of a night once and write a crop of each pass.

    Args:
        root: of the crop store to write.
        site: whose cameras.
        night: whose light.
        people: who passes; the persons of the store are their numbers from 1.
        take: number of the take: another one has other walks of the same people on the same night.
        split: "query" or "gallery".

    Returns:
        The store, with the numbers of all cameras of the site.
    """
    rows: list[tuple[str, int, float, int]] = []
    for camera in range(night.cameras):
        rng = np.random.default_rng([site.seed, 5, night.number, camera, take])
        look, name = site.look(night, camera), site.names[camera]
        walks = walk_by(rng.permutation(len(people)).tolist(), look, TOGETHER, rng)
        view = View(look, people, walks, seed=int(rng.integers(2**31)))
        for number, walk in enumerate(walks):
            found = _best(view, number, walk)
            if found is None:
                continue
            shot, sighting, time_s = found
            path = f"crops/{name}/{walk.person + 1:04d}.jpg"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(_cut(shot, sighting, rng))
            rows.append((path, camera, site.start_s(night) + time_s, walk.person + 1))
    paths, cameras, times_s, persons = zip(*rows, strict=True)
    store = CropStore(
        root,
        paths,
        np.array(cameras, np.int64),
        site.names,
        np.array(times_s),
        np.full(len(rows), UNKNOWN, np.int64),
        np.array(persons, np.int64),
    )
    write_store(root, store, [split] * len(rows))
    return store


def _best(view: View, number: int, walk: Walk) -> tuple[Shot, Sighting, float] | None:
    """The first moment that shows enough of a walker."""
    for share in MOMENTS:
        time_s = walk.start_s + share * walk.seconds
        shot = view.shot(time_s)
        for sighting in shot.sightings:
            if sighting.walk == number and sighting.visible >= VISIBLE:
                return shot, sighting, time_s
    return None


def _cut(shot: Shot, sighting: Sighting, rng: np.random.Generator) -> bytes:
    left, top, right, bottom = (round(side) for side in jitter(sighting.box, rng))
    buffer = io.BytesIO()
    Image.fromarray(shot.pixels[top:bottom, left:right]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
