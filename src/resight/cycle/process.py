"""The process of one stage: the cycle starts it, terminates it at the deadline, and never leaves it behind.

A stage runs as `python -m resight cycle stage NAME SITE_TOML RUN`. It takes `stage.lock`, which waits for the stage of
a killed cycle to disappear, writes its outcome as its last act, and exits with 0; or writes the error, and exits with
1.

A stage ends when its cycle ends, even by SIGKILL: the cycle holds the writing end of a pipe and writes nothing to it;
the stage's process inherits the reading end. When the cycle is gone, the kernel closes the writing end: the stage
reads end-of-file and kills its own process group. No process id has to be stored or looked up.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from resight.cycle import stages
from resight.cycle.runs import CycleLock, RunDatabase
from resight.cycle.server import TRANSIENT_ERRORS
from resight.cycle.site import load_site
from resight.cycle.stages import StageContext
from resight.cycle.state_folder import RunFolder, StageOutcome, StateFolder, write_outcome
from resight.files import write_atomic

PARENT_PIPE_VARIABLE = "RESIGHT_CYCLE_LEASH"  # number of the reading end, for the stage's process


def watch_parent() -> None:
    """In a stage's process: end it when the cycle that started it ends; does nothing when no cycle started it.

    The process must lead its own process group, because the whole group is killed.
    """
    number = os.environ.pop(PARENT_PIPE_VARIABLE, "")  # not passed on: children are in the same group
    if not number:
        return
    descriptor = int(number)
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_kill_group_with_parent, args=(descriptor,), name="parent-watch", daemon=True).start()


def _kill_group_with_parent(descriptor: int) -> None:
    while True:
        try:
            if not os.read(descriptor, 1):
                os.killpg(os.getpgrp(), signal.SIGKILL)
        except InterruptedError:
            continue


log = logging.getLogger(__name__)

POLL_S = 0.1  # between two checks of a running stage
TERMINATE_GRACE_S = 10.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class StageExit:
    """How a stage's process ended.

    Attributes:
        status: of the process; negative = the signal that ended it.
        interrupted: the cycle terminated it, at its deadline or because it was stopped.
        error: why it failed.
        transient: a retry may succeed.
    """

    status: int
    interrupted: bool = False
    error: str = ""
    transient: bool = False


def stage_command(stage: str, site_file: Path, number: int, *, idle_io: bool) -> list[str]:
    """The command line that runs one stage; through ``ionice`` if `idle_io` is set and it is installed."""
    command = [sys.executable, "-m", "resight", "cycle", "stage", stage, str(site_file), str(number)]
    ionice = shutil.which("ionice") if idle_io else None
    return [ionice, "-c", "3", *command] if ionice else command


def run_stage(
    command: Sequence[str],
    stage: str,
    folder: RunFolder,
    *,
    deadline: float | None,
    stop: Event,
    on_start: Callable[[int], object],
) -> StageExit:
    """Run one stage to its end.

    Args:
        command: command line of the stage; see `stage_command`.
        stage: its name.
        folder: of the run.
        deadline: by `time.monotonic`, when the stage is terminated; None = no deadline.
        stop: terminates the stage when set.
        on_start: called with the process id.
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
                env=os.environ | {PARENT_PIPE_VARIABLE: str(reading), "COLUMNS": "160", "NO_COLOR": "1"},
                pass_fds=(reading,),
                start_new_session=True,
            )
        os.close(reading)
        reading = -1
        try:
            on_start(process.pid)
            interrupted = _wait_for_exit(process, deadline, stop)
        finally:
            _terminate(process)
    finally:
        if reading >= 0:
            os.close(reading)
        os.close(writing)
    return _stage_exit(process.returncode, interrupted, folder, stage)


def _wait_for_exit(process: subprocess.Popen[bytes], deadline: float | None, stop: Event) -> bool:
    """Wait until it exits (False) or has to be terminated (True); it is not reaped, which keeps its group id valid."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if stop.is_set() or (deadline is not None and time.monotonic() >= deadline):
            return True
        stop.wait(POLL_S)
    return False


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process and all of its children: the whole group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_GRACE_S
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stage_exit(status: int, interrupted: bool, folder: RunFolder, stage: str) -> StageExit:
    """The exit with its error: the one the stage wrote, or the signal that killed it."""
    if interrupted or status == 0:
        return StageExit(status, interrupted)
    with suppress(FileNotFoundError, ValueError, KeyError):
        error = json.loads(folder.error(stage).read_text())
        return StageExit(status, False, str(error["message"]), bool(error["passing"]))
    if status < 0:  # out of memory, or killed by hand: may not happen again
        return StageExit(status, False, f"killed by {signal.Signals(-status).name}: see {folder.log(stage)}", True)
    return StageExit(status, False, f"exited with status {status}: see {folder.log(stage)}")


STAGE_FUNCTIONS: dict[str, Callable[[StageContext], StageOutcome]] = {
    "ingest": stages.ingest,
    "collect": stages.collect,
    "adapt": stages.adapt,
    "judge": stages.judge,
    "export": stages.export,
    "backfill": stages.backfill,
    "shadow": stages.shadow,
    "promote": stages.promote,
    "watch": stages.watch,
}
ORPHAN_WAIT_S = 30.0  # for the kernel to end the stage of a killed cycle


def run_stage_process(name: str, file: Path, number: int, *, run_command: Callable[[list[str]], int | None]) -> int:
    """Run one stage in this process and write its outcome or its error.

    Args:
        name: of the stage.
        file: of the site.
        number: of the run.
        run_command: runs a command line of `resight` in this process; returns its exit status.

    Returns:
        The exit status of the process.
    """
    watch_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    site = load_site(file)
    os.nice(site.schedule.nice)
    layout = StateFolder(site.state)
    folder = layout.run(number)
    folder.error(name).unlink(missing_ok=True)
    with CycleLock(layout.stage_lock, f"the stage of site {site.name}", wait_s=ORPHAN_WAIT_S):
        try:
            with RunDatabase(layout.database) as runs:
                since_s = runs.since_s()
            outcome = STAGE_FUNCTIONS[name](StageContext(site, number, since_s, run_command))
        except Exception as error:
            log.exception("stage %s of run %d failed", name, number)
            record = {
                "error": type(error).__name__,
                "message": str(error),
                "passing": isinstance(error, TRANSIENT_ERRORS),
            }
            folder.error(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.error(name), json.dumps(record).encode())
            return 1
        write_outcome(folder.result(name), outcome)
    return 0
