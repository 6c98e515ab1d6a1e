"""One process at a time; a lock ends with its holder and is not inherited by children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resight.cycle.runs import CycleLock
from resight.errors import CycleBusyError
from resight.locks import lock_holder

HOLD = """
import subprocess, sys, time
from pathlib import Path
from resight.cycle.runs import CycleLock
with CycleLock(Path(sys.argv[1]), "site lobby"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_the_error_names_the_lock_holder_and_a_kill_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "state" / "cycle.lock"
    assert lock_holder(path) is None
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        with pytest.raises(CycleBusyError, match=rf"site lobby is held by process {other.pid} since 20\d\d-") as caught:
            CycleLock(path, "site lobby")
        assert caught.value.facts["holder"] == str(other.pid)
        assert str(lock_holder(path)).startswith(f"process {other.pid} since ")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with CycleLock(path, "site lobby"):  # although the child still runs
            os.kill(child, 0)
            assert str(lock_holder(path)).startswith(f"process {os.getpid()} since ")
        assert lock_holder(path) is None
    finally:
        os.kill(child, signal.SIGKILL)
        other.stdout.close()


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "stage.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    began = time.monotonic()
    with pytest.raises(CycleBusyError):
        CycleLock(path, "the stage", wait_s=0.2)
    assert time.monotonic() - began >= 0.2
    other.kill()
    with CycleLock(path, "the stage", wait_s=30):
        pass
    other.wait()
    other.stdout.close()
    os.kill(child, signal.SIGKILL)
