"""One cycle at a time: an flock that the kernel frees however its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from resight.errors import CycleBusyError

LOOK_S = 0.05  # between two tries of somebody who waits


class Lock:
    """Held between ``with`` and its end. Children do not inherit it, so it never outlives its process.

    Args:
        path: of the lock's file; its folder is made when missing.
        what: the lock guards, for the message.
        wait_s: how long to wait for it.

    Raises:
        CycleBusyError: another process holds it.
    """

    def __init__(self, path: Path, what: str, *, wait_s: float = 0.0) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # crops of people: for the owner only
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(LOOK_S)
                    continue
                told = os.pread(self._file, 200, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise CycleBusyError(
                    f"{what} is held by {told or 'a process that just began'}: wait for it, or look with "
                    "`resight cycle status`",
                    holder=told.partition(" since")[0].removeprefix("process "),
                ) from error
        told = f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
        os.truncate(self._file, 0)
        os.pwrite(self._file, told.encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def holder(path: Path) -> str | None:
    """Who holds a lock, in words; None = nobody."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 200, 0).decode(errors="replace").strip()
    finally:
        os.close(file)
    return None
