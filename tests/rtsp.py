"""A camera on the network: a small RTSP server (RFC 2326) that plays a video over TCP in a loop."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import av
import numpy as np
from walkers import HEIGHT, WIDTH

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=walkers\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 96\r\na=rtpmap:96 MP4V-ES/90000\r\na=control:track1\r\n"
)


class RtspCamera:
    """Its port, the methods requested, and the number of frames after which a connection breaks."""

    def __init__(self, images: list[np.ndarray], fps: int, frames: int) -> None:
        self.images, self.fps, self.frames = images, fps, frames
        self.requests: list[str] = []
        self.port = 0

    def url(self, user: str = "") -> str:
        return f"rtsp://{user}127.0.0.1:{self.port}/live"

    def play(self, wire: socket.socket) -> None:
        """Send RTP packets made by FFmpeg, each prefixed with a dollar sign, channel 0 and its length."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
            inside.bind(("127.0.0.1", 0))
            inside.settimeout(0.05)
            url = f"rtp://127.0.0.1:{inside.getsockname()[1]}?pkt_size=1200"
            with av.open(url, "w", format="rtp") as container:
                stream = container.add_stream("mpeg4", rate=self.fps)
                stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
                stream.codec_context.gop_size = 5
                for _, image in zip(range(self.frames), cycle(self.images), strict=False):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
                    until = time.monotonic() + 1 / self.fps
                    while time.monotonic() < until:
                        with contextlib.suppress(TimeoutError):
                            packet = inside.recv(2048)
                            wire.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)


@contextmanager
def rtsp_camera(images: list[np.ndarray], *, fps: int = 20, frames: int = 10_000) -> Iterator[RtspCamera]:
    """A camera on a free port; a connection ends after ``frames`` frames."""
    camera = RtspCamera(images, fps, frames)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while request := self._request():
                    method, number = request
                    camera.requests.append(method)
                    more, body = "", ""
                    if method == "OPTIONS":
                        more = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
                    elif method == "DESCRIBE":
                        more, body = f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP
                    elif method == "SETUP":
                        more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 7\r\n"
                    self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{more}\r\n{body}".encode())
                    if method == "PLAY":
                        camera.play(self.request)
                        return

        def _request(self) -> tuple[str, str] | None:
            lines = []
            while line := self.rfile.readline(4096).strip():
                lines.append(line.decode())
            if not lines:
                return None
            return lines[0].split()[0], next(re.findall(r"\d+", line)[0] for line in lines if line.startswith("CSeq"))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        camera.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield camera
        server.shutdown()
        thread.join()
