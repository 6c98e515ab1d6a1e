"""The nights of a simulated site: who comes, which cameras hang, what light there is, and what goes wrong.

The same site seed gives the same cameras and the same enrolled people on every night; visitors are new each night.

Enrolled people of a simulated site, and crops of them as the cameras see them on a night: to measure with.

Nobody adapts to these people. They are cut from pictures by boxes as a detector draws them, one crop for each
walk, from the moment in which the person is seen best of a few.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from resight.training.store.crops import UNKNOWN, CropStore, write_store
from resight.training.synthetic.camera import SimulatedCamera
from resight.training.synthetic.film import (
    CameraVideo,
    CameraView,
    RenderedFrame,
    SimulatedDetection,
    TrueBox,
    false_box,
    jitter_box,
    write_video,
    write_video_with_detections,
)
from resight.training.synthetic.people import CLOTH, Person, sample_people
from resight.training.synthetic.street import (
    FPS,
    HEIGHT,
    WIDTH,
    Walk,
    at_dusk,
    place_cameras,
    simulate_walks,
)

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
    def cameras(self) -> tuple[SimulatedCamera, ...]:
        """All that will ever hang, by daylight."""
        return place_cameras(self.all_cameras, np.random.default_rng([self.seed, 0]))

    @property
    def names(self) -> tuple[str, ...]:
        """What all cameras are called."""
        return tuple(f"cam{number}" for number in range(1, self.all_cameras + 1))

    def start_s(self, night: Night) -> float:
        """Unix seconds of a night's first frame."""
        return self.first_s + (night.number - 1) * DAY_S

    def look(self, night: Night, camera: int) -> SimulatedCamera:
        """A camera as it is on a night: dusk falls on those of the first night, a new one has a lamp."""
        hung = self.cameras[camera]
        return at_dusk(hung) if night.dusk and camera < self.first_cameras else hung

    def visitors(self, night: Night) -> tuple[Person, ...]:
        """Who comes on a night."""
        return self.people(night.visitors, np.random.default_rng([self.seed, 1, night.number]))

    def people(self, count: int, rng: np.random.Generator) -> tuple[Person, ...]:
        """People of this site: some of them wear its working clothes, and differ in everything else."""
        drawn = sample_people(count, rng, world="site")
        return tuple(_in_uniform(person, rng) if rng.random() < UNIFORM else person for person in drawn)

    def film(self, folder: Path, night: Night, camera: int) -> CameraVideo:
        """Film a night with one camera.

        Args:
            folder: for the reel; made when missing.
            night: which.
            camera: number of it.
        """
        seed = int(np.random.default_rng([self.seed, 2, night.number, camera]).integers(2**31))
        name, start_s = self.names[camera], self.start_s(night)
        view = CameraView(self.look(night, camera), self.visitors(night), self._walks(night, camera), seed=seed)
        if camera < night.dead:
            return write_video_with_detections(folder, name, _dead_camera_frames(view.seconds, seed), start_s=start_s)
        return write_video(folder, name, view.shots(), start_s=start_s, seed=seed)

    def _walks(self, night: Night, camera: int) -> tuple[Walk, ...]:
        rng = np.random.default_rng([self.seed, 3, night.number, camera])
        who = rng.permutation(night.visitors)
        who = who[: max(1, round(self.passed * night.visitors))]
        if night.one_person:
            who = np.zeros_like(who)
        return simulate_walks(who.tolist(), self.look(night, camera), self.together, rng)


def _in_uniform(person: Person, rng: np.random.Generator) -> Person:
    """The same person in working clothes."""
    upper, lower = CLOTH[UNIFORMS[int(rng.integers(len(UNIFORMS)))]], CLOTH["charcoal"]
    return dataclasses.replace(person, upper=upper, lower=lower, skirt=False, hem=1.0, sleeve=1.0)


def _dead_camera_frames(seconds: float, seed: int) -> Iterator[tuple[RenderedFrame, list[SimulatedDetection]]]:
    """Noise instead of a picture, and a detector that believes to see people in it who hardly move."""
    rng = np.random.default_rng(seed)
    stay, boxes = round(DEAD_S * FPS), [false_box(rng) for _ in range(DEAD_BOXES)]
    for number in range(round(seconds * FPS)):
        if number % stay == stay - 1:
            boxes = [false_box(rng) for _ in range(DEAD_BOXES)]
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        told = [
            SimulatedDetection(_jitter_one_pixel(box, rng), round(float(rng.uniform(0.5, 0.8)), 3)) for box in boxes
        ]
        yield RenderedFrame(pixels, ()), told


def _jitter_one_pixel(
    box: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """The box a pixel off at each side, within the picture."""
    left, top, right, bottom = np.clip(np.array(box) + rng.normal(0, 1, 4), 0, [WIDTH, HEIGHT] * 2).round(1).tolist()
    return left, top, right, bottom


MOMENTS = (0.35, 0.5, 0.65)  # of a walk, when the walker is well within the picture
MIN_VISIBLE = 0.6  # share of somebody that a usable crop shows
PEOPLE_AT_ONCE = 2.0  # people in a picture at a time, in the mean


def enrolment_set(site: SimulatedSite, count: int) -> tuple[Person, ...]:
    """The people whom queries search for, the same on every night."""
    return site.people(count, np.random.default_rng([site.seed, 4]))


def write_enrolment_crops(
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
        walks = simulate_walks(rng.permutation(len(people)).tolist(), look, PEOPLE_AT_ONCE, rng)
        view = CameraView(look, people, walks, seed=int(rng.integers(2**31)))
        for number, walk in enumerate(walks):
            found = _best_moment(view, number, walk)
            if found is None:
                continue
            shot, sighting, time_s = found
            path = f"crops/{name}/{walk.person + 1:04d}.jpg"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(_cut_crop(shot, sighting, rng))
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


def _best_moment(view: CameraView, number: int, walk: Walk) -> tuple[RenderedFrame, TrueBox, float] | None:
    """The first moment that shows enough of a walker."""
    for share in MOMENTS:
        time_s = walk.start_s + share * walk.seconds
        shot = view.shot(time_s)
        for sighting in shot.sightings:
            if sighting.walk == number and sighting.visible >= MIN_VISIBLE:
                return shot, sighting, time_s
    return None


def _cut_crop(shot: RenderedFrame, sighting: TrueBox, rng: np.random.Generator) -> bytes:
    left, top, right, bottom = (round(side) for side in jitter_box(sighting.box, rng))
    buffer = io.BytesIO()
    Image.fromarray(shot.pixels[top:bottom, left:right]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
