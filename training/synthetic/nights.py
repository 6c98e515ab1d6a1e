"""Nights of a simulated site: visitors, cameras, light and faults, and crops of enrolled people for evaluation.

The same site seed gives the same cameras and the same enrolled people on every night; visitors are new each night.
Enrolled people are not used for adaptation. Their crops are cut from rendered frames with boxes like a detector's, one
crop per walk.
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
UNIFORM = 0.6  # share of people in uniform, so that colour is not sufficient
UNIFORMS = ("navy", "olive")
DEAD_BOXES = 4  # simultaneous false boxes in the image of a dead camera
DEAD_S = 6.0  # duration of a false box


@dataclass(frozen=True)
class Night:
    """One night.

    Attributes:
        number: from 1.
        visitors: number of visitors; each passes some of the cameras.
        cameras: number of cameras.
        dusk: whether the cameras of the first night have no daylight.
        dead: number of cameras, from the first, that produce noise.
        one_person: whether all walks are of the same person.
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
        seed: seed of everything random.
        first_cameras: number of cameras on the first night; `Night.cameras` may be larger.
        all_cameras: total number of cameras.
        together: mean number of people in a frame.
        passed: share of the visitors that pass a camera.
        first_s: start of the first night's video in whole Unix seconds; affects only times.
    """

    seed: int
    first_cameras: int = 4
    all_cameras: int = 5
    together: float = 4.0
    passed: float = 0.85
    first_s: float = FIRST_S

    @cached_property
    def cameras(self) -> tuple[SimulatedCamera, ...]:
        """All cameras, in daylight."""
        return place_cameras(self.all_cameras, np.random.default_rng([self.seed, 0]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all cameras."""
        return tuple(f"cam{number}" for number in range(1, self.all_cameras + 1))

    def start_s(self, night: Night) -> float:
        """Unix seconds of a night's first frame."""
        return self.first_s + (night.number - 1) * DAY_S

    def camera_on(self, night: Night, camera: int) -> SimulatedCamera:
        """A camera on a night: dusk affects the cameras of the first night, later ones have a lamp."""
        daylight = self.cameras[camera]
        return at_dusk(daylight) if night.dusk and camera < self.first_cameras else daylight

    def visitors(self, night: Night) -> tuple[Person, ...]:
        """The visitors of a night."""
        return self.people(night.visitors, np.random.default_rng([self.seed, 1, night.number]))

    def people(self, count: int, rng: np.random.Generator) -> tuple[Person, ...]:
        """People of this site, some of them in uniform."""
        sampled = sample_people(count, rng, world="site")
        return tuple(_in_uniform(person, rng) if rng.random() < UNIFORM else person for person in sampled)

    def record(self, folder: Path, night: Night, camera: int) -> CameraVideo:
        """Write the video of one camera and night.

        Args:
            folder: target folder, created if missing.
            night: the night.
            camera: number of the camera.
        """
        seed = int(np.random.default_rng([self.seed, 2, night.number, camera]).integers(2**31))
        name, start_s = self.names[camera], self.start_s(night)
        view = CameraView(self.camera_on(night, camera), self.visitors(night), self._walks(night, camera), seed=seed)
        if camera < night.dead:
            return write_video_with_detections(folder, name, _dead_camera_frames(view.seconds, seed), start_s=start_s)
        return write_video(folder, name, view.frames(), start_s=start_s, seed=seed)

    def _walks(self, night: Night, camera: int) -> tuple[Walk, ...]:
        rng = np.random.default_rng([self.seed, 3, night.number, camera])
        visitors = rng.permutation(night.visitors)
        visitors = visitors[: max(1, round(self.passed * night.visitors))]
        if night.one_person:
            visitors = np.zeros_like(visitors)
        return simulate_walks(visitors.tolist(), self.camera_on(night, camera), self.together, rng)


def _in_uniform(person: Person, rng: np.random.Generator) -> Person:
    """The same person in uniform."""
    upper, lower = CLOTH[UNIFORMS[int(rng.integers(len(UNIFORMS)))]], CLOTH["charcoal"]
    return dataclasses.replace(person, upper=upper, lower=lower, skirt=False, hem=1.0, sleeve=1.0)


def _dead_camera_frames(seconds: float, seed: int) -> Iterator[tuple[RenderedFrame, list[SimulatedDetection]]]:
    """Noise frames with false detections that hardly move."""
    rng = np.random.default_rng(seed)
    duration, boxes = round(DEAD_S * FPS), [false_box(rng) for _ in range(DEAD_BOXES)]
    for number in range(round(seconds * FPS)):
        if number % duration == duration - 1:
            boxes = [false_box(rng) for _ in range(DEAD_BOXES)]
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        detections = [
            SimulatedDetection(_jitter_one_pixel(box, rng), round(float(rng.uniform(0.5, 0.8)), 3)) for box in boxes
        ]
        yield RenderedFrame(pixels, ()), detections


def _jitter_one_pixel(
    box: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """The box with noise of a pixel on each side, inside the frame."""
    left, top, right, bottom = np.clip(np.array(box) + rng.normal(0, 1, 4), 0, [WIDTH, HEIGHT] * 2).round(1).tolist()
    return left, top, right, bottom


MOMENTS = (0.35, 0.5, 0.65)  # fractions of a walk at which the walker is well inside the frame
MIN_VISIBLE = 0.6  # minimum visible share of a person in a usable crop
PEOPLE_AT_ONCE = 2.0  # mean number of people in a frame


def enrolment_set(site: SimulatedSite, count: int) -> tuple[Person, ...]:
    """The enrolled people, the same on every night."""
    return site.people(count, np.random.default_rng([site.seed, 4]))


def write_enrolment_crops(
    root: Path, site: SimulatedSite, night: Night, people: tuple[Person, ...], *, take: int, split: str
) -> CropStore:
    """Simulate one walk of each person past every camera of a night and write a crop of each.

    Args:
        root: folder of the crop store to write.
        site: defines the cameras.
        night: defines the light.
        people: the people; the persons of the store are their numbers from 1.
        take: number of the take: other takes have other walks of the same people on the same night.
        split: "query" or "gallery".

    Returns:
        The store, with the numbers of all cameras of the site.
    """
    rows: list[tuple[str, int, float, int]] = []
    for camera in range(night.cameras):
        rng = np.random.default_rng([site.seed, 5, night.number, camera, take])
        view_camera, name = site.camera_on(night, camera), site.names[camera]
        walks = simulate_walks(rng.permutation(len(people)).tolist(), view_camera, PEOPLE_AT_ONCE, rng)
        view = CameraView(view_camera, people, walks, seed=int(rng.integers(2**31)))
        for number, walk in enumerate(walks):
            found = _best_moment(view, number, walk)
            if found is None:
                continue
            frame, true_box, time_s = found
            path = f"crops/{name}/{walk.person + 1:04d}.jpg"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(_cut_crop(frame, true_box, rng))
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
    """The first of the `MOMENTS` at which enough of the walker is visible."""
    for share in MOMENTS:
        time_s = walk.start_s + share * walk.seconds
        frame = view.frame(time_s)
        for person in frame.people:
            if person.walk == number and person.visible >= MIN_VISIBLE:
                return frame, person, time_s
    return None


def _cut_crop(frame: RenderedFrame, true_box: TrueBox, rng: np.random.Generator) -> bytes:
    left, top, right, bottom = (round(side) for side in jitter_box(true_box.box, rng))
    buffer = io.BytesIO()
    Image.fromarray(frame.pixels[top:bottom, left:right]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
