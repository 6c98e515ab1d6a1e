"""The process of one stage: started on a leash, ended when its time is up, and never left behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from resight.cycle.layout import RunFolder
from resight.cycle.leash import VARIABLE

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at a stage
GRACE_S = 10.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended.

    Attributes:
        status: of the process; negative = the signal that ended it.
        interrupted: it was ended by the cycle, for time or because that shall stop.
        error: why it failed.
        passing: another try may help.
    """

    status: int
    interrupted: bool = False
    error: str = ""
    passing: bool = False


def stage_command(stage: str, site_file: Path, number: int, *, idle_io: bool) -> list[str]:
    """What does a stage of a run; through ``ionice``, where that is asked for and there."""
    command = [sys.executable, "-m", "resight.cycle.stage", stage, str(site_file), str(number)]
    ionice = shutil.which("ionice") if idle_io else None
    return [ionice, "-c", "3", *command] if ionice else command


def run_stage(
    command: Sequence[str],
    stage: str,
    folder: RunFolder,
    *,
    deadline: float | None,
    stop: Event,
    began: Callable[[int], object],
) -> Ended:
    """Run one stage to its end.

    Args:
        command: that does it; see `stage_command`.
        stage: its name.
        folder: of the run.
        deadline: of `time.monotonic`, at which it is ended; None = none.
        stop: ends it when set.
        began: is told the process's id.
    """
    file = folder.log(stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    try:
        with file.open("ab") as log_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=os.environ | {VARIABLE: str(reading), "COLUMNS": "160", "NO_COLOR": "1"},
                pass_fds=(reading,),
                start_new_session=True,
            )
        os.close(reading)
        reading = -1
        try:
            began(process.pid)
            interrupted = _wait(process, deadline, stop)
        finally:
            _end(process)
    finally:
        if reading >= 0:
            os.close(reading)
        os.close(writing)
    return _told(process.returncode, interrupted, folder, stage)


def _wait(process: subprocess.Popen[bytes], deadline: float | None, stop: Event) -> bool:
    """Until it ended (False), or is to be ended (True); it is not reaped, so that its group keeps its number."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if stop.is_set() or (deadline is not None and time.monotonic() >= deadline):
            return True
        stop.wait(LOOK_S)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started: all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(LOOK_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _told(status: int, interrupted: bool, folder: RunFolder, stage: str) -> Ended:
    """The status in words: what the stage wrote, or which signal ended it."""
    if interrupted or status == 0:
        return Ended(status, interrupted)
    with suppress(FileNotFoundError, ValueError, KeyError):
        told = json.loads(folder.error(stage).read_text())
        return Ended(status, False, str(told["message"]), bool(told["passing"]))
    if status < 0:  # out of memory, or somebody's hand: may not happen again
        return Ended(status, False, f"ended by {signal.Signals(-status).name}: see {folder.log(stage)}", True)
    return Ended(status, False, f"ended with status {status}: see {folder.log(stage)}")
