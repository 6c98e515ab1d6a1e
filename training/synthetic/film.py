"""Draw what a camera over a simulated street sees: people walk through, cover one another and leave.

A figure is drawn in a few poses for each walk and pasted smaller or larger as its walker goes; `exposure.py`
then takes the picture through the camera.

A simulated person detector: what it would tell of frames whose truth is known.

Boxes are a little off, people behind others are often missed, and now and then there is nobody in a box. It says
nothing about who is who: that is the tracker's and the model's work.

Films on disk: an MP4 that says when it was taken, and beside it the truth and what a detector would tell.

cam1.mp4                MPEG-4, `FPS` frames a second, creation_time in its header
cam1.detections.jsonl   {"frame": 0, "box": [left, top, right, bottom], "score": 0.93}, as `resight ingest` reads it
cam1.truth.jsonl        {"frame": 0, "person": 12, "walk": 3, "box": [...], "visible": 1.0}, read by no command
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

POSES = 8  # of a stride: at 5 frames a second one of 1.1 s shows 5 or 6
POSE_JITTER = 0.12  # radians that the view angle changes from pose to pose, as one deviation
SUPERSAMPLING = 1.5  # pixels drawn for each of the largest a figure is shown at
ABOVE, BELOW, ASIDE = 0.1, 0.1, 0.45  # room around the body for hats, shoes, arms and bags, in body heights
MIN_PIXELS = 60  # of somebody visible: below it nobody would say that somebody is there

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the picture; right and bottom are outside."""


@dataclass(frozen=True)
class TrueBox:
    """One person in one frame.

    Attributes:
        walk: number of the walk in this film.
        person: number in the cast.
        box: of the part within the picture, covered or not.
        visible: share of that part which nobody covers, 0..1.
    """

    walk: int
    person: int
    box: Box
    visible: float


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class RenderedFrame:
    """A frame, uint8 (HEIGHT, WIDTH, 3), and who is in it."""

    pixels: Pixels
    sightings: tuple[TrueBox, ...]


@dataclass(frozen=True, eq=False)
class PersonSprite:
    """A person in one pose, cut to what is painted; ``left`` and ``top`` are from the feet, all in body heights."""

    image: Image.Image
    left: float
    top: float
    width: float
    height: float


