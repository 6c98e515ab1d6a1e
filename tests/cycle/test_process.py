"""Processes of a stage end with their cycle; and how the exit of a stage is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from resight.cycle import process
from resight.cycle.process import StageExit, run_stage
from resight.cycle.state_folder import RunFolder

pytestmark = pytest.mark.long

# A stage with a child process that optionally ignores SIGTERM and writes the ids of both.
STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from resight.cycle import process
process.watch_parent()
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
assert "RESIGHT_CYCLE_LEASH" not in os.environ
partial = Path(sys.argv[1] + ".partial")
partial.write_text(f"{os.getpid()} {child.pid}")
partial.rename(sys.argv[1])
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
reading, writing = os.pipe()
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], "deaf"], pass_fds=(reading,), start_new_session=True,
    env=os.environ | {"RESIGHT_CYCLE_LEASH": str(reading)}).wait()
"""


def pids(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(text) for text in path.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_ended(found: list[int], *, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(map(is_alive, found)):
        time.sleep(0.02)
    return not any(map(is_alive, found))


def test_the_stage_of_a_killed_cycle_ends_with_its_children(tmp_path: Path) -> None:
    cycle = subprocess.Popen([sys.executable, "-c", PARENT, STAGE, str(tmp_path / "pids")])
    found = pids(tmp_path / "pids")
    assert all(map(is_alive, found))
    os.kill(cycle.pid, signal.SIGKILL)
    cycle.wait()
    assert all_ended(found)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "000001")


def run(folder: RunFolder, code: str, *arguments: str, **more: Any) -> StageExit:
    """A stage with test code."""
    given: dict[str, Any] = {"deadline": None, "stop": Event(), "on_start": lambda pid: None} | more
    return run_stage([sys.executable, "-c", code, *arguments], "adapt", folder, **given)


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_a_stage_is_terminated_with_its_children_at_the_deadline(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    monkeypatch.setattr(process, "TERMINATE_GRACE_S", 0.3)
    started: list[int] = []
    deadline = time.monotonic() + 3
    ended = run(folder, STAGE, str(tmp_path / "pids"), manner, deadline=deadline, on_start=started.append)
    found = pids(tmp_path / "pids")
    assert ended.interrupted and started == found[:1] and all_ended(found)
    assert ended.status == -(signal.SIGKILL if manner == "deaf" else signal.SIGTERM)


def test_a_stop_terminates_a_stage(folder: RunFolder, tmp_path: Path) -> None:
    stop = Event()
    ended = run(folder, STAGE, str(tmp_path / "pids"), "polite", stop=stop, on_start=lambda pid: stop.set())
    assert ended.interrupted


def test_children_left_by_a_stage_end_with_it(folder: RunFolder) -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    assert run(folder, code) == StageExit(0)
    assert all_ended([int(folder.log("adapt").read_text())])


def test_the_error_comes_from_the_file_the_signal_or_the_status(folder: RunFolder) -> None:
    record = {"error": "UnavailableError", "message": "no server", "passing": True}
    folder.error("adapt").parent.mkdir(parents=True)
    folder.error("adapt").write_text(json.dumps(record))
    assert run(folder, "raise SystemExit(1)") == StageExit(1, error="no server", transient=True)
    folder.error("adapt").unlink()
    ended = run(folder, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.transient and "SIGKILL" in ended.error and str(folder.log("adapt")) in ended.error
    ended = run(folder, "raise SystemExit(3)")
    assert not ended.transient and "status 3" in ended.error
