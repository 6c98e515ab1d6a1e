"""Small videos of synthetic people walking through the image, with their boxes and tracks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from resight.training.synthetic.camera import make_cameras, take_crop
from resight.training.synthetic.people import sample_people

HEIGHT, WIDTH = 192, 320
ROWS, COLUMNS = 96, 48  # of a person
START = "2026-03-01T22:00:00+00:00"
START_S = 1772402400.0
POSES = 5


@dataclass(frozen=True)
class Walker:
    """A person who walks from x0 to x1 (left side of the box, pixels) between two frames, at one height."""

    first: int
    last: int
    x0: float
    x1: float
    top: int = 60

    def box(self, frame: int) -> tuple[float, float, float, float] | None:
        if not self.first <= frame <= self.last:
            return None
        x = round(self.x0 + (self.x1 - self.x0) * (frame - self.first) / max(1, self.last - self.first))
        return float(x), float(self.top), float(x + COLUMNS), float(self.top + ROWS)


CROSSING = (Walker(0, 24, 10, 250), Walker(2, 26, 250, 10, top=75), Walker(45, 70, 20, 240))
"""Two people who cross, an empty street for 18 frames, and a third person."""


def shots(walkers: Sequence[Walker], frames: int, seed: int = 0) -> Iterator[np.ndarray]:
    """uint8 (HEIGHT, WIDTH, 3): a wall with people in front, lower ones nearer."""
    rng = np.random.default_rng(seed)
    (camera,) = make_cameras(1, rng, world="source", height=ROWS, width=COLUMNS)
    cast = sample_people(len(walkers), rng, world="source")
    poses = [[take_crop(person, camera, camera.turns[0], rng) for _ in range(POSES)] for person in cast]
    wall = np.repeat(np.repeat(rng.integers(90, 160, (HEIGHT // 16, WIDTH // 16, 3), np.uint8), 16, 0), 16, 1)
    for frame in range(frames):
        image = wall.copy()
        for number in sorted(range(len(walkers)), key=lambda number: walkers[number].top):
            box = walkers[number].box(frame)
            if box is not None:
                x, y = int(box[0]), int(box[1])
                image[y : y + ROWS, x : x + COLUMNS] = poses[number][frame % POSES]
        yield image


def write_film(
    path: Path,
    walkers: Sequence[Walker] = CROSSING,
    frames: int = 75,
    *,
    fps: int = 5,
    codec: str = "libx264",
    **metadata,
) -> Path:
    """A video of the walkers; `creation_time` is written unless metadata overrides it."""
    with av.open(str(path), "w") as container:
        container.metadata.update({"creation_time": START} | metadata)
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.options = {"g": "10", "crf": "18"} if codec == "libx264" else {"qscale": "3"}
        for image in shots(walkers, frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    return path


def write_boxes(
    path: Path, walkers: Sequence[Walker] = CROSSING, frames: int = 75, *, every: int = 1, tracks: bool = False
) -> Path:
    """JSON lines of who is where, every so many frames."""
    with path.open("w") as file:
        for frame in range(0, frames, every):
            for number, walker in enumerate(walkers):
                box = walker.box(frame)
                if box is not None:
                    row = {"frame": frame, "box": box, "score": 0.9} | ({"track": number} if tracks else {})
                    file.write(json.dumps(row) + "\n")
    return path
