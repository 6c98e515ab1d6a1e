"""The nights of a simulated site: who comes, which cameras hang, what light there is, and what goes wrong.

The same site seed gives the same cameras and the same enrolled people on every night; visitors are new each night.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from resight.training.film import Shot, View
from resight.training.people import CLOTH, Person, sample_people
from resight.training.reel import Reel, write_reel, write_told_reel
from resight.training.scene import Camera
from resight.training.sightings import Detection, nobody
from resight.training.street import FPS, HEIGHT, WIDTH, Walk, dusk, hang_cameras, walk_by

FIRST_S = datetime(2026, 3, 2, 22, 0, tzinfo=UTC).timestamp()
DAY_S = 86_400.0
UNIFORM = 0.6  # share of people in working clothes: colour alone must not be enough
UNIFORMS = ("navy", "olive")
DEAD_BOXES = 4  # false boxes at a time that a detector sees in the picture of a dead camera
DEAD_S = 6.0  # how long one of them stays


@dataclass(frozen=True)
class Night:
    """One night.

    Attributes:
        number: from 1.
        visitors: people who come; each passes some of the cameras.
        cameras: how many hang.
        dusk: whether the cameras of the first night have lost the daylight.
        dead: how many cameras, from the first, deliver noise.
        one_person: whether one and the same person walks past all cameras again and again.
    """

    number: int
    visitors: int
    cameras: int
    dusk: bool = False
    dead: int = 0
    one_person: bool = False


@dataclass(frozen=True)
class SimulatedSite:
    """A street with cameras.

    Attributes:
        seed: of everything.
        first_cameras: how many hang on the first night; `Night.cameras` may name more.
        all_cameras: how many will ever hang.
        together: people in a picture at a time, in the mean.
        passed: share of the cameras that a visitor passes.
        first_s: when the first night's film begins, whole Unix seconds; it decides nothing but times.
    """

    seed: int
    first_cameras: int = 4
    all_cameras: int = 5
    together: float = 4.0
    passed: float = 0.85
    first_s: float = FIRST_S

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """All that will ever hang, by daylight."""
        return hang_cameras(self.all_cameras, np.random.default_rng([self.seed, 0]))

    @property
    def names(self) -> tuple[str, ...]:
        """What all cameras are called."""
        return tuple(f"cam{number}" for number in range(1, self.all_cameras + 1))

    def start_s(self, night: Night) -> float:
        """Unix seconds of a night's first frame."""
        return self.first_s + (night.number - 1) * DAY_S

    def look(self, night: Night, camera: int) -> Camera:
        """A camera as it is on a night: dusk falls on those of the first night, a new one has a lamp."""
        hung = self.cameras[camera]
        return dusk(hung) if night.dusk and camera < self.first_cameras else hung

    def visitors(self, night: Night) -> tuple[Person, ...]:
        """Who comes on a night."""
        return self.people(night.visitors, np.random.default_rng([self.seed, 1, night.number]))

    def people(self, count: int, rng: np.random.Generator) -> tuple[Person, ...]:
        """People of this site: some of them wear its working clothes, and differ in everything else."""
        drawn = sample_people(count, rng, world="site")
        return tuple(_at_work(person, rng) if rng.random() < UNIFORM else person for person in drawn)

    def film(self, folder: Path, night: Night, camera: int) -> Reel:
        """Film a night with one camera.

        Args:
            folder: for the reel; made when missing.
            night: which.
            camera: number of it.
        """
        seed = int(np.random.default_rng([self.seed, 2, night.number, camera]).integers(2**31))
        name, start_s = self.names[camera], self.start_s(night)
        view = View(self.look(night, camera), self.visitors(night), self._walks(night, camera), seed=seed)
        if camera < night.dead:
            return write_told_reel(folder, name, _dead(view.seconds, seed), start_s=start_s)
        return write_reel(folder, name, view.shots(), start_s=start_s, seed=seed)

    def _walks(self, night: Night, camera: int) -> tuple[Walk, ...]:
        rng = np.random.default_rng([self.seed, 3, night.number, camera])
        who = rng.permutation(night.visitors)
        who = who[: max(1, round(self.passed * night.visitors))]
        if night.one_person:
            who = np.zeros_like(who)
        return walk_by(who.tolist(), self.look(night, camera), self.together, rng)


def _at_work(person: Person, rng: np.random.Generator) -> Person:
    """The same person in working clothes."""
    upper, lower = CLOTH[UNIFORMS[int(rng.integers(len(UNIFORMS)))]], CLOTH["charcoal"]
    return dataclasses.replace(person, upper=upper, lower=lower, skirt=False, hem=1.0, sleeve=1.0)


def _dead(seconds: float, seed: int) -> Iterator[tuple[Shot, list[Detection]]]:
    """Noise instead of a picture, and a detector that believes to see people in it who hardly move."""
    rng = np.random.default_rng(seed)
    stay, boxes = round(DEAD_S * FPS), [nobody(rng) for _ in range(DEAD_BOXES)]
    for number in range(round(seconds * FPS)):
        if number % stay == stay - 1:
            boxes = [nobody(rng) for _ in range(DEAD_BOXES)]
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        told = [Detection(_shaken(box, rng), round(float(rng.uniform(0.5, 0.8)), 3)) for box in boxes]
        yield Shot(pixels, ()), told


def _shaken(box: tuple[float, float, float, float], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The box a pixel off at each side, within the picture."""
    left, top, right, bottom = np.clip(np.array(box) + rng.normal(0, 1, 4), 0, [WIDTH, HEIGHT] * 2).round(1).tolist()
    return left, top, right, bottom
