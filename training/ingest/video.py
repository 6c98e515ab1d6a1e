"""PyAV (FFmpeg's libraries) as footage needs it: bounded, with a hardware decoder where there is one, never silent.

Other files or machines than the one named are out of reach: lists of segments, which could name them (HLS, concat),
are no format here, and only the protocols given are spoken.

A video file as footage: every frame decoded in order, those on the grid handed out.

A live stream (RTSP) as footage: by this machine's clock, with the newest frames, through interruptions.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

import av
import numpy as np
from av.codec.hwaccel import HWAccel, hwdevices_available

from resight.arrays import Pixels
from resight.errors import FootageError
from resight.image import MIN_SIDE
from resight.training.ingest.footage import (
    CLOCK_HELP,
    MAX_PIXELS,
    START,
    VIDEO_FORMATS,
    Frame,
    FramePosition,
    grid_index,
    parse_time,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


log = logging.getLogger(__name__)

# Those of FFmpeg's demuxers whose frames carry time stamps: raw H.264 would be read as 25 frames a second.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
NO_HWACCEL = "none"


def open_video(
    name: str,
    *,
    shown: str,
    hwaccel: str,
    options: Mapping[str, str],
    timeout_s: tuple[float, float] | None = None,
) -> tuple[InputContainer, VideoStream, str]:
    """Open a source and choose its first video stream.

    Args:
        name: a path or a URL.
        shown: what messages call it.
        hwaccel: "none", "auto" (the first of this build's devices that works, software where none does), or a device.
        options: of the container.
        timeout_s: of opening and of reading.

    Returns:
        The container, its stream, and the decoder that works: a device, or "none", to be asked for the next time.

    Raises:
        FootageError: it cannot be read, holds no video, or too large a picture.
    """
    devices = [] if hwaccel == NO_HWACCEL else hwdevices_available() if hwaccel == "auto" else [hwaccel]
    if hwaccel not in (NO_HWACCEL, "auto") and hwaccel not in hwdevices_available():
        raise FootageError(
            f"--hwaccel {hwaccel}: expected auto, none, or what this build of FFmpeg knows: "
            f"{', '.join(hwdevices_available())}",
            field="hwaccel",
        )
    for device in [*devices, NO_HWACCEL]:
        accel = None if device == NO_HWACCEL else HWAccel(device, allow_software_fallback=False)
        container: InputContainer | None = None
        try:
            container = av.open(name, options=dict(options), timeout=timeout_s, hwaccel=accel)
            stream = _video_stream(container, shown)
        except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
            if container is not None:
                container.close()
            if accel is None:
                raise FootageError(
                    f"{shown} cannot be read as video ({_ffmpeg_message(error)}): expected {VIDEO_FORMATS}"
                ) from error
            log.debug("%s: no decoding by %s (%s)", shown, device, _ffmpeg_message(error))
            continue
        except BaseException:
            if container is not None:
                container.close()
            raise
        if accel is not None:
            log.info("%s: decoded by %s", shown, device)
        elif hwaccel not in (NO_HWACCEL, "auto"):
            log.warning("%s: %s cannot decode it here, decoded in software", shown, hwaccel)
        return container, stream, device
    raise AssertionError  # the last of the list is software, which returns or raises


def _video_stream(container: InputContainer, shown: str) -> VideoStream:
    """The first video stream, within the budget; reading its first packet starts the decoder."""
    if not container.streams.video:
        raise FootageError(f"{shown} holds no video: expected {VIDEO_FORMATS}")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise FootageError(
            f"{shown} is {context.width}x{context.height}, at most {MAX_PIXELS} pixels a frame are read: scale it down",
            max_pixels=MAX_PIXELS,
        )
    if context.width and min(context.width, context.height) < MIN_SIDE:
        raise FootageError(f"{shown} is {context.width}x{context.height}: nobody can be seen on it")
    stream.thread_type = "AUTO"
    context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}  # a stream may change its size on the way
    context.open(strict=False)
    return stream


class VideoDecoder:
    """The frames of an open video; counts those that cannot be decoded."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        self.unreadable = 0
        self.broken = ""  # why the container ended before its end

    def frames(self) -> Iterator[VideoFrame]:
        """As they are decoded; a damaged packet is counted and passed over."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, OSError) as error:
                self.broken = _ffmpeg_message(error)
                return
            try:
                found = packet.decode()
            except (av.FFmpegError, OSError):
                self.unreadable += 1
                continue
            for frame in found:
                if frame.is_corrupt or not MIN_SIDE * MIN_SIDE <= frame.width * frame.height <= MAX_PIXELS:
                    self.unreadable += 1
                else:
                    yield frame


def frame_pixels(frame: VideoFrame) -> Pixels:
    """uint8 (H, W, 3) RGB, upright: phones write how they were held beside the picture."""
    image = frame.to_ndarray(format="rgb24")
    turned = np.rot90(image, round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(turned, np.uint8)


def _ffmpeg_message(error: BaseException) -> str:
    """FFmpeg's words without the errno and the file's name around them."""
    return str(getattr(error, "strerror", None) or error)


FILE_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
_Decoded: TypeAlias = "tuple[FramePosition, float, VideoFrame]"
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
        hwaccel: see `resight.training.ingest.video.open_video`.

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

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames on the grid, from a place on; see `Footage.frames`.

        Raises:
            FootageError: not one frame could be decoded.
        """
        last, seen = -1, 0
        for place, seconds, frame in self._decoded(start):
            seen += 1
            moment = grid_index(seconds, self.fps)
            if moment <= last:
                continue
            last = moment
            yield Frame(frame_pixels(frame), place, self._first_s + seconds)
        if not seen and start == START:
            raise FootageError(
                f"{self.name}: none of its frames could be decoded ({self.unreadable} damaged ones found)"
            )

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # A name such as "a:b.mp4" is a protocol to FFmpeg unless it is told that it is a file.
        container, stream, self._hwaccel = open_video(
            f"file:{self.path}", shown=self.name, hwaccel=self._hwaccel, options=FILE_OPTIONS
        )
        return container, stream

    def _decoded(self, start: FramePosition) -> Iterator[_Decoded]:
        """All frames from a place on, with their place and the seconds since the first."""
        jumped = start != START and (yield from self._after_jump(start))
        if not jumped:
            yield from self._from_the_beginning(start)

    def _after_jump(self, start: FramePosition) -> Generator[_Decoded, None, bool]:
        """From the key frame before a place; False where the jump leads elsewhere."""
        container, stream = self._open()
        with container:
            try:
                container.seek(start.mark, stream=stream)
            except (av.FFmpegError, OverflowError):
                return False
            decoder = VideoDecoder(container, stream)
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

    def _from_the_beginning(self, start: FramePosition) -> Iterator[_Decoded]:
        container, stream = self._open()
        with container:
            decoder, before = VideoDecoder(container, stream), 0
            for found in self._numbered(decoder.frames(), stream, decoder, START, 0):
                if found[0].number < start.number:
                    before = decoder.unreadable
                    continue
                self.unreadable = decoder.unreadable - before
                yield found

    def _numbered(
        self,
        frames: Iterable[VideoFrame],
        stream: VideoStream,
        decoder: VideoDecoder,
        first: FramePosition,
        before: int,
    ) -> Iterator[_Decoded]:
        """Frames with their places: damaged ones count, so that numbers are those of the footage."""
        mark = BEFORE_ALL if first == START else first.mark - 1
        for number, frame in enumerate(frames, first.number):
            self.unreadable = decoder.unreadable - before
            if frame.pts is None or stream.time_base is None:
                continue  # nobody knows when it was
            mark = max(frame.pts, mark + 1)
            seconds = float((mark - (stream.start_time or 0)) * stream.time_base)
            yield FramePosition(number + self.unreadable, mark), seconds, frame
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
            recorded_s = parse_time(said)
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


# TCP: over UDP one lost packet smears a second of picture, and most firewalls pass TCP only.
RTSP_OPTIONS = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,tcp,tls,rtp,udp"}
RTSP_TIMEOUT_S = (
    10.0,
    10.0,
)  # for a connection, and for the next packet; ours: cameras send 10 frames a second and more
RECONNECT_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before each further try to connect; ours
QUEUED_FRAMES = 8  # frames that wait for a slow detector; the oldest give way


class RtspStream:
    """An RTSP camera. A thread keeps reading, since a stream that is not read is cut by its camera.

    Frames are stamped with the moment they arrive, at most ``fps`` a second; where the reader of `frames` is slower,
    the oldest that wait are left out and counted. A broken connection is made again, with growing pauses; one that
    never came about is an error.

    Args:
        url: with its credentials, which no message repeats.
        camera: whose it is.
        fps: frames a second to hand out at most.
        duration_s: how long it is watched; None = until `stop` is called.
        hwaccel: see `resight.training.ingest.video.open_video`.

    Raises:
        FootageError: no host in the URL.
    """

    live = True
    start_s: float | None = None
    total: int | None = None

    def __init__(
        self, url: str, camera: str, fps: float, *, duration_s: float | None = None, hwaccel: str = "auto"
    ) -> None:
        self._url, self.name, self.camera, self.fps = url, without_credentials(url), camera, fps
        self._hwaccel, self._until_s = hwaccel, float("inf") if duration_s is None else time.monotonic() + duration_s
        self.total = None if duration_s is None else max(1, round(duration_s * fps))
        self.unreadable = self.left_out = 0
        self._began_s = time.time()
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._last = -1  # moment handed out, over all connections
        self._ended = False
        self._error: BaseException | None = None

    def fingerprint(self) -> str:
        """Of the address and the moment: what a live stream showed cannot be read again."""
        return hashlib.sha256(f"{self.name}\0{self._began_s!r}".encode()).hexdigest()

    def stop(self) -> None:
        """End `frames`; may be called from another thread or a signal handler's."""
        self._ended = True

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames as they come, until `stop` is called or the time is up.

        Raises:
            FootageError: the camera cannot be reached, or sends no video.
        """
        del start  # what has passed has passed
        reader = threading.Thread(target=self._read, name=f"live {self.camera}", daemon=True)
        reader.start()
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._over or self._error):
                        self._changed.wait(0.2)  # woken by frames; `stop` may come from a signal, which cannot notify
                    if self._over:
                        return
                    if not self._waiting:
                        raise self._error  # type: ignore[misc]  # the loop's condition leaves nothing else
                    frame = self._waiting.popleft()
                yield frame
        finally:
            self._ended = True
            reader.join(sum(RTSP_TIMEOUT_S))

    @property
    def _over(self) -> bool:
        return self._ended or time.monotonic() >= self._until_s

    def _read(self) -> None:
        """Connect, read, and connect again."""
        failures, came = 0, False
        while not self._ended:
            try:
                if self._read_connection():
                    failures, came = 0, True
                problem = "the stream ended"
            except FootageError as error:
                if not came and failures + 1 >= len(RECONNECT_DELAYS_S):
                    self._fail(error)
                    return
                problem = str(error)
            except Exception as error:  # it would end this thread unseen
                self._fail(error)
                return
            pause_s = RECONNECT_DELAYS_S[min(failures, len(RECONNECT_DELAYS_S) - 1)]
            failures += 1
            log.warning("%s: %s; connecting again in %.0f s", self.name, problem, pause_s)
            until_s = time.monotonic() + pause_s
            while not self._ended and time.monotonic() < until_s:
                time.sleep(0.1)

    def _read_connection(self) -> bool:
        """Read until the connection breaks; whether there was a frame."""
        container, stream, self._hwaccel = open_video(
            self._url, shown=self.name, hwaccel=self._hwaccel, options=RTSP_OPTIONS, timeout_s=RTSP_TIMEOUT_S
        )
        before, came = self.unreadable, False
        with container:
            decoder = VideoDecoder(container, stream)
            for frame in decoder.frames():
                if self._ended:
                    break
                came, now_s = True, time.time()
                self.unreadable = before + decoder.unreadable
                moment = grid_index(now_s - self._began_s, self.fps)
                if moment > self._last:
                    self._last = moment
                    self._offer(Frame(frame_pixels(frame), FramePosition(moment, moment), now_s))
        return came

    def _offer(self, frame: Frame) -> None:
        with self._changed:
            if len(self._waiting) == QUEUED_FRAMES:
                self._waiting.popleft()
                self.left_out += 1
            self._waiting.append(frame)
            self._changed.notify()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify()


def without_credentials(url: str) -> str:
    """A URL without user, password and query, which may hold another password.

    Raises:
        FootageError: no host in it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FootageError(f"an address that is none ({error}): expected rtsp://HOST/PATH") from error
    if not host:
        raise FootageError("an address without a host: expected rtsp://HOST/PATH")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{f':{port}' if port else ''}{parts.path}"
