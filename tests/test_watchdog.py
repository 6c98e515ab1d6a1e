"""The watchdog of long tests: it sees progress, and a standstill only after its time."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from watchdog import StalledError, progress_expected


def test_a_slow_test_that_writes_goes_on(tmp_path: Path) -> None:
    with progress_expected(tmp_path, 0.5):
        for step in range(6):
            time.sleep(0.2)
            (tmp_path / "steps").write_text(str(step))


def test_one_that_stands_still_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(StalledError, match=r"nothing below .* changed for 0.2 s"), progress_expected(tmp_path, 0.2):
        time.sleep(20)
    assert signal.getsignal(signal.SIGUSR2) is before
    assert "Current thread" in capfd.readouterr().err
