"""Footage as frames with camera and time: the interface of video files, folders of images and live streams.

Footage is untrusted input: the size of a frame is checked before it is decoded, and a frame that cannot be decoded is
counted and skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

from resight.arrays import Pixels
from resight.errors import FootageError
from resight.image import MAX_SIDE

MAX_PIXELS = MAX_SIDE * MAX_SIDE  # per frame: 50 MB as RGB; current cameras deliver half of it (4K: 8.3 million)
VIDEO_FORMATS = "MP4, MKV, WebM, AVI, MPEG-TS, FLV, OGG or ASF"
CAMERA_NAME = re.compile(r"[^\W_][\w .-]{0,62}")  # used as the name of a folder
CLOCK_HELP = "give the time of its first frame, --start 2026-03-01T22:00:00+01:00"


class FramePosition(NamedTuple):
    """Position of a frame in its footage.

    Attributes:
        number: number of the frame, from 0; for a live stream its index on the grid of ``--fps``.
        mark: its time stamp in the file, or the number of the file in a folder.
    """

    number: int
    mark: int


START = FramePosition(0, 0)


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class Frame:
    """One frame: uint8 (H, W, 3) RGB, its position in the footage, and its time in Unix seconds."""

    image: Pixels
    position: FramePosition
    time_s: float


class Footage(Protocol):
    """One source of one camera.

    Attributes:
        name: name in messages, without credentials.
        camera: name of the camera at the site.
        fps: maximum number of frames per second.
        live: whether it cannot be read a second time.
        start_s: Unix seconds of its first frame; None for a live stream, which uses this machine's clock.
        total: expected number of frames; None if unknown.
        unreadable: number of frames so far that could not be decoded.
        left_out: number of frames so far that were dropped because processing was too slow.
    """

    name: str
    camera: str
    fps: float
    live: bool
    start_s: float | None
    total: int | None
    unreadable: int
    left_out: int

    def fingerprint(self) -> str:
        """sha256 of the content; for a live stream, of its address and start time."""
        ...

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Every frame on the grid of ``fps`` from a position on, in order of time."""
        ...


def check_camera(name: str) -> str:
    """Return a camera's name if it is valid.

    Raises:
        FootageError: the name has other characters or the wrong length.
    """
    if not CAMERA_NAME.fullmatch(name) or name != name.strip(" ."):
        raise FootageError(
            f"camera {name[:80]!r}: expected 1 to 63 letters, digits, spaces or . _ -, beginning with a letter or a "
            "digit, as in the site's file",
            field="camera",
        )
    return name


def parse_time(text: str) -> float:
    """Unix seconds of a time given by the user.

    Args:
        text: ISO 8601 with its time zone, or Unix seconds.

    Raises:
        FootageError: it is neither, or has no time zone; the machine's time zone may be wrong for the camera.
    """
    try:
        return float(text)
    except ValueError:
        pass
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise FootageError(f"{text!r} is not a time: {CLOCK_HELP}, or Unix seconds", field="start") from error
    if parsed.tzinfo is None:
        raise FootageError(
            f"{text!r} has no time zone: add one, as in {text}Z or {text}+01:00, or give Unix seconds", field="start"
        )
    return parsed.timestamp()


def grid_index(seconds: float, fps: float) -> int:
    """Index of a time since the start on the grid 0, 1/fps, 2/fps, ….

    With a tolerance of a microsecond, because 0.2 s may be stored as 0.19999.
    """
    return int((seconds + 1e-6) * fps)
