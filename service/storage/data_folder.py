"""The data folder: its lock, its address file, disk space, its key, and the swap of a restored database.

``lock`` is held with flock, so the kernel frees it however the holder dies; ``server.json`` exists while the server is
ready. Writes are refused before the disk is full, since a deletion is written to the log first and needs room itself.

Names that must outlive an erasure are kept as hashes keyed with the folder's own key, so that nobody without it can
test whether a name is in the audit or the erase list. The key is beside the database and not in it; back it up apart
from the snapshots: without it an erase list cannot be replayed, so a restore refuses.

A swap is finished by every start: before the marker is written the old database counts, after it the new one. The old
one's log must be removed before the new file is in place, or SQLite would read the new one through it; between the two
a crash leaves a database without its log, which is why a start must not open it before `finish_swap` ran.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from resight.service.records import DEFAULT_TENANT

DATABASE_FILE = "gallery.sqlite3"
LOCK_FILE = "lock"
SERVER_FILE = "server.json"
TENANTS_FOLDER = "tenants"
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class DataFolder:
    """Holds the folder between ``with`` and its end.

    Raises:
        StartupError: the folder cannot be made or written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # features of people: for the owner only
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(
                f"data folder {path} cannot be written: {error.strerror}: choose another with --data"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise StartupError(
                f"data folder {path} is held by process {holder}: stop that server or choose another --data",
                holder=holder,
            ) from error
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def announce(self, address: str, space_id: str, metrics_url: str = "") -> None:
        """Tell that the server is ready, and where: one atomic write of ``server.json``."""
        told = {"address": address, "pid": os.getpid(), "space_id": space_id}
        text = json.dumps({**told, "metrics": metrics_url} if metrics_url else told)
        temporary = self.path / f"{SERVER_FILE}.tmp"
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.path / SERVER_FILE)
        except OSError as error:
            raise StorageFullError(f"{self.path / SERVER_FILE} cannot be written: {error.strerror}") from error

    def withdraw(self) -> None:
        """Take ``server.json`` away: stopping, or a remnant of a server that was killed."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / SERVER_FILE).unlink()

    def __enter__(self) -> Self:
        self.withdraw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()
        os.close(self._lock)


def tenant_folder(data: Path, name: str) -> Path:
    """Where a tenant's database stands: the default one's in the data folder itself.

    Raises:
        InputError: no name of a tenant.
    """
    if not TENANT_NAME.fullmatch(name):
        raise InputError(f"a tenant's name is 1-63 of a-z 0-9 . _ -, a letter or digit first; found {name!r}")
    return data if name == DEFAULT_TENANT else data / TENANTS_FOLDER / name


def disk_bytes(folder: Path) -> int:
    """What a tenant's files take on the disk, less its snapshots and the folders of other tenants."""
    files = [*folder.glob(f"{DATABASE_FILE}*"), *folder.glob("index/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


log = logging.getLogger(__name__)

RELEASE_POINTS = 5.0  # of the disk above the mark before writes go on, so that they do not flap (Qdrant's margin)
RELEASE_FACTOR = 2.0  # likewise for the mark in bytes, which may be a thousandth of a large disk
DISK_CHECK_EVERY_S = 0.2  # a look costs microseconds, a thousand writes a second need not each take one


class DiskRoom(NamedTuple):
    """Bytes of a disk: free for us, and all."""

    free: int
    total: int


def disk_room(folder: Path) -> DiskRoom:
    """How much room the disk under a folder has."""
    found = os.statvfs(folder)
    return DiskRoom(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class DiskWatermark:
    """Refuses when the disk under a folder has less room than either mark, until it has clearly more than both.

    Any thread may ask. Pages that the database has freed count as room: it fills them before it grows.

    Args:
        folder: on the disk.
        low_bytes: free bytes; 0 = no such mark.
        low_percent: free share of the disk, 0..100; 0 = no such mark.
    """

    def __init__(self, folder: Path, *, low_bytes: int, low_percent: float) -> None:
        self._folder, self._low_bytes, self._low_percent = folder, low_bytes, low_percent
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._low = False
        self.spare = 0  # bytes of freed pages, as the writer last told

    @property
    def low(self) -> bool:
        """Whether writes are refused now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= DISK_CHECK_EVERY_S:
                self._looked = now
                self._look()
            return self._low

    def _room(self) -> DiskRoom:
        free, total = disk_room(self._folder)
        return DiskRoom(free + self.spare, total)

    def _look(self) -> None:
        free, total = self._room()
        percent = 100.0 * free / max(1, total)
        bytes_mark, percent_mark = float(self._low_bytes), self._low_percent
        if self._low:
            bytes_mark *= RELEASE_FACTOR
            percent_mark += RELEASE_POINTS if percent_mark else 0.0
        low = free < bytes_mark or percent < percent_mark
        if low != self._low:
            said = "is low: writes are refused" if low else "is there again: writes go on"
            log.warning("room on the disk %s free_bytes=%d free_percent=%.1f", said, free, percent)
        self._low = low

    def check(self) -> None:
        """Refuse a write.

        Raises:
            DiskWatermarkError: there is too little room.
        """
        if self.low:
            free, total = self._room()
            raise DiskWatermarkError(
                f"the data folder's disk has {free} of {total} bytes free, writes need {self._low_bytes} and "
                f"{self._low_percent:g} %: make room or delete entries; reads go on",
                free_bytes=free,
                total_bytes=total,
            )


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


def keyed_hash(key: bytes, name: str) -> str:
    """A name's keyed hash, 32 hexadecimal digits (HMAC-SHA256, cut)."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:HASH_HEX]


def register_keyed_hash(connection: sqlite3.Connection, key: bytes) -> None:
    """Make ``keyed_hash(name)`` a function of SQL on this connection."""
    connection.create_function("keyed", 1, lambda name: keyed_hash(key, name), deterministic=True)


PREPARED_FILE = "restored.sqlite3"
SWAP_MARKER = "restoring"
INDEX_FOLDER = "index"
SNAPSHOTS_FOLDER = "snapshots"
LOG_SUFFIXES = ("-wal", "-shm", "-journal")


def swap_database(folder: Path) -> None:
    """Put the prepared database, which is whole and on the disk, in the place of the one in use.

    Raises:
        StorageFullError: the folder cannot be written; the old database counts, or the new one after the next start.
    """
    try:
        write_atomic(folder / SWAP_MARKER, b"")
    except OSError as error:
        raise StorageFullError(f"a restore cannot be begun: {error.strerror}: make room on the disk") from error
    finish_swap(folder)


def finish_swap(folder: Path) -> None:
    """End an exchange that was begun, or clear away one, and snapshots, that were only half prepared.

    Mostly there is nothing to do.

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
        shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)  # it is of the old one, and is built anew
        sync(folder)
        (folder / SWAP_MARKER).unlink()
        sync(folder)
    except OSError as error:
        raise StorageFullError(f"a restore cannot be finished: {error.strerror}: let {folder} be written") from error
    log.info("a restored database took the place of the old one in %s", folder.name)


def _settle_snapshots(folder: Path) -> None:
    """Put back a snapshot that was moved aside and has no successor yet; remove what else a crash left."""
    for remnant in folder.glob(".*"):
        final = folder / remnant.name.removeprefix(".").removesuffix(".old")
        if remnant.name.endswith(".old") and not final.exists():  # see resight.files.replace_folder
            remnant.rename(final)
        else:
            shutil.rmtree(remnant)


def remove_database(database: Path) -> None:
    """Remove a database and what SQLite keeps beside it; one that is not there is no error."""
    for suffix in ("", *LOG_SUFFIXES):
        _with_suffix(database, suffix).unlink(missing_ok=True)


def _with_suffix(database: Path, suffix: str) -> Path:
    return database.with_name(database.name + suffix)
