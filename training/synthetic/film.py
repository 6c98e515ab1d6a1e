"""Simulated videos: rendering a street with walking people, a simulated person detector, and writing both to disk.

A person is drawn in a few poses per part of a walk, and the sprites are scaled and pasted along the walk; then
`camera.FrameOptics` is applied. The simulated detector knows the true boxes: its boxes are slightly inaccurate, people
behind others are often missed, and some boxes are empty. It does not identify people.

cam1.mp4                MPEG-4, `FPS` frames per second, creation_time in its header
cam1.detections.jsonl   {"frame": 0, "box": [left, top, right, bottom], "score": 0.93}, as read by `resight ingest`
cam1.truth.jsonl        {"frame": 0, "person": 12, "walk": 3, "box": [...], "visible": 1.0}, not read by any command
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resight.arrays import Pixels
from resight.training.synthetic.camera import BACKDROP_WIDTHS, FrameOptics, SimulatedCamera
from resight.training.synthetic.figure import Placement, Pose, draw_person
from resight.training.synthetic.people import Person
from resight.training.synthetic.street import FPS, HEIGHT, NEAR_SCALE, WIDTH, Walk, WalkPosition

POSES = 8  # per stride: at 5 frames per second a stride of 1.1 s shows 5 or 6
POSE_JITTER = 0.12  # standard deviation of the view angle between poses, in radians
SUPERSAMPLING = 1.5  # drawn pixels per pixel at the largest size of a sprite
ABOVE, BELOW, ASIDE = 0.1, 0.1, 0.45  # margins around the body for hats, shoes, arms and bags, in body heights
MIN_PIXELS = 60  # minimum visible pixels of a person that counts as present

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True)
class TrueBox:
    """One person in one frame.

    Attributes:
        walk: number of the walk in this video.
        person: number of the person in the cast.
        box: box of the part inside the frame, covered or not.
        visible: share of that part that is not covered by others, 0..1.
    """

    walk: int
    person: int
    box: Box
    visible: float


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class RenderedFrame:
    """A frame, uint8 (HEIGHT, WIDTH, 3), and the people in it."""

    pixels: Pixels
    people: tuple[TrueBox, ...]


@dataclass(frozen=True, eq=False)
class PersonSprite:
    """A person in one pose, cropped; ``left`` and ``top`` are relative to the feet, all lengths in body heights."""

    image: Image.Image
    left: float
    top: float
    width: float
    height: float


class CameraView:
    """The view of one camera during one night; renders the frame at any time.

    Args:
        camera: from `street.place_cameras`.
        cast: all people.
        walks: the walks of the night; their persons are indices into ``cast``.
        seed: seed of poses and noise; the camera does not depend on it.
    """

    def __init__(self, camera: SimulatedCamera, cast: Sequence[Person], walks: Sequence[Walk], *, seed: int) -> None:
        self.camera, self.cast, self.walks = camera, cast, tuple(walks)
        self._seed = seed
        self._sprites: dict[tuple[int, int], list[PersonSprite]] = {}  # by walk and leg
        self._optics = FrameOptics(camera, np.random.default_rng(seed))
        wide = camera.backdrop.width // BACKDROP_WIDTHS
        self._background = camera.backdrop.crop((0, 0, wide, camera.backdrop.height)).resize((WIDTH, HEIGHT))

    @property
    def seconds(self) -> float:
        """End of the last walk, in seconds of the video."""
        return max((walk.end_s for walk in self.walks), default=0.0)

    def frames(self) -> Iterator[RenderedFrame]:
        """All frames of the video, `FPS` per second."""
        for number in range(math.ceil(self.seconds * FPS)):
            yield self.frame(number / FPS)

    def frame(self, time_s: float) -> RenderedFrame:
        """The frame at a time in seconds of the video; increasing times are fastest."""
        for key in [key for key in self._sprites if self.walks[key[0]].end_s <= time_s]:
            del self._sprites[key]
        present = [(number, p.at(time_s)) for number, p in enumerate(self.walks) if p.start_s <= time_s < p.end_s]
        present.sort(key=lambda walker: walker[1].feet)  # far people first: near ones cover them
        canvas, owner = self._background.copy(), np.full((HEIGHT, WIDTH), -1, np.int32)
        painted = [self._paint(canvas, owner, number, position) for number, position in present]
        boxes = [
            TrueBox(number, self.walks[number].person, box, visible / pixels)
            for (number, _), (box, pixels) in zip(present, painted, strict=True)
            if (visible := int((owner[box[1] : box[3], box[0] : box[2]] == number).sum())) >= MIN_PIXELS
        ]
        return RenderedFrame(self._optics(canvas), tuple(boxes))

    def _paint(
        self, canvas: Image.Image, owner: NDArray[np.int32], number: int, position: WalkPosition
    ) -> tuple[Box, int]:
        """Paint a walker into the frame; returns the visible box and the number of painted pixels."""
        poses = self._poses(number, position.leg)
        sprite = poses[int(position.phase / (2 * math.pi) * POSES) % POSES]
        wide, tall = (max(2, round(side * position.scale)) for side in (sprite.width, sprite.height))
        left, top = round(position.x + sprite.left * position.scale), round(position.feet + sprite.top * position.scale)
        box = max(0, left), max(0, top), max(0, min(WIDTH, left + wide)), max(0, min(HEIGHT, top + tall))
        if box[0] >= box[2] or box[1] >= box[3]:
            return (0, 0, 0, 0), 0
        small = sprite.image.resize((wide, tall), Image.Resampling.BILINEAR, reducing_gap=1.5)
        canvas.paste(small, (left, top), small)
        inside = np.asarray(small.getchannel("A"))[box[1] - top : box[3] - top, box[0] - left : box[2] - left] > 127
        owner[box[1] : box[3], box[0] : box[2]][inside] = number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return (0, 0, 0, 0), 0
        first, last = (int(columns[0]), int(rows[0])), (int(columns[-1]) + 1, int(rows[-1]) + 1)
        return (box[0] + first[0], box[1] + first[1], box[0] + last[0], box[1] + last[1]), int(inside.sum())

    def _poses(self, number: int, leg: int) -> list[PersonSprite]:
        """The sprites of one part of a walk, drawn when first needed."""
        if (number, leg) not in self._sprites:
            walk, rng = self.walks[number], np.random.default_rng([self._seed, number, leg])
            raised = bool(rng.random() < 0.1)  # as in `camera.take_crop`
            turns = walk.legs[leg].turn + rng.normal(0, POSE_JITTER, POSES)
            phases = np.arange(POSES) * 2 * math.pi / POSES
            self._sprites[number, leg] = [
                draw_sprite(self.cast[walk.person], Pose(turn, phase, walk.stride, self.camera.tilt, raised))
                for turn, phase in zip(turns.tolist(), phases.tolist(), strict=True)
            ]
        return self._sprites[number, leg]


def draw_sprite(person: Person, pose: Pose) -> PersonSprite:
    """Draw a person once, large enough for every position in the frame."""
    scale = NEAR_SCALE * SUPERSAMPLING
    layer = Image.new("RGBA", (round(2 * ASIDE * scale), round((ABOVE + 1 + BELOW) * scale)))
    feet = (ABOVE + 1 - pose.tilt) * scale
    draw_person(layer, person, pose, Placement(layer.width / 2, ABOVE * scale, scale))
    painted = layer.getbbox()
    assert painted is not None, "a person paints at least one pixel"
    left, top, right, bottom = painted
    return PersonSprite(
        layer.crop(painted),
        (left - layer.width / 2) / scale,
        (top - feet) / scale,
        (right - left) / scale,
        (bottom - top) / scale,
    )


# Chosen to be typical for ByteTrack: most people are found in most frames, with low scores behind others.
BOX_JITTER = 0.025  # standard deviation of each side of a box, fraction of its width or height
MISS_RATE = 0.03  # share of visible people without a box
HIDDEN_BELOW = 0.35  # below this visible share most people are missed
HIDDEN_MISS_RATE = 0.8
FALSE_RATE = 0.03  # empty boxes per frame


@dataclass(frozen=True)
class SimulatedDetection:
    """A box and the detector's score, 0..1."""

    box: tuple[float, float, float, float]
    score: float