class CameraView:
    """What one camera sees for one night; any moment of it can be taken.

    Args:
        camera: from `street.hang_cameras`.
        cast: everybody there is.
        walks: who walks when; their persons are numbers in ``cast``.
        seed: of poses and noise. Where the camera points does not hang on it.
    """

    def __init__(self, camera: SimulatedCamera, cast: Sequence[Person], walks: Sequence[Walk], *, seed: int) -> None:
        self.camera, self.cast, self.walks = camera, cast, tuple(walks)
        self._seed = seed
        self._figures: dict[tuple[int, int], list[PersonSprite]] = {}  # by walk and leg
        self._expose = FrameOptics(camera, np.random.default_rng(seed))
        wide = camera.backdrop.width // BACKDROP_WIDTHS
        self._wall = camera.backdrop.crop((0, 0, wide, camera.backdrop.height)).resize((WIDTH, HEIGHT))

    @property
    def seconds(self) -> float:
        """When the last has left."""
        return max((walk.end_s for walk in self.walks), default=0.0)

    def shots(self) -> Iterator[RenderedFrame]:
        """Every frame of the film, `FPS` a second."""
        for number in range(math.ceil(self.seconds * FPS)):
            yield self.shot(number / FPS)

    def shot(self, time_s: float) -> RenderedFrame:
        """The frame of one moment, in seconds of the film; moments are best taken in their order."""
        for key in [key for key in self._figures if self.walks[key[0]].end_s <= time_s]:
            del self._figures[key]
        there = [(number, p.at(time_s)) for number, p in enumerate(self.walks) if p.start_s <= time_s < p.end_s]
        there.sort(key=lambda walker: walker[1].feet)  # the far ones first: the near ones cover them
        canvas, owner = self._wall.copy(), np.full((HEIGHT, WIDTH), -1, np.int32)
        painted = [self._paint(canvas, owner, number, spot) for number, spot in there]
        shown = [
            TrueBox(number, self.walks[number].person, box, seen / pixels)
            for (number, _), (box, pixels) in zip(there, painted, strict=True)
            if (seen := int((owner[box[1] : box[3], box[0] : box[2]] == number).sum())) >= MIN_PIXELS
        ]
        return RenderedFrame(self._expose(canvas), tuple(shown))

    def _paint(self, canvas: Image.Image, owner: NDArray[np.int32], number: int, spot: WalkPosition) -> tuple[Box, int]:
        """Put a walker into the picture; the box within it and how many pixels were painted there."""
        poses = self._poses(number, spot.leg)
        figure = poses[int(spot.phase / (2 * math.pi) * POSES) % POSES]
        wide, tall = (max(2, round(side * spot.scale)) for side in (figure.width, figure.height))
        left, top = round(spot.x + figure.left * spot.scale), round(spot.feet + figure.top * spot.scale)
        box = max(0, left), max(0, top), max(0, min(WIDTH, left + wide)), max(0, min(HEIGHT, top + tall))
        if box[0] >= box[2] or box[1] >= box[3]:
            return (0, 0, 0, 0), 0
        small = figure.image.resize((wide, tall), Image.Resampling.BILINEAR, reducing_gap=1.5)
        canvas.paste(small, (left, top), small)
        inside = np.asarray(small.getchannel("A"))[box[1] - top : box[3] - top, box[0] - left : box[2] - left] > 127
        owner[box[1] : box[3], box[0] : box[2]][inside] = number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return (0, 0, 0, 0), 0
        first, last = (int(columns[0]), int(rows[0])), (int(columns[-1]) + 1, int(rows[-1]) + 1)
        return (box[0] + first[0], box[1] + first[1], box[0] + last[0], box[1] + last[1]), int(inside.sum())

    def _poses(self, number: int, leg: int) -> list[PersonSprite]:
        """The figures of one part of a walk, drawn when first needed."""
        if (number, leg) not in self._figures:
            walk, rng = self.walks[number], np.random.default_rng([self._seed, number, leg])
            raised = bool(rng.random() < 0.1)  # as `scene.take_crop`
            turns = walk.legs[leg].turn + rng.normal(0, POSE_JITTER, POSES)
            phases = np.arange(POSES) * 2 * math.pi / POSES
            self._figures[number, leg] = [
                draw_sprite(self.cast[walk.person], Pose(turn, phase, walk.stride, self.camera.tilt, raised))
                for turn, phase in zip(turns.tolist(), phases.tolist(), strict=True)
            ]
        return self._figures[number, leg]


def draw_sprite(person: Person, pose: Pose) -> PersonSprite:
    """Draw somebody once, large enough for every place in the picture."""
    scale = NEAR_SCALE * SUPERSAMPLING
    layer = Image.new("RGBA", (round(2 * ASIDE * scale), round((ABOVE + 1 + BELOW) * scale)))
    feet = (ABOVE + 1 - pose.tilt) * scale
    draw_person(layer, person, pose, Placement(layer.width / 2, ABOVE * scale, scale))
    painted = layer.getbbox()
    assert painted is not None, "a figure paints something"
    left, top, right, bottom = painted
    return PersonSprite(
        layer.crop(painted),
        (left - layer.width / 2) / scale,
        (top - feet) / scale,
        (right - left) / scale,
        (bottom - top) / scale,
    )


# Chosen so that ByteTrack has its usual work: most people found in most frames, low scores behind others.
BOX_JITTER = 0.025  # deviation of each side of a box, shares of its width or height
MISS_RATE = 0.03  # share of visible people no box is told for
HIDDEN_BELOW = 0.35  # below this visible share four in five are missed
HIDDEN_MISS_RATE = 0.8
FALSE_RATE = 0.03  # boxes without anybody, for each frame


@dataclass(frozen=True)
class SimulatedDetection:
    """A box and how sure the detector is, 0..1."""

    box: tuple[float, float, float, float]
    score: float


