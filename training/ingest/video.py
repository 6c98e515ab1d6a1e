"""Video files and live RTSP streams as footage, decoded by PyAV (FFmpeg), with a hardware decoder if available.

A video cannot refer to other files or hosts: formats with lists of segments (HLS, concat) are not accepted, and only
the listed protocols are enabled. A file is decoded in order, and frames on the grid of ``fps`` are returned. A live
stream uses this machine's clock, drops old frames if processing is slower than the camera, and reconnects after
interruptions.
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

# FFmpeg's demuxers with time stamps; raw H.264 has none and would be read at 25 frames per second.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
NO_HWACCEL = "none"


def open_video(
    name: str,
    *,
    label: str,
    hwaccel: str,
    options: Mapping[str, str],
    timeout_s: tuple[float, float] | None = None,
) -> tuple[InputContainer, VideoStream, str]:
    """Open a source and choose its first video stream.

    Args:
        name: a path or a URL.
        label: name used in messages.
        hwaccel: "none", "auto" (the first device of this build that works, otherwise software), or a device.
        options: options of the container.
        timeout_s: timeouts of opening and of reading.

    Returns:
        The container, its stream, and the decoder that works: a device, or "none"; use it when opening again.

    Raises:
        FootageError: it cannot be read, has no video, or its frames are too large.
    """
    devices = [] if hwaccel == NO_HWACCEL else hwdevices_available() if hwaccel == "auto" else [hwaccel]
    if hwaccel not in (NO_HWACCEL, "auto") and hwaccel not in hwdevices_available():
        raise FootageError(
            f"--hwaccel {hwaccel}: expected auto, none, or a device of this build of FFmpeg: "
            f"{', '.join(hwdevices_available())}",
            field="hwaccel",
        )
    for device in [*devices, NO_HWACCEL]:
        accel = None if device == NO_HWACCEL else HWAccel(device, allow_software_fallback=False)
        container: InputContainer | None = None
        try:
            container = av.open(name, options=dict(options), timeout=timeout_s, hwaccel=accel)
            stream = _video_stream(container, label)
        except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
            if container is not None:
                container.close()
            if accel is None:
                raise FootageError(
                    f"{label} cannot be read as video ({_ffmpeg_message(error)}): expected {VIDEO_FORMATS}"
                ) from error
            log.debug("%s: cannot be decoded by %s (%s)", label, device, _ffmpeg_message(error))
            continue
        except BaseException:
            if container is not None:
                container.close()
            raise
        if accel is not None:
            log.info("%s: decoded by %s", label, device)
        elif hwaccel not in (NO_HWACCEL, "auto"):
            log.warning("%s: %s cannot decode it, using software decoding", label, hwaccel)
        return container, stream, device
    raise AssertionError  # the last device is software, which returns or raises


def _video_stream(container: InputContainer, label: str) -> VideoStream:
    """The first video stream, with its size checked and the decoder opened."""
    if not container.streams.video:
        raise FootageError(f"{label} has no video: expected {VIDEO_FORMATS}")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise FootageError(
            f"{label} is {context.width}x{context.height}, at most {MAX_PIXELS} pixels per frame: scale it down",
            max_pixels=MAX_PIXELS,
        )
    if context.width and min(context.width, context.height) < MIN_SIDE:
        raise FootageError(f"{label} is {context.width}x{context.height}: too small to show people")
    stream.thread_type = "AUTO"
    context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}  # a stream may change its size later
    context.open(strict=False)
    return stream


class VideoDecoder:
    """Decodes the frames of an open video and counts those that cannot be decoded."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        self.unreadable = 0
        self.broken = ""  # error that ended the container early

    def frames(self) -> Iterator[VideoFrame]:
        """The decoded frames; a damaged packet is counted and skipped."""
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
    """uint8 (H, W, 3) RGB, rotated upright according to the metadata written by phones."""
    image = frame.to_ndarray(format="rgb24")
    upright = np.rot90(image, round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(upright, np.uint8)


def _ffmpeg_message(error: BaseException) -> str:
    """FFmpeg's message without errno and file name."""
    return str(getattr(error, "strerror", None) or error)


FILE_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
_Decoded: TypeAlias = "tuple[FramePosition, float, VideoFrame]"
CLOCK_UNSET_S = 631_152_000.0  # 1990: cameras with an unset clock write 1904 or 1970
BEFORE_ALL = -(2**62)  # lower than any time stamp
USUAL_RATE = 25.0  # frames per second, FFmpeg's default for raw streams without a rate


class VideoFile:
    """A video file. Its first frame has the time ``start_s``, or the ``creation_time`` of the container.

    Args:
        path: the file.
        camera: name of the camera.
        fps: maximum number of frames per second.
        start_s: Unix seconds of the first frame.
        hwaccel: see `open_video`.

    Raises:
        FootageError: no video, frames that are too large, or no start time.
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
            self.total = self._estimate_total(container, stream)

    def fingerprint(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames on the grid from a position on; see `Footage.frames`.

        Raises:
            FootageError: no frame could be decoded.
        """
        last, decoded = -1, 0
        for position, seconds, frame in self._decode_from(start):
            decoded += 1
            tick = grid_index(seconds, self.fps)
            if tick <= last:
                continue
            last = tick
            yield Frame(frame_pixels(frame), position, self._first_s + seconds)
        if not decoded and start == START:
            raise FootageError(
                f"{self.name}: none of its frames could be decoded ({self.unreadable} damaged ones found)"
            )

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # Without the prefix FFmpeg would parse a name such as "a:b.mp4" as a protocol.
        container, stream, self._hwaccel = open_video(
            f"file:{self.path}", label=self.name, hwaccel=self._hwaccel, options=FILE_OPTIONS
        )
        return container, stream

    def _decode_from(self, start: FramePosition) -> Iterator[_Decoded]:
        """All frames from a position on, with their position and the seconds since the first frame."""
        found = start != START and (yield from self._decode_after_seek(start))
        if not found:
            yield from self._decode_from_beginning(start)

    def _decode_after_seek(self, start: FramePosition) -> Generator[_Decoded, None, bool]:
        """Decode from the key frame before a position; returns False if seeking does not find the position."""
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
            before = decoder.unreadable  # counted before the interruption
            yield from self._with_positions(chain([frame], found), stream, decoder, start, before)
            return True

    def _decode_from_beginning(self, start: FramePosition) -> Iterator[_Decoded]:
        container, stream = self._open()
        with container:
            decoder, before = VideoDecoder(container, stream), 0
            for found in self._with_positions(decoder.frames(), stream, decoder, START, 0):
                if found[0].number < start.number:
                    before = decoder.unreadable
                    continue
                self.unreadable = decoder.unreadable - before
                yield found

    def _with_positions(
        self,
        frames: Iterable[VideoFrame],
        stream: VideoStream,
        decoder: VideoDecoder,
        first: FramePosition,
        before: int,
    ) -> Iterator[_Decoded]:
        """Frames with their positions; damaged frames are counted, so that numbers match the footage."""
        mark = BEFORE_ALL if first == START else first.mark - 1
        for number, frame in enumerate(frames, first.number):
            self.unreadable = decoder.unreadable - before
            if frame.pts is None or stream.time_base is None:
                continue  # without a time
            mark = max(frame.pts, mark + 1)
            seconds = float((mark - (stream.start_time or 0)) * stream.time_base)
            yield FramePosition(number + self.unreadable, mark), seconds, frame
        self.unreadable = decoder.unreadable - before
        if decoder.broken:
            log.warning("%s ends early (%s): the frames before are used", self.name, decoder.broken)

    def _estimate_total(self, container: InputContainer, stream: VideoStream) -> int | None:
        """Expected number of frames on the grid, from the duration in the file."""
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6  # AV_TIME_BASE
        else:
            return None
        return max(1, math.ceil(seconds * min(self.fps, self._rate)))

    def _recorded_s(self, container: InputContainer, stream: VideoStream) -> float:
        """Start time of the recording from the metadata, in Unix seconds.

        Raises:
            FootageError: it is missing, invalid, or the camera's clock was not set.
        """
        text = container.metadata.get("creation_time") or stream.metadata.get("creation_time")
        if text is None:
            raise FootageError(f"{self.name} has no creation_time: {CLOCK_HELP}", field="start")
        try:
            recorded_s = parse_time(text)
        except FootageError as error:
            raise FootageError(
                f"{self.name} has the creation_time {text[:40]!r}, which is not a time: {CLOCK_HELP}", field="start"
            ) from error
        if recorded_s < CLOCK_UNSET_S:
            raise FootageError(
                f"{self.name} has the creation_time {text}, as from a clock that was never set: {CLOCK_HELP}",
                field="start",
            )
        return recorded_s


# TCP: over UDP one lost packet corrupts about a second of video, and most firewalls only allow TCP.
RTSP_OPTIONS = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,tcp,tls,rtp,udp"}
RTSP_TIMEOUT_S = (10.0, 10.0)  # to connect, and for the next packet; cameras send at least 10 frames per second
RECONNECT_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before each further attempt to connect
QUEUED_FRAMES = 8  # frames waiting for the detector; the oldest are dropped


class RtspStream:
    """An RTSP camera. A thread reads continuously, because a camera closes a stream that is not read.

    Frames get the time of their arrival, at most ``fps`` per second; if the consumer of `frames` is slower, the oldest
    waiting frames are dropped and counted. A broken connection is retried with increasing delays; if the first
    connection fails repeatedly, that is an error.

    Args:
        url: address with credentials, which are never part of messages.
        camera: name of the camera.
        fps: maximum number of frames per second.
        duration_s: how long to read; None until `stop` is called.
        hwaccel: see `open_video`.

    Raises:
        FootageError: the URL has no host.
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
        self._started_s = time.time()
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._last = -1  # grid index of the last frame, over all connections
        self._ended = False
        self._error: BaseException | None = None

    def fingerprint(self) -> str:
        """sha256 of the address and the start time, because a live stream cannot be read again."""
        return hashlib.sha256(f"{self.name}\0{self._started_s!r}".encode()).hexdigest()

    def stop(self) -> None:
        """End `frames`; may be called from another thread or a signal handler."""
        self._ended = True

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames as they arrive, until `stop` is called or the duration is over.

        Raises:
            FootageError: the camera cannot be reached, or sends no video.
        """
        del start  # a live stream cannot be read again
        reader = threading.Thread(target=self._read, name=f"live {self.camera}", daemon=True)
        reader.start()
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._is_over or self._error):
                        self._changed.wait(0.2)  # woken by frames; `stop` may come from a signal, which cannot notify
                    if self._is_over:
                        return
                    if not self._waiting:
                        raise self._error  # type: ignore[misc]  # otherwise the loop above would not have ended
                    frame = self._waiting.popleft()
                yield frame
        finally:
            self._ended = True
            reader.join(sum(RTSP_TIMEOUT_S))

    @property
    def _is_over(self) -> bool:
        return self._ended or time.monotonic() >= self._until_s

    def _read(self) -> None:
        """Read the stream, and reconnect if the connection breaks."""
        failures, connected = 0, False
        while not self._ended:
            try:
                if self._read_connection():
                    failures, connected = 0, True
                problem = "the stream ended"
            except FootageError as error:
                if not connected and failures + 1 >= len(RECONNECT_DELAYS_S):
                    self._fail(error)
                    return
                problem = str(error)
            except Exception as error:  # otherwise the thread would end silently
                self._fail(error)
                return
            pause_s = RECONNECT_DELAYS_S[min(failures, len(RECONNECT_DELAYS_S) - 1)]
            failures += 1
            log.warning("%s: %s; reconnecting in %.0f s", self.name, problem, pause_s)
            until_s = time.monotonic() + pause_s
            while not self._ended and time.monotonic() < until_s:
                time.sleep(0.1)

    def _read_connection(self) -> bool:
        """Read until the connection breaks; returns whether there was a frame."""
        container, stream, self._hwaccel = open_video(
            self._url, label=self.name, hwaccel=self._hwaccel, options=RTSP_OPTIONS, timeout_s=RTSP_TIMEOUT_S
        )
        before, received = self.unreadable, False
        with container:
            decoder = VideoDecoder(container, stream)
            for frame in decoder.frames():
                if self._ended:
                    break
                received, now_s = True, time.time()
                self.unreadable = before + decoder.unreadable
                tick = grid_index(now_s - self._started_s, self.fps)
                if tick > self._last:
                    self._last = tick
                    self._offer(Frame(frame_pixels(frame), FramePosition(tick, tick), now_s))
        return received

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
        FootageError: the URL is invalid or has no host.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FootageError(f"invalid address ({error}): expected rtsp://HOST/PATH") from error
    if not host:
        raise FootageError("address without a host: expected rtsp://HOST/PATH")
    bracketed = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{bracketed}{f':{port}' if port else ''}{parts.path}"
