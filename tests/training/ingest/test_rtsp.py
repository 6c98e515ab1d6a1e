"""A live camera over RTSP: this machine's clock, interruptions, a slow reader, stopping, and hidden passwords."""

from __future__ import annotations

import logging
import socket
import threading
import time

import numpy as np
import pytest
from rtsp import rtsp_camera
from walkers import HEIGHT, WIDTH, Walker, shots

from resight.errors import FootageError
from resight.training.ingest import video
from resight.training.ingest.sources import open_footage
from resight.training.ingest.video import RtspStream, without_credentials

pytestmark = pytest.mark.long

IMAGES = list(shots((Walker(0, 30, 10, 250),), 30))


def test_a_camera_is_read_for_the_requested_duration(caplog: pytest.LogCaptureFixture) -> None:
    with rtsp_camera(IMAGES) as camera, caplog.at_level(logging.DEBUG):
        url = camera.url("guard:s3cret@")
        stream = open_footage(url, camera="gate", fps=5, duration_s=2.0, hwaccel="none")
        assert "s3cret" not in stream.name and "guard" not in stream.name and stream.total == 10
        before = time.time()
        frames = list(stream.frames())
    assert 2 <= len(frames) <= 11
    assert all(before <= frame.time_s <= time.time() for frame in frames)
    numbers = [frame.position.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert frames[0].image.shape == (HEIGHT, WIDTH, 3)
    assert min(np.abs(frames[0].image.astype(int) - image).mean() for image in IMAGES) < 12
    assert camera.requests[:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"] and "s3cret" not in caplog.text


def test_a_broken_connection_is_retried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(video, "RECONNECT_DELAYS_S", (0.1, 0.2))
    with rtsp_camera(IMAGES, frames=8) as camera:
        stream = open_footage(camera.url(), camera="gate", fps=20, hwaccel="none")
        assert isinstance(stream, RtspStream)
        frames = []
        for frame in stream.frames():
            frames.append(frame)
            if camera.requests.count("PLAY") == 3:
                stream.stop()
    assert len(frames) >= 3 and "reconnecting in" in caplog.text
    numbers = [frame.position.number for frame in frames]
    assert numbers == sorted(set(numbers))


def test_a_slow_reader_gets_the_newest_frames_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "QUEUED_FRAMES", 2)
    with rtsp_camera(IMAGES) as camera:
        stream = RtspStream(camera.url(), "gate", 20, hwaccel="none")
        for number, frame in enumerate(stream.frames()):
            if number == 3:
                assert time.time() - frame.time_s < 1.0
                stream.stop()
            time.sleep(0.5)
    assert stream.left_out > 0


def test_stop_from_another_thread_ends_reading() -> None:
    with rtsp_camera(IMAGES) as camera:
        stream = RtspStream(camera.url(), "gate", 5, hwaccel="none")
        threading.Timer(0.5, stream.stop).start()
        list(stream.frames())
    assert "PLAY" in camera.requests or not camera.requests


def test_an_unreachable_camera_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "RECONNECT_DELAYS_S", (0.05, 0.05))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused
        url = f"rtsp://guard:s3cret@127.0.0.1:{taken.getsockname()[1]}/live"
        with pytest.raises(FootageError, match="cannot be read as video") as error:
            list(RtspStream(url, "gate", 5, hwaccel="none").frames())
    assert "s3cret" not in str(error.value)


def test_a_live_stream_uses_this_machines_clock_and_a_new_fingerprint() -> None:
    with pytest.raises(FootageError, match="omit --start"):
        open_footage("rtsp://10.0.0.7/live", camera="gate", fps=5, start_s=0.0)
    one, two = (RtspStream("rtsp://10.0.0.7/live", "gate", 5) for _ in range(2))
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("url, shown", [
    ("rtsp://u:p@h:554/a/b?token=x#y", "rtsp://h:554/a/b"), ("rtsps://[2001:db8::1]/s", "rtsps://[2001:db8::1]/s"),
])  # fmt: skip
def test_urls_in_messages_have_no_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
