"""Atomic writes of files and folders, and reading of untrusted files.

A reader finds either the old file or folder or the new one, never an incomplete one. An untrusted file is read only if
it is a regular file of limited size with the expected SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from resight.errors import BundleError


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a file under a temporary name next to it, flush it to the disk and rename it into place.

    Args:
        path: the file to write or replace.
        data: its bytes.
        mode: permission bits; None = as from a plain ``open``.

    Raises:
        OSError: writing failed; an existing file at ``path`` is unchanged.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temp = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.chmod(0o666 & ~_umask() if mode is None else mode)  # mkstemp makes it private; a plain open() would not
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the rename itself


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A new folder next to ``final`` to build its content in; what remains of it is removed at the end."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private; a service under another user must read it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, final: Path) -> None:
    """Flush every file below ``folder`` to the disk and rename it to ``final``, on the same file system.

    An existing folder ``final`` is first renamed and removed last, so that a crash at any point leaves either the old
    or the new one complete (a crash between the two renames leaves the old one under its hidden name ``.NAME.old``).

    Raises:
        OSError: renaming failed; the old folder is restored.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        folder.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth below a folder, in no order; files removed meanwhile are skipped.

    `Path.rglob` raises FileNotFoundError when another process removes a sub-folder meanwhile.
    """
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _umask() -> int:
    """The process's file mode mask; the only way to read it is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_CHUNK = 1024 * 1024


def read_verified(path: Path, sha256: str, limit: int) -> bytes:
    """Read a file and verify its SHA-256; the returned bytes are the ones that were hashed.

    Raises:
        BundleError: missing, a link, not a regular file, over ``limit`` bytes, or altered.
    """
    data = read_plain(path, limit)
    if hashlib.sha256(data).hexdigest() != sha256:
        _refuse_altered(path)
    return data


def check_digest(path: Path, sha256: str, limit: int) -> None:
    """Verify the SHA-256 of a large file, read in chunks.

    Raises:
        BundleError: as `read_verified`.
    """
    digest = hashlib.sha256()
    with _open_plain(path, limit) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        _refuse_altered(path)


def read_plain(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        BundleError: missing, a link, not a regular file, or too large.
    """
    with _open_plain(path, limit) as file:
        return file.read(limit + 1)


def _open_plain(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of limited size; links, devices and pipes are rejected."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise BundleError(f"{path.name} is missing from {path.parent}: copy the bundle again") from error
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise BundleError(
            f"{path.name} in {path.parent} {reason}, expected a readable regular file: copy it here"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        raise BundleError(
            f"{path.name} in {path.parent}: expected a regular file of at most {limit} bytes, found "
            f"{stat.filemode(status.st_mode)} of {status.st_size} bytes: export the bundle again"
        )
    return os.fdopen(descriptor, "rb")


def _refuse_altered(path: Path) -> NoReturn:
    raise BundleError(
        f"{path.name} in {path.parent} is not the file that was exported (its SHA-256 differs from the manifest's): "
        "copy the bundle again or export it again"
    )
