"""The watchdog of long tests: it recognises progress, and reports a stall only after its time."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from watchdog import StalledError, progress_expected


def test_a_slow_test_that_writes_continues(tmp_path: Path) -> None:
    with progress_expected(tmp_path, 0.5):
        for step in range(6):
            time.sleep(0.2)
            (tmp_path / "steps").write_text(str(step))


def test_a_stalled_test_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(StalledError, match=r"nothing below .* changed for 0.2 s"), progress_expected(tmp_path, 0.2):
        time.sleep(20)
    assert signal.getsignal(signal.SIGUSR2) is before
    assert "Current thread" in capfd.readouterr().err


def test_folders_that_are_removed_while_it_looks_are_no_error(tmp_path: Path) -> None:
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / "run" / str(number)).mkdir(parents=True)
                (tmp_path / "run" / str(number) / "crop").write_text("crop")
            shutil.rmtree(tmp_path / "run")

    writer = threading.Thread(target=churn)
    writer.start()
    try:  # an exception of the watchdog's thread fails the test
        with progress_expected(tmp_path, 0.5, interval_s=0.001):
            time.sleep(1.0)
    finally:
        ended.set()
        writer.join()
