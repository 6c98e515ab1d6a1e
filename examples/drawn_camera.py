"""A stand-in for cameras with a tracker: drawn people walk through frames, each with its box and track.

With real cameras this file is the one to replace: whatever detects and tracks people yields `Frame`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from resight.arrays import Pixels
from resight.training.synthetic.camera import SimulatedCamera, make_cameras, take_crop
from resight.training.synthetic.people import Person, World, sample_people

HEIGHT, WIDTH = 128, 64  # of a person in the frame, pixels
LANES = 4  # people side by side
SEEN = 6  # frames of each track
BETWEEN = 2  # frames between two who come in
FRAME_S = 0.4


@dataclass(frozen=True)
class Box:
    """Where a track is in a frame: left, top, right, bottom in pixels."""

    track_id: str
    xyxy: tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """One picture, uint8 (H, W, 3) RGB, and who is tracked in it."""

    camera_id: str
    time: datetime
    image: Pixels
    boxes: tuple[Box, ...]


class DrawnCamera:
    """One camera and who walks past it.

    Attributes:
        camera_id: its name.
        truth: the number of the person behind each track, which no real camera tells: to judge an example by.
    """

    def __init__(
        self,
        camera_id: str,
        look: SimulatedCamera,
        walkers: dict[int, Person],
        start: datetime,
        rng: np.random.Generator,
    ) -> None:
        self.camera_id = camera_id
        self.truth = {f"{camera_id}-{number}": number for number in walkers}
        self._look, self._walkers, self._start, self._rng = look, walkers, start, rng

    def frames(self) -> Iterator[Frame]:
        """All frames, from the first person to come to the last to leave."""
        walkers = list(self._walkers.items())
        heading = float(self._look.turns[0])
        for number in range((len(walkers) - 1) * BETWEEN + SEEN):
            image = np.full((HEIGHT, LANES * WIDTH, 3), 128, np.uint8)
            boxes = []
            for place, (person_number, person) in enumerate(walkers):
                if not 0 <= number - place * BETWEEN < SEEN:
                    continue
                left = place % LANES * WIDTH
                image[:, left : left + WIDTH] = take_crop(person, self._look, heading, self._rng)
                boxes.append(Box(f"{self.camera_id}-{person_number}", (left, 0, left + WIDTH, HEIGHT)))
            yield Frame(self.camera_id, self._start + timedelta(seconds=number * FRAME_S), image, tuple(boxes))


def two_cameras(
    people: int, strangers: int, start: datetime, *, world: World, seed: int
) -> tuple[DrawnCamera, DrawnCamera]:
    """Two cameras of one site; most people pass both.

    Args:
        people: who pass each camera.
        strangers: how many of them pass one camera only.
        start: of the first; the second begins a minute later.
        world: "source", whose cameras the built-in weights know, or "site", which a model must be adapted to.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    looks = make_cameras(2, rng, world=world, height=HEIGHT, width=WIDTH)
    drawn = dict(enumerate(sample_people(people + strangers, rng, world=world)))
    first = {number: drawn[number] for number in range(people)}
    order = [int(number) for number in rng.permutation(range(strangers, people + strangers))]
    second = {number: drawn[number] for number in order}
    later = start + timedelta(minutes=1)
    return (
        DrawnCamera("entrance", looks[0], first, start, rng),
        DrawnCamera("yard", looks[1], second, later, rng),
    )
