"""Reading files that are hostile until verified: regular, of limited size, of the SHA-256 that was stated."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, NoReturn

from resight.errors import BundleError

_CHUNK = 1024 * 1024


def read_verified(path: Path, sha256: str, limit: int) -> bytes:
    """The bytes of a file, when they are the stated ones; hashed as read, so what was checked is what is used.

    Raises:
        BundleError: missing, a link or no regular file, over ``limit`` bytes, or altered.
    """
    data = read_plain(path, limit)
    if hashlib.sha256(data).hexdigest() != sha256:
        _refuse_altered(path)
    return data


def check_digest(path: Path, sha256: str, limit: int) -> None:
    """Hash a large file piece by piece.

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
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises:
        BundleError: missing, a link or no regular file, or too large.
    """
    with _open_plain(path, limit) as file:
        return file.read(limit + 1)


def _open_plain(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of limited size; links, devices and pipes are refused, not followed."""
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
            f"{stat.filemode(status.st_mode)} of {status.st_size} bytes: export the bundle anew"
        )
    return os.fdopen(descriptor, "rb")


def _refuse_altered(path: Path) -> NoReturn:
    raise BundleError(
        f"{path.name} in {path.parent} is not the file that was exported (its SHA-256 differs from the manifest's): "
        "copy the bundle again or export it anew"
    )
