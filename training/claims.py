"""Turns on a folder that several processes write to, and a full disk told as what it is."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resight.errors import StorageFullError, StoreError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Alone with what a lock file stands for; waits for the others, whose turns take a moment."""
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(path: Path, does: str) -> Iterator[None]:
    """Alone with work that takes long; the lock file goes when it is done.

    Args:
        path: of the lock file.
        does: what another process does that has it, for the message.

    Raises:
        StoreError: another process has it.
    """
    with _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process {does}: wait until it is done") from error
        yield
        path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A lock file's descriptor, which no child process inherits: the kernel frees the lock however this one ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def room(root: Path) -> Iterator[None]:
    """Tell a full disk as what it is.

    Raises:
        StorageFullError: instead of the system's, Arrow's or SQLite's own error.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) in DISK_FULL or "disk is full" in str(error):
            raise StorageFullError(
                f"no room left for {root} ({error}): what was committed stands; free some and run the same again"
            ) from error
        raise
