"""The data folder: its lock, ``server.json``, free disk space, its secret key, and the swap of a restored database.

``lock`` is held with flock, so the kernel releases it however the holder dies; ``server.json`` exists while the server
is ready. Writes are refused before the disk is full, because a deletion is written to the log first and needs space
itself.

Names that must be recognised after an erasure are stored as hashes keyed with the folder's secret key, so that a name
cannot be looked up in the audit log or the erase list without that key. The key is a file beside the database. Back it
up separately from the snapshots: without it an erase list cannot be replayed, and a restore refuses.

An interrupted swap is finished by the next start: until the marker is written the old database is valid, afterwards the
new one. The old database's log must be removed before the new file is in place, or SQLite would apply it to the new
one; a crash between the two steps leaves a database without its log, so a start must call `finish_swap` before it opens
the database.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from resight.errors import DiskWatermarkError, InputError, StartupError, StorageFullError, StoreError
from resight.files import sync, write_atomic
from resight.locks import LockHeldError, hold_lock
from resight.service.records import DEFAULT_TENANT

DATABASE_FILE = "gallery.sqlite3"
LOCK_FILE = "lock"
SERVER_FILE = "server.json"
TENANTS_FOLDER = "tenants"
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class DataFolder:
    """Context manager that holds the folder's lock.

    Raises:
        StartupError: the folder cannot be created or written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # features of people: for the owner only
            self._lock = hold_lock(path / LOCK_FILE, str(os.getpid()))
        except LockHeldError as error:
            holder = error.holder or "unknown"
            raise StartupError(
                f"data folder {path} is held by process {holder}: stop that server or choose another --data",
                holder=holder,
            ) from error
        except OSError as error:
            raise StartupError(
                f"data folder {path} cannot be written: {error.strerror}: choose another with --data"
            ) from error

    def announce(self, address: str, space_id: str, metrics_url: str = "") -> None:
        """Write ``server.json`` atomically: the server is ready at this address."""
        body = {"address": address, "pid": os.getpid(), "space_id": space_id}
        text = json.dumps({**body, "metrics": metrics_url} if metrics_url else body)
        temporary = self.path / f"{SERVER_FILE}.tmp"
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.path / SERVER_FILE)
        except OSError as error:
            raise StorageFullError(f"{self.path / SERVER_FILE} cannot be written: {error.strerror}") from error

    def withdraw(self) -> None:
        """Remove ``server.json`` when the server stops, or when a killed server left it behind."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / SERVER_FILE).unlink()

    def __enter__(self) -> Self:
        self.withdraw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()
        self._lock.release()


def tenant_folder(data: Path, name: str) -> Path:
    """The folder of a tenant's database; the default tenant's is the data folder itself.

    Raises:
        InputError: not a valid tenant name.
    """
    if not TENANT_NAME.fullmatch(name):
        raise InputError(f"a tenant's name is 1-63 of a-z 0-9 . _ -, a letter or digit first; found {name!r}")
    return data if name == DEFAULT_TENANT else data / TENANTS_FOLDER / name


def disk_bytes(folder: Path) -> int:
    """Bytes on disk of a tenant's database and index files, without its snapshots and other tenants' folders."""
    files = [*folder.glob(f"{DATABASE_FILE}*"), *folder.glob("index/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


log = logging.getLogger(__name__)

RELEASE_POINTS = 5.0  # percentage points above the mark before writes resume, so that they do not flap (as Qdrant)
RELEASE_FACTOR = 2.0  # likewise for the mark in bytes, which may be a thousandth of a large disk
DISK_CHECK_EVERY_S = 0.2  # statvfs costs microseconds, but not every one of a thousand writes a second needs it


class DiskRoom(NamedTuple):
    """Bytes of a disk: available to this process, and in total."""

    free: int
    total: int


def disk_room(folder: Path) -> DiskRoom:
    """The free and total bytes of the disk that holds a folder."""
    found = os.statvfs(folder)
    return DiskRoom(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class DiskWatermark:
    """Refuses writes while the disk has less free space than either mark, until it has clearly more than both.

    Thread-safe. Free pages inside the database file count as free space: SQLite reuses them before the file grows.

    Args:
        folder: on the disk.
        low_bytes: free bytes; 0 = no such mark.
        low_percent: free share of the disk, 0..100; 0 = no such mark.
    """

    def __init__(self, folder: Path, *, low_bytes: int, low_percent: float) -> None:
        self._folder, self._low_bytes, self._low_percent = folder, low_bytes, low_percent
        self._lock = threading.Lock()
        self._measured_at = float("-inf")
        self._low = False
        self.reusable_bytes = 0  # of free pages inside the database file, as last reported by the writer

    @property
    def is_low(self) -> bool:
        """Whether writes are refused now."""
        with self._lock:
            now = time.monotonic()
            if now - self._measured_at >= DISK_CHECK_EVERY_S:
                self._measured_at = now
                self._measure()
            return self._low

    def _room(self) -> DiskRoom:
        free, total = disk_room(self._folder)
        return DiskRoom(free + self.reusable_bytes, total)

    def _measure(self) -> None:
        free, total = self._room()
        percent = 100.0 * free / max(1, total)
        bytes_mark, percent_mark = float(self._low_bytes), self._low_percent
        if self._low:
            bytes_mark *= RELEASE_FACTOR
            percent_mark += RELEASE_POINTS if percent_mark else 0.0
        low = free < bytes_mark or percent < percent_mark
        if low != self._low:
            change = "is low: writes are refused" if low else "is sufficient again: writes are accepted"
            log.warning("free disk space %s free_bytes=%d free_percent=%.1f", change, free, percent)
        self._low = low

    def check(self) -> None:
        """Refuse a write.

        Raises:
            DiskWatermarkError: too little free disk space.
        """
        if self.is_low:
            free, total = self._room()
            raise DiskWatermarkError(
                f"the data folder's disk has {free} of {total} bytes free, writes need {self._low_bytes} and "
                f"{self._low_percent:g} %: free disk space or delete entries; reads still work",
                free_bytes=free,
                total_bytes=total,
            )


KEY_FILE = "secret.key"
KEY_BYTES = 32
HASH_HEX = 32  # hexadecimal digits = 128 bits: collisions between names of one site are negligible


def load_key(folder: Path) -> bytes:
    """The secret key of a data folder; created when there is none.

    Raises:
        StoreError: the file is not a valid key.
        StorageFullError: a new key cannot be written.
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
            raise StorageFullError(f"{KEY_FILE} cannot be written: {error.strerror}: free disk space") from error
    if len(key) != KEY_BYTES:
        raise StoreError(f"{KEY_FILE} has {len(key)} bytes, expected {KEY_BYTES}: restore it from a backup")
    return key


