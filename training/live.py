"""A live stream (RTSP) as footage: by this machine's clock, with the newest frames, through interruptions."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from urllib.parse import urlsplit

from resight.errors import FootageError
from resight.training.decoding import Decoder, open_video, pixels_of
from resight.training.footage import START, Frame, Place, on_grid

log = logging.getLogger(__name__)

# TCP: over UDP one lost packet smears a second of picture, and most firewalls pass TCP only.
OPTIONS = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,tcp,tls,rtp,udp"}
WAIT_S = (10.0, 10.0)  # for a connection, and for the next packet; ours: cameras send 10 frames a second and more
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before each further try to connect; ours
QUEUED = 8  # frames that wait for a slow detector; the oldest give way


class LiveStream:
    """An RTSP camera. A thread keeps reading, since a stream that is not read is cut by its camera.

    Frames are stamped with the moment they arrive, at most ``fps`` a second; where the reader of `frames` is slower,
    the oldest that wait are left out and counted. A broken connection is made again, with growing pauses; one that
    never came about is an error.

    Args:
        url: with its credentials, which no message repeats.
        camera: whose it is.
        fps: frames a second to hand out at most.
        duration_s: how long it is watched; None = until `stop` is called.
        hwaccel: see `resight.training.decoding.open_video`.

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

    def frames(self, start: Place = START) -> Iterator[Frame]:
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
            reader.join(sum(WAIT_S))

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
                if not came and failures + 1 >= len(PAUSES_S):
                    self._fail(error)
                    return
                problem = str(error)
            except Exception as error:  # it would end this thread unseen
                self._fail(error)
                return
            pause_s = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
            failures += 1
            log.warning("%s: %s; connecting again in %.0f s", self.name, problem, pause_s)
            until_s = time.monotonic() + pause_s
            while not self._ended and time.monotonic() < until_s:
                time.sleep(0.1)

    def _read_connection(self) -> bool:
        """Read until the connection breaks; whether there was a frame."""
        container, stream, self._hwaccel = open_video(
            self._url, shown=self.name, hwaccel=self._hwaccel, options=OPTIONS, timeout_s=WAIT_S
        )
        before, came = self.unreadable, False
        with container:
            decoder = Decoder(container, stream)
            for frame in decoder.frames():
                if self._ended:
                    break
                came, now_s = True, time.time()
                self.unreadable = before + decoder.unreadable
                moment = on_grid(now_s - self._began_s, self.fps)
                if moment > self._last:
                    self._last = moment
                    self._offer(Frame(pixels_of(frame), Place(moment, moment), now_s))
        return came

    def _offer(self, frame: Frame) -> None:
        with self._changed:
            if len(self._waiting) == QUEUED:
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