def simulate_detections(sightings: Sequence[TrueBox], rng: np.random.Generator) -> list[SimulatedDetection]:
    """What a detector tells of one frame.

    Args:
        sightings: the truth.
        rng: source of chance.
    """
    told = []
    for sighting in sightings:
        if rng.random() < (HIDDEN_MISS_RATE if sighting.visible < HIDDEN_BELOW else MISS_RATE):
            continue
        score = 0.92 - 0.5 * (1 - sighting.visible) + rng.normal(0, 0.04)
        told.append(SimulatedDetection(jitter_box(sighting.box, rng), round(float(np.clip(score, 0.3, 0.99)), 3)))
    for _ in range(int(rng.poisson(FALSE_RATE))):
        told.append(SimulatedDetection(false_box(rng), round(float(rng.uniform(0.3, 0.6)), 3)))
    return told


def jitter_box(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box as a detector draws it: each side a little off, within the picture."""
    left, top, right, bottom = box
    off = rng.normal(0, BOX_JITTER, 4) * np.array([right - left, bottom - top] * 2)
    sides = np.clip(np.array(box) + off, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


def false_box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box as large as a person, where nobody stands."""
    tall = rng.uniform(0.3, 0.6) * HEIGHT
    wide = tall * rng.uniform(0.35, 0.5)
    left, top = rng.uniform(0, WIDTH - wide), rng.uniform(0, HEIGHT - tall)
    sides = np.array([left, top, left + wide, top + tall]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


BIT_RATE = 800_000  # a second: at 480 x 270 and 5 frames a second blocks are hard to see


@dataclass(frozen=True)
class CameraVideo:
    """One camera's film of one night.

    Attributes:
        camera: its name.
        video: MP4.
        detections, truth: JSON lines.
        start_s: of the first frame, Unix seconds.
        frames: how many.
    """

    camera: str
    video: Path
    detections: Path
    truth: Path
    start_s: float
    frames: int


def write_video(folder: Path, camera: str, shots: Iterable[RenderedFrame], *, start_s: float, seed: int) -> CameraVideo:
    """Write a film and what belongs to it.

    Args:
        folder: where to; made when missing.
        camera: its name, and that of the files.
        shots: its frames in their order.
        start_s: of the first one, whole Unix seconds: MP4 keeps no parts of them.
        seed: of the detector.
    """
    rng = np.random.default_rng(seed)

    def told() -> Iterator[tuple[RenderedFrame, list[SimulatedDetection]]]:
        for shot in shots:
            yield shot, simulate_detections(shot.sightings, rng)

    return write_video_with_detections(folder, camera, told(), start_s=start_s)


def write_video_with_detections(
    folder: Path, camera: str, told: Iterable[tuple[RenderedFrame, list[SimulatedDetection]]], *, start_s: float
) -> CameraVideo:
    """The same where what the detector tells of each frame is given."""
    folder.mkdir(parents=True, exist_ok=True)
    video, detections, truth = (folder / f"{camera}{end}" for end in (".mp4", ".detections.jsonl", ".truth.jsonl"))
    found: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []

    def frames() -> Iterator[RenderedFrame]:
        for number, (shot, boxes) in enumerate(told):
            found.extend({"frame": number, **asdict(detection)} for detection in boxes)
            known.extend({"frame": number, **asdict(sighting)} for sighting in shot.sightings)
            yield shot

    count = _encode_video(video, frames(), start_s)
    for path, rows in ((detections, found), (truth, known)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CameraVideo(camera, video, detections, truth, start_s, count)


def _encode_video(path: Path, shots: Iterable[RenderedFrame], start_s: float) -> int:
    """Write the video under another name and rename it; how many frames it has."""
    partial, count = path.with_suffix(".partial.mp4"), 0
    with av.open(str(partial), "w") as container:
        container.metadata["creation_time"] = datetime.fromtimestamp(start_s, UTC).isoformat()
        stream = container.add_stream("mpeg4", rate=round(FPS))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BIT_RATE
        for shot in shots:
            for packet in stream.encode(av.VideoFrame.from_ndarray(shot.pixels, format="rgb24")):
                container.mux(packet)
            count += 1
        for packet in stream.encode():
            container.mux(packet)
    os.replace(partial, path)
    return count