def keyed_hash(key: bytes, name: str) -> str:
    """A name's keyed hash: HMAC-SHA256 truncated to `HASH_HEX` hexadecimal digits."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:HASH_HEX]


def register_keyed_hash(connection: sqlite3.Connection, key: bytes) -> None:
    """Register the SQL function ``keyed(name)``, which computes `keyed_hash`, on this connection."""
    connection.create_function("keyed", 1, lambda name: keyed_hash(key, name), deterministic=True)


PREPARED_FILE = "restored.sqlite3"
SWAP_MARKER = "restoring"
INDEX_FOLDER = "index"
SNAPSHOTS_FOLDER = "snapshots"
LOG_SUFFIXES = ("-wal", "-shm", "-journal")


def swap_database(folder: Path) -> None:
    """Replace the database in use by the prepared one, which must be complete and flushed to disk.

    Raises:
        StorageFullError: the folder cannot be written; the old database stays valid, or the next start finishes the
            swap.
    """
    try:
        write_atomic(folder / SWAP_MARKER, b"")
    except OSError as error:
        raise StorageFullError(f"a restore cannot be started: {error.strerror}: free disk space") from error
    finish_swap(folder)


def finish_swap(folder: Path) -> None:
    """Finish a swap that was started, or remove a database and snapshots that were only partly prepared.

    Does nothing when there is neither.

    Raises:
        StorageFullError: the folder cannot be written.
    """
    database, ready = folder / DATABASE_FILE, folder / PREPARED_FILE
    try:
        _settle_snapshots(folder / SNAPSHOTS_FOLDER)
        if not (folder / SWAP_MARKER).exists():
            remove_database(ready)
            return
        if ready.exists():
            for suffix in LOG_SUFFIXES:
                _with_suffix(database, suffix).unlink(missing_ok=True)
            ready.replace(database)
        shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)  # of the old database; it will be rebuilt
        sync(folder)
        (folder / SWAP_MARKER).unlink()
        sync(folder)
    except OSError as error:
        raise StorageFullError(f"a restore cannot be finished: {error.strerror}: make {folder} writable") from error
    log.info("a restored database replaced the old one in %s", folder.name)


def _settle_snapshots(folder: Path) -> None:
    """Restore a snapshot that was moved aside and not yet replaced; remove all other leftovers of a crash."""
    for remnant in folder.glob(".*"):
        final = folder / remnant.name.removeprefix(".").removesuffix(".old")
        if remnant.name.endswith(".old") and not final.exists():  # see resight.files.replace_folder
            remnant.rename(final)
        else:
            shutil.rmtree(remnant)


def remove_database(database: Path) -> None:
    """Remove a database file and SQLite's files beside it; missing files are no error."""
    for suffix in ("", *LOG_SUFFIXES):
        _with_suffix(database, suffix).unlink(missing_ok=True)


def _with_suffix(database: Path, suffix: str) -> Path:
    return database.with_name(database.name + suffix)
