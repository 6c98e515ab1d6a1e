"""The data folder's own key: names that must outlive an erasure are kept as keyed hashes of it.

Without the key nobody can try out whether a name is in the audit or the erase list. It stands beside the database and
not in it, so that a snapshot alone does not tell; back it up apart from the snapshots. Without it an erase list cannot
be replayed, so a restore refuses.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
from pathlib import Path

from resight.atomic import sync
from resight.errors import StorageFullError, StoreError

KEY_FILE = "secret.key"
KEY_BYTES = 32
HASH_HEX = 32  # 128 bits: no two names of a site share a hash


def load_key(folder: Path) -> bytes:
    """The key of a data folder; made when there is none.

    Raises:
        StoreError: the file is no key of ours.
        StorageFullError: a new one cannot be written.
    """
    path = folder / KEY_FILE
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = os.urandom(KEY_BYTES)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
            sync(folder)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageFullError(f"{KEY_FILE} cannot be written: {error.strerror}: make room on the disk") from error
    if len(key) != KEY_BYTES:
        raise StoreError(f"{KEY_FILE} has {len(key)} bytes, expected {KEY_BYTES}: restore it from a backup")
    return key


def keyed(key: bytes, name: str) -> str:
    """A name's keyed hash, 32 hexadecimal digits (HMAC-SHA256, cut)."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:HASH_HEX]


def register(connection: sqlite3.Connection, key: bytes) -> None:
    """Make ``keyed(name)`` a function of SQL on this connection."""
    connection.create_function("keyed", 1, lambda name: keyed(key, name), deterministic=True)
