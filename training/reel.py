"""Films on disk: an MP4 that says when it was taken, and beside it the truth and what a detector would tell.

cam1.mp4                MPEG-4, `FPS` frames a second, creation_time in its header
cam1.detections.jsonl   {"frame": 0, "box": [left, top, right, bottom], "score": 0.93}, as `resight ingest` reads it
cam1.truth.jsonl        {"frame": 0, "person": 12, "walk": 3, "box": [...], "visible": 1.0}, read by no command
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np

from resight.training.film import Shot
from resight.training.sightings import Detection, detect
from resight.training.street import FPS, HEIGHT, WIDTH

BIT_RATE = 800_000  # a second: at 480 x 270 and 5 frames a second blocks are hard to see


@dataclass(frozen=True)
class Reel:
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


def write_reel(folder: Path, camera: str, shots: Iterable[Shot], *, start_s: float, seed: int) -> Reel:
    """Write a film and what belongs to it.

    Args:
        folder: where to; made when missing.
        camera: its name, and that of the files.
        shots: its frames in their order.
        start_s: of the first one, whole Unix seconds: MP4 keeps no parts of them.
        seed: of the detector.
    """
    rng = np.random.default_rng(seed)

    def told() -> Iterator[tuple[Shot, list[Detection]]]:
        for shot in shots:
            yield shot, detect(shot.sightings, rng)

    return write_told_reel(folder, camera, told(), start_s=start_s)


def write_told_reel(folder: Path, camera: str, told: Iterable[tuple[Shot, list[Detection]]], *, start_s: float) -> Reel:
    """The same where what the detector tells of each frame is given."""
    folder.mkdir(parents=True, exist_ok=True)
    video, detections, truth = (folder / f"{camera}{end}" for end in (".mp4", ".detections.jsonl", ".truth.jsonl"))
    found: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []

    def frames() -> Iterator[Shot]:
        for number, (shot, boxes) in enumerate(told):
            found.extend({"frame": number, **asdict(detection)} for detection in boxes)
            known.extend({"frame": number, **asdict(sighting)} for sighting in shot.sightings)
            yield shot

    count = _encode(video, frames(), start_s)
    for path, rows in ((detections, found), (truth, known)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reel(camera, video, detections, truth, start_s, count)


def _encode(path: Path, shots: Iterable[Shot], start_s: float) -> int:
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
