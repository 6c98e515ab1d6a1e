"""Files and folders that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        OSError: no room or no right to write; the old content stands.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _sync(path.parent)


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` to build its content in; whatever is left of it is removed at the end."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    folder.chmod(0o755)  # mkdtemp makes 0700, which a service under another user could not read
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``.

    The content is on disk before the first rename. A crash between the two renames leaves the old
    folder beside it under a name ending in ``.old``.

    Raises:
        OSError: no room or no right to write; the old folder stands.
    """
    for file in folder.rglob("*"):
        _sync(file)
    _sync(folder)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(folder, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