def simulate_detections(people: Sequence[TrueBox], rng: np.random.Generator) -> list[SimulatedDetection]:
    """Simulate the detections of one frame.

    Args:
        people: the true boxes.
        rng: the only source of randomness.
    """
    detections = []
    for person in people:
        if rng.random() < (HIDDEN_MISS_RATE if person.visible < HIDDEN_BELOW else MISS_RATE):
            continue
        score = 0.92 - 0.5 * (1 - person.visible) + rng.normal(0, 0.04)
        detections.append(SimulatedDetection(jitter_box(person.box, rng), round(float(np.clip(score, 0.3, 0.99)), 3)))
    for _ in range(int(rng.poisson(FALSE_RATE))):
        detections.append(SimulatedDetection(false_box(rng), round(float(rng.uniform(0.3, 0.6)), 3)))
    return detections


def jitter_box(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box with noise on each side, inside the frame."""
    left, top, right, bottom = box
    noise = rng.normal(0, BOX_JITTER, 4) * np.array([right - left, bottom - top] * 2)
    sides = np.clip(np.array(box) + noise, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


def false_box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random box with the size of a person."""
    tall = rng.uniform(0.3, 0.6) * HEIGHT
    wide = tall * rng.uniform(0.35, 0.5)
    left, top = rng.uniform(0, WIDTH - wide), rng.uniform(0, HEIGHT - tall)
    sides = np.array([left, top, left + wide, top + tall]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


BIT_RATE = 800_000  # per second: at 480 x 270 and 5 frames per second blocks are hardly visible


@dataclass(frozen=True)
class CameraVideo:
    """One camera's video of one night.

    Attributes:
        camera: name of the camera.
        video: MP4 file.
        detections, truth: JSON lines.
        start_s: time of the first frame, Unix seconds.
        frames: number of frames.
    """

    camera: str
    video: Path
    detections: Path
    truth: Path
    start_s: float
    frames: int


def write_video(
    folder: Path, camera: str, frames: Iterable[RenderedFrame], *, start_s: float, seed: int
) -> CameraVideo:
    """Write a video with simulated detections and the truth.

    Args:
        folder: target folder, created if missing.
        camera: name of the camera and of the files.
        frames: the frames in order.
        start_s: time of the first frame in whole Unix seconds: MP4 has no fractions.
        seed: seed of the detector.
    """
    rng = np.random.default_rng(seed)

    detected = ((frame, simulate_detections(frame.people, rng)) for frame in frames)
    return write_video_with_detections(folder, camera, detected, start_s=start_s)


def write_video_with_detections(
    folder: Path, camera: str, frames: Iterable[tuple[RenderedFrame, list[SimulatedDetection]]], *, start_s: float
) -> CameraVideo:
    """Write a video with the given detections of each frame, and the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    video, detections, truth = (folder / f"{camera}{end}" for end in (".mp4", ".detections.jsonl", ".truth.jsonl"))
    detected: list[dict[str, Any]] = []
    present: list[dict[str, Any]] = []

    def collect_rows() -> Iterator[RenderedFrame]:
        for number, (frame, boxes) in enumerate(frames):
            detected.extend({"frame": number, **asdict(detection)} for detection in boxes)
            present.extend({"frame": number, **asdict(person)} for person in frame.people)
            yield frame

    count = _encode_video(video, collect_rows(), start_s)
    for path, rows in ((detections, detected), (truth, present)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CameraVideo(camera, video, detections, truth, start_s, count)


def _encode_video(path: Path, frames: Iterable[RenderedFrame], start_s: float) -> int:
    """Write the video under a temporary name and rename it; returns the number of frames."""
    partial, count = path.with_suffix(".partial.mp4"), 0
    with av.open(str(partial), "w") as container:
        container.metadata["creation_time"] = datetime.fromtimestamp(start_s, UTC).isoformat()
        stream = container.add_stream("mpeg4", rate=round(FPS))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BIT_RATE
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")):
                container.mux(packet)
            count += 1
        for packet in stream.encode():
            container.mux(packet)
    os.replace(partial, path)
    return count
