"""All or nothing on disk: a reader finds the old file or folder or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to the disk and rename it into place.

    Raises:
        OSError: the disk refused; whatever stood at ``path`` is untouched.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temp = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.chmod(0o666 & ~_umask())  # mkstemp makes it private; a plain open() would not
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder beside ``final`` to fill; when the block ends well, it becomes ``final``.

    When the block raises, the temporary folder is removed and ``final`` is as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        temp.chmod(0o777 & ~_umask())
        yield temp
        replace_folder(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def replace_folder(temp: Path, final: Path) -> None:
    """Flush every file below ``temp`` to the disk and rename ``temp`` to ``final``, on the same file system.

    A folder already standing at ``final`` is first moved aside and removed last, so that a crash
    at any point leaves the old one or the new one whole (a crash between the two renames leaves the
    old one under its hidden name ``.NAME.old``).

    Raises:
        OSError: the disk refused; the old folder is put back.
    """
    for path in sorted(temp.rglob("*"), reverse=True):
        sync_folder(path) if path.is_dir() else _sync_file(path)
    sync_folder(temp)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        temp.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names: without it a rename may not survive a power cut."""
    _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask; the only way to read it is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
