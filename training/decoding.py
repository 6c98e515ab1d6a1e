"""PyAV (FFmpeg's libraries) as footage needs it: bounded, with a hardware decoder where there is one, never silent.

Other files or machines than the one named are out of reach: lists of segments, which could name them (HLS, concat),
are no format here, and only the protocols given are spoken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import av
import numpy as np
from av.codec.hwaccel import HWAccel, hwdevices_available

from resight.errors import FootageError
from resight.image import MIN_SIDE, Pixels
from resight.training.footage import MAX_PIXELS, VIDEOS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

# Those of FFmpeg's demuxers whose frames carry time stamps: raw H.264 would be read as 25 frames a second.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
SOFTWARE = "none"


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
    devices = [] if hwaccel == SOFTWARE else hwdevices_available() if hwaccel == "auto" else [hwaccel]
    if hwaccel not in (SOFTWARE, "auto") and hwaccel not in hwdevices_available():
        raise FootageError(
            f"--hwaccel {hwaccel}: expected auto, none, or what this build of FFmpeg knows: "
            f"{', '.join(hwdevices_available())}",
            field="hwaccel",
        )
    for device in [*devices, SOFTWARE]:
        accel = None if device == SOFTWARE else HWAccel(device, allow_software_fallback=False)
        container: InputContainer | None = None
        try:
            container = av.open(name, options=dict(options), timeout=timeout_s, hwaccel=accel)
            stream = _video_of(container, shown)
        except (av.FFmpegError, NotImplementedError, RuntimeError) as error:
            if container is not None:
                container.close()
            if accel is None:
                raise FootageError(f"{shown} cannot be read as video ({_told(error)}): expected {VIDEOS}") from error
            log.debug("%s: no decoding by %s (%s)", shown, device, _told(error))
            continue
        except BaseException:
            if container is not None:
                container.close()
            raise
        if accel is not None:
            log.info("%s: decoded by %s", shown, device)
        elif hwaccel not in (SOFTWARE, "auto"):
            log.warning("%s: %s cannot decode it here, decoded in software", shown, hwaccel)
        return container, stream, device
    raise AssertionError  # the last of the list is software, which returns or raises


def _video_of(container: InputContainer, shown: str) -> VideoStream:
    """The first video stream, within the budget; reading its first packet starts the decoder."""
    if not container.streams.video:
        raise FootageError(f"{shown} holds no video: expected {VIDEOS}")
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


class Decoder:
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
                self.broken = _told(error)
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


def pixels_of(frame: VideoFrame) -> Pixels:
    """uint8 (H, W, 3) RGB, upright: phones write how they were held beside the picture."""
    image = frame.to_ndarray(format="rgb24")
    turned = np.rot90(image, round(frame.rotation / 90) % 4)
    return np.ascontiguousarray(turned, np.uint8)


def _told(error: BaseException) -> str:
    """FFmpeg's words without the errno and the file's name around them."""
    return str(getattr(error, "strerror", None) or error)
