"""Lock files between processes, held with flock by the `filelock` library.

The kernel frees such a lock however its holder dies, and a child process does not inherit it.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

OWNER_ONLY = 0o600  # permission bits of a lock file in a folder with data of people
HOLDER_BYTES = 200  # read of a lock file: more than any description of a holder


class LockHeldError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: what that process wrote into the lock file; empty when it has just started.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def hold_lock(path: Path, description: str, *, wait_s: float = 0.0) -> FileLock:
    """Take a lock and write who holds it into its file, for those who find it taken.

    Args:
        path: of the lock file; its folder exists.
        description: of this process, one line.
        wait_s: how long to wait for the lock.

    Returns:
        The lock, to be released from any thread.

    Raises:
        LockHeldError: another process holds it.
        OSError: the file cannot be created or written.
    """
    lock = FileLock(path, timeout=wait_s, mode=OWNER_ONLY, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockHeldError(_read_holder(path)) from error
    try:
        with path.open("r+") as file:
            file.truncate()
            file.write(description + "\n")
    except BaseException:
        lock.release()
        raise
    return lock


def lock_holder(path: Path) -> str | None:
    """Description of the process that holds a lock; None = it is free, or nobody has used it yet.

    Raises:
        OSError: the file cannot be opened.
    """
    if not path.exists():
        return None
    lock = FileLock(path, timeout=0, mode=OWNER_ONLY)
    try:
        lock.acquire()
    except Timeout:
        return _read_holder(path)
    lock.release()
    return None


def _read_holder(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(HOLDER_BYTES).decode(errors="replace").strip()
