"""Footage as frames with camera and time: what a file, a folder of images and a live stream have in common.

Footage comes from anywhere and is treated as hostile: a frame's pixels are bounded before they are decoded, and a
frame that cannot be decoded is counted and passed over, whatever the file promised.
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

MAX_PIXELS = MAX_SIDE * MAX_SIDE  # of a frame: 50 MB as RGB; cameras of today deliver half of it (4K: 8.3 million)
VIDEO_FORMATS = "MP4, MKV, WebM, AVI, MPEG-TS, FLV, OGG or ASF"
CAMERA_NAME = re.compile(r"[^\W_][\w .-]{0,62}")  # it becomes a folder's name
CLOCK_HELP = "give the moment of its first frame, --start 2026-03-01T22:00:00+01:00"


class FramePosition(NamedTuple):
    """Where in footage a frame stands.

    Attributes:
        number: of the frame, from 0; of a live stream, the moment on the grid of ``--fps``.
        mark: the file's own time stamp of it, or the number of the file in a folder.
    """

    number: int
    mark: int


START = FramePosition(0, 0)


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Frame:
    """One frame: uint8 (H, W, 3) RGB, where it stands in its footage, and seconds on the site's clock (Unix time)."""

    image: Pixels
    place: FramePosition
    time_s: float


class Footage(Protocol):
    """One source of one camera.

    Attributes:
        name: what messages call it; without credentials.
        camera: its name at the site.
        fps: frames a second that are handed out, at most.
        live: whether it cannot be read a second time.
        start_s: Unix seconds of its first frame; None of a live stream, which has its moments from this machine.
        total: frames to come, as far as somebody said; None where nobody did.
        unreadable: frames so far that could not be decoded.
        left_out: frames so far that came and nobody had time for.
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
        """sha256 of what is in it; of a live stream, of where it comes from and when it was begun."""
        ...

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Every frame on the grid of ``fps`` from a place on, in order of time."""
        ...


def check_camera(name: str) -> str:
    """A camera's name, if it can be a folder's.

    Raises:
        FootageError: with what a name may hold.
    """
    if not CAMERA_NAME.fullmatch(name) or name != name.strip(" ."):
        raise FootageError(
            f"camera {name[:80]!r}: expected 1 to 63 letters, digits, spaces or . _ -, beginning with a letter or a "
            "digit, as the site's file names it",
            field="camera",
        )
    return name


def parse_time(text: str) -> float:
    """Unix seconds of a moment given by the user.

    Args:
        text: ISO 8601 with its time zone, or Unix seconds.

    Raises:
        FootageError: it is neither, or without a zone; the machine's own zone is no guess to build a gallery on.
    """
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise FootageError(f"{text!r} is no moment: {CLOCK_HELP}, or Unix seconds", field="start") from error
    if moment.tzinfo is None:
        raise FootageError(
            f"{text!r} has no time zone: add one, as in {text}Z or {text}+01:00, or give Unix seconds", field="start"
        )
    return moment.timestamp()


def grid_index(seconds: float, fps: float) -> int:
    """Which of the moments 0, 1/fps, 2/fps, … a time since the beginning belongs to.

    A microsecond of tolerance: 0.2 s as a file's time stamp may be 0.19999.
    """
    return int((seconds + 1e-6) * fps)
