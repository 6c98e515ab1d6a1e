"""A limit on time without progress, for long tests: a slow machine passes, a hang fails."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resight.files import files_below

STALL_S = 600.0  # an epoch of the largest test takes under 20 s on two idle cores
LOOK_S = 2.0


class StalledError(AssertionError):
    """Nothing was written for too long."""


@contextmanager
def progress_expected(folder: Path, stall_s: float = STALL_S, interval_s: float = LOOK_S) -> Iterator[None]:
    """Raise `StalledError` in the main thread when no file below a folder was made or changed for so many seconds.

    Args:
        folder: what the test and its processes write to.
        stall_s: seconds of the monotonic clock.
        interval_s: seconds between two checks of the folder, at most a quarter of ``stall_s``.
    """
    ended = threading.Event()

    def stop(number: int, frame: object) -> None:
        raise StalledError(f"nothing below {folder} changed for {stall_s:g} s")

    def watch() -> None:
        seen, changed = _state(folder), time.monotonic()
        while not ended.wait(min(interval_s, stall_s / 4)):
            now = _state(folder)
            if now != seen:
                seen, changed = now, time.monotonic()
            elif time.monotonic() - changed > stall_s:
                faulthandler.dump_traceback(sys.__stderr__)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    before = signal.signal(signal.SIGUSR2, stop)
    watcher = threading.Thread(target=watch, name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)


def _state(folder: Path) -> tuple[int, int, int]:
    """Number of files, their total bytes and the newest change."""
    count = size = newest = 0
    for path in files_below(folder):
        try:
            status = path.stat()
        except OSError:
            continue  # removed in the meantime
        count, size, newest = count + 1, size + status.st_size, max(newest, status.st_mtime_ns)
    return count, size, newest
