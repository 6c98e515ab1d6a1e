"""A video file as footage: every frame decoded in order, those on the grid handed out."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import av

from resight.errors import FootageError
from resight.training.decoding import FORMATS as DEMUXED
from resight.training.decoding import Decoder, open_video, pixels_of
from resight.training.footage import CLOCK_HELP, START, Frame, Place, on_grid, read_clock

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

OPTIONS = {"protocol_whitelist": "file", "format_whitelist": DEMUXED}
_Decoded: TypeAlias = "tuple[Place, float, VideoFrame]"
CLOCK_UNSET_S = 631_152_000.0  # 1990: a camera whose clock was never set writes 1904 or 1970
BEFORE_ALL = -(2**62)  # no time stamp is lower
USUAL_RATE = 25.0  # frames a second, FFmpeg's own guess of a raw stream that does not say


class VideoFile:
    """One file. Its clock begins at ``start_s``, or at the ``creation_time`` that its container carries.

    Args:
        path: of the file.
        camera: whose it is.
        fps: frames a second to hand out at most.
        start_s: Unix seconds of the first frame.
        hwaccel: see `resight.training.decoding.open_video`.

    Raises:
        FootageError: no video, too large a picture, or no clock.
    """

    live = False

    def __init__(self, path: Path, camera: str, fps: float, start_s: float | None, *, hwaccel: str = "auto") -> None:
        self.path, self.name, self.camera, self.fps = path, str(path), camera, fps
        self.unreadable = self.left_out = 0
        self._hwaccel = hwaccel
        container, stream = self._open()
        with container:
            self._rate = float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
            self._first_s = self._recorded_s(container, stream) if start_s is None else start_s
            self.start_s: float | None = self._first_s
            self.total = self._expected(container, stream)

    def fingerprint(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def frames(self, start: Place = START) -> Iterator[Frame]:
        """Frames on the grid, from a place on; see `Footage.frames`.

        Raises:
            FootageError: not one frame could be decoded.
        """
        last, seen = -1, 0
        for place, seconds, frame in self._decoded(start):
            seen += 1
            moment = on_grid(seconds, self.fps)
            if moment <= last:
                continue
            last = moment
            yield Frame(pixels_of(frame), place, self._first_s + seconds)
        if not seen and start == START:
            raise FootageError(
                f"{self.name}: none of its frames could be decoded ({self.unreadable} damaged ones found)"
            )

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # A name such as "a:b.mp4" is a protocol to FFmpeg unless it is told that it is a file.
        container, stream, self._hwaccel = open_video(
            f"file:{self.path}", shown=self.name, hwaccel=self._hwaccel, options=OPTIONS
        )
        return container, stream

    def _decoded(self, start: Place) -> Iterator[_Decoded]:
        """All frames from a place on, with their place and the seconds since the first."""
        jumped = start != START and (yield from self._after_jump(start))
        if not jumped:
            yield from self._from_the_beginning(start)

    def _after_jump(self, start: Place) -> Generator[_Decoded, None, bool]:
        """From the key frame before a place; False where the jump leads elsewhere."""
        container, stream = self._open()
        with container:
            try:
                container.seek(start.mark, stream=stream)
            except (av.FFmpegError, OverflowError):
                return False
            decoder = Decoder(container, stream)
            found = decoder.frames()
            for frame in found:
                if frame.pts is None or frame.pts > start.mark:
                    return False
                if frame.pts == start.mark:
                    break
            else:
                return False
            before = decoder.unreadable  # these were counted when they were met first
            yield from self._numbered(chain([frame], found), stream, decoder, start, before)
            return True

    def _from_the_beginning(self, start: Place) -> Iterator[_Decoded]:
        container, stream = self._open()
        with container:
            decoder, before = Decoder(container, stream), 0
            for found in self._numbered(decoder.frames(), stream, decoder, START, 0):
                if found[0].number < start.number:
                    before = decoder.unreadable
                    continue
                self.unreadable = decoder.unreadable - before
                yield found

    def _numbered(
        self, frames: Iterable[VideoFrame], stream: VideoStream, decoder: Decoder, first: Place, before: int
    ) -> Iterator[_Decoded]:
        """Frames with their places: damaged ones count, so that numbers are those of the footage."""
        mark = BEFORE_ALL if first == START else first.mark - 1
        for number, frame in enumerate(frames, first.number):
            self.unreadable = decoder.unreadable - before
            if frame.pts is None or stream.time_base is None:
                continue  # nobody knows when it was
            mark = max(frame.pts, mark + 1)
            seconds = float((mark - (stream.start_time or 0)) * stream.time_base)
            yield Place(number + self.unreadable, mark), seconds, frame
        self.unreadable = decoder.unreadable - before
        if decoder.broken:
            log.warning("%s breaks off (%s): what came before is used", self.name, decoder.broken)

    def _expected(self, container: InputContainer, stream: VideoStream) -> int | None:
        """Frames on the grid, by what the file says of its length."""
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6  # AV_TIME_BASE
        else:
            return None
        return max(1, math.ceil(seconds * min(self.fps, self._rate)))

    def _recorded_s(self, container: InputContainer, stream: VideoStream) -> float:
        """Unix seconds at which the file says that it was begun.

        Raises:
            FootageError: it does not, or its camera's clock was not set.
        """
        said = container.metadata.get("creation_time") or stream.metadata.get("creation_time")
        if said is None:
            raise FootageError(f"{self.name} does not say when it was taken: {CLOCK_HELP}", field="start")
        try:
            recorded_s = read_clock(said)
        except FootageError as error:
            raise FootageError(
                f"{self.name} says that it was taken at {said[:40]!r}, which is no moment: {CLOCK_HELP}", field="start"
            ) from error
        if recorded_s < CLOCK_UNSET_S:
            raise FootageError(
                f"{self.name} says that it was taken at {said}, as from a clock that was never set: {CLOCK_HELP}",
                field="start",
            )
        return recorded_s
