"""Snapshots of a gallery's database in ``snapshots/NAME/``: creation while in use, verification, restore, and erasure.

A snapshot is a consistent copy of the database with a manifest. Index files are not included, since they are rebuilt;
neither is the folder's key, which must be backed up separately (`resight.service.storage.data_folder`).

A restore needs a stopped server and is atomic: the copy is prepared beside the database in use, erased people are
removed from it, later audit rows are carried over, and entry keys and revisions continue above all that were ever
issued. Then the two are swapped, so a crash leaves either the old database or the new one.

At the next purge after an erasure, each older snapshot is rewritten without the erased people.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resight.errors import InputError, ReIDError, StorageFullError, StoreError
from resight.files import replace_folder, sync, temporary_folder, write_atomic
from resight.service.storage import audit, erasure
from resight.service.storage.audit import AuditEvent
from resight.service.storage.data_folder import (
    DATABASE_FILE,
    KEY_FILE,
    PREPARED_FILE,
    SNAPSHOTS_FOLDER,
    finish_swap,
    keyed_hash,
    load_key,
    register_keyed_hash,
    remove_database,
    swap_database,
)
from resight.service.storage.erasure import LIST_FILE, ErasureRecord
from resight.service.storage.schema import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    connect,
    open_database,
    translate_error,
)
from resight.service.storage.store import Store
from resight.service.storage.writes import NO_ENTRY, log_change

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
SNAPSHOT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_MANIFEST_BYTES = 1 << 20
PAGES_PER_STEP = 1024  # 16 MiB between two calls of the progress callback
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with the pages copied and the total; an exception it raises aborts the copy, which is then removed."""


@dataclass(frozen=True)
class SnapshotManifest:
    """Contents of a snapshot.

    Attributes:
        name: of its folder.
        created: ISO 8601, UTC.
        schema_version: of the database.
        bytes: size of the database file.
        sha256: of the database file.
        entries: in all collections, including expired ones.
        collections: name to the number of entries and the active space.
        key_id: identifies the key its hashes were made with, see `key_id`.
        erased: number of lines of the erase list that are applied to it.
    """

    name: str
    created: str
    schema_version: int
    bytes: int
    sha256: str
    entries: int
    collections: dict[str, dict[str, Any]]
    key_id: str
    erased: int
    format_version: int = FORMAT_VERSION


def key_id(key: bytes) -> str:
    """An identifier of a key that does not reveal it: 8 hexadecimal digits."""
    return keyed_hash(key, "key-id")[:8]


def check_name(name: str) -> str:
    """Return the name if it is valid, so that it can never be a path.

    Raises:
        InputError: it does not match `SNAPSHOT_NAME`.
    """
    if not SNAPSHOT_NAME.fullmatch(name):
        raise InputError(
            f"a snapshot's name is 1-63 of a-z, 0-9, '.', '_' and '-', a letter or digit first; found {name!r}",
            field="snapshot_id",
        )
    return name


def timestamp_name() -> str:
    """The default name of a snapshot: the current UTC time with milliseconds."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000 // 1_000_000:03d}"


def create(database: Path, name: str, *, progress: Progress | None = None) -> SnapshotManifest:
    """Copy a database, also while it is in use; blocks the calling thread until the copy is done.

    Readers and writers are not blocked. Pages deleted in the meantime stay in the write-ahead log until the copy is
    done.

    Raises:
        InputError: an invalid name, or one that exists already.
        StorageFullError: no disk space for the copy, which is removed.
        StoreError: the database is damaged.
    """
    final = database.parent / SNAPSHOTS_FOLDER / check_name(name)
    if final.exists():
        raise InputError(f"snapshot {name} exists: choose another name, or remove it first", field="snapshot_id")
    _make_private(final.parent)
    try:
        with temporary_folder(final) as folder:
            folder.chmod(0o700)
            copy = folder / DATABASE_FILE
            os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            _backup(database, copy, progress)
            manifest = describe_copy(copy, name, load_key(database.parent))
            write_atomic(folder / MANIFEST_FILE, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
            replace_folder(folder, final)
    except sqlite3.Error as error:
        raise translate_error(error) from error
    except OSError as error:
        raise StorageFullError(f"snapshot {name} cannot be written: {error.strerror}: free disk space") from error
    return manifest


def list_names(folder: Path) -> list[str]:
    """Names of the snapshots beside a database, sorted; other files are ignored."""
    return [
        path.name
        for path in sorted((folder / SNAPSHOTS_FOLDER).glob("*"))
        if SNAPSHOT_NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST_FILE).is_file()
    ]


def list_manifests(folder: Path) -> list[SnapshotManifest]:
    """Manifests of the snapshots beside a database, sorted by name; raises StoreError for a damaged one."""
    return [read_manifest(folder, name) for name in list_names(folder)]


def remove(folder: Path, name: str) -> None:
    """Remove a snapshot; a missing one is no error. Raises InputError for an invalid name.

    An older version that a killed process left moved aside is removed first, or the next start would restore it.
    """
    path = folder / SNAPSHOTS_FOLDER / check_name(name)
    shutil.rmtree(path.with_name(f".{name}.old"), ignore_errors=True)  # see `resight.files.replace_folder`
    if path.is_dir() and not path.is_symlink():
        removed = path.with_name(f".{name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)  # atomic: a crash leaves the whole snapshot or none
        shutil.rmtree(removed, ignore_errors=True)


def read_manifest(folder: Path, name: str) -> SnapshotManifest:
    """Read a snapshot's manifest.

    Raises:
        InputError: an invalid name.
        StoreError: it does not exist, is damaged or newer than this program.
    """
    path = folder / SNAPSHOTS_FOLDER / check_name(name) / MANIFEST_FILE
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            body = json.loads(file.read(MAX_MANIFEST_BYTES))
        found = SnapshotManifest(**body)
    except FileNotFoundError as error:
        raise StoreError(f"there is no snapshot {name} here: see `resight snapshot list`") from error
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"the manifest of snapshot {name} is damaged ({error}): use another snapshot") from error
    if found.format_version > FORMAT_VERSION or found.schema_version > SCHEMA_VERSION:
        raise StoreError(f"snapshot {name} is newer than this program: upgrade resight")
    return found


def verify(folder: Path, name: str) -> SnapshotManifest:
    """Check a snapshot's size and SHA-256, and run SQLite's quick check on it.

    Raises:
        InputError: an invalid name.
        StoreError: it is missing, altered, truncated, damaged or newer than this program.
    """
    manifest = read_manifest(folder, name)
    path = folder / SNAPSHOTS_FOLDER / name / DATABASE_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(f"the database of snapshot {name} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        size, digest = os.fstat(descriptor).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (manifest.bytes, manifest.sha256):
        raise StoreError(
            f"snapshot {name} was altered since it was written ({size} bytes, expected {manifest.bytes}; SHA-256 "
            f"{'equal' if digest == manifest.sha256 else 'differs'}): use another snapshot"
        )
    try:
        with closing(_immutable(path)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise translate_error(error, f"snapshot {name}") from error
    if application != APPLICATION_ID or check != "ok":
        raise StoreError(f"snapshot {name} is damaged ({check}): use another snapshot")
    return manifest


def _immutable(path: Path) -> sqlite3.Connection:
    """Open a database that is not being written, read-only and without creating a log beside it."""
    return sqlite3.connect(path.resolve().as_uri() + "?immutable=1", uri=True)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFullError(f"folder {folder.name} cannot be created: {error.strerror}") from error


def _backup(database: Path, copy: Path, progress: Progress | None) -> None:
    """SQLite's online backup inside one read transaction, so that writes do not make it restart."""
    with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(copy)) as target:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM entry LIMIT 1").fetchone()

        def report(status: int, remaining: int, total: int) -> None:
            if progress is not None:
                progress(total - remaining, total)

        source.backup(target, pages=PAGES_PER_STEP, progress=report, sleep=0.0)
        source.execute("COMMIT")
        target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it


def describe_copy(copy: Path, name: str, key: bytes) -> SnapshotManifest:
    """The manifest of a database file that is no longer written to."""
    with copy.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with closing(_immutable(copy)) as connection:
        rows = connection.execute(
            "SELECT name, space_id, (SELECT count(*) FROM entry e WHERE e.collection = c.key) FROM collection c"
        ).fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (erased,) = connection.execute("SELECT count(*) FROM erased").fetchone()
    return SnapshotManifest(
        name=name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        schema_version=version,
        bytes=copy.stat().st_size,
        sha256=digest,
        entries=sum(count for *_, count in rows),
        collections={collection: {"entries": count, "space_id": space} for collection, space, count in rows},
        key_id=key_id(key),
        erased=erased,
    )


QUICK_CHECK_S = 60.0
RESTORE_METHOD = "snapshot.restore"
_NUMBERS = "SELECT name, seq FROM sqlite_sequence WHERE name IN ('entry', 'change', 'collection')"


@dataclass(frozen=True)
class RestoreResult:
    """Result of a restore: the snapshot's manifest, and how many entries of erased people were removed from it."""

    manifest: SnapshotManifest
    erased_count: int


def restore(folder: Path, name: str, *, principal: str = "local operator") -> RestoreResult:
    """Replace a database by a snapshot. The caller holds the data folder's lock.

    Args:
        folder: of the database.
        name: of the snapshot.
        principal: the caller, for the audit log.

    Raises:
        InputError: an invalid name.
        StoreError: the snapshot, the key or the erase list is missing or damaged; the database in use is unchanged.
        StorageFullError: no disk space for a second copy; the database in use is unchanged.
    """
    finish_swap(folder)
    manifest = verify(folder, name)
    key = _key_for(folder, manifest)
    lines = erasure.erasures_in_file(folder / LIST_FILE)
    ready = folder / PREPARED_FILE
    try:
        os.close(os.open(ready, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        shutil.copyfile(folder / SNAPSHOTS_FOLDER / name / DATABASE_FILE, ready)
        event = AuditEvent(principal, RESTORE_METHOD, reason=f"snapshot {name}")
        erased = _prepare_copy(ready, folder / DATABASE_FILE, key, lines, event)
        sync(ready)
    except BaseException as error:
        remove_database(ready)
        if isinstance(error, OSError):
            raise StorageFullError(f"snapshot {name} cannot be restored: {error.strerror}: free disk space") from error
        raise
    swap_database(folder)
    return RestoreResult(manifest, erased)


def _key_for(folder: Path, manifest: SnapshotManifest) -> bytes:
    if not (folder / KEY_FILE).exists():
        raise StoreError(
            f"{KEY_FILE} is missing from {folder}: put the one here that was in use when snapshot {manifest.name} was "
            f"made, and {LIST_FILE} with it, so that erased people stay erased"
        )
    key = load_key(folder)
    if key_id(key) != manifest.key_id:
        raise StoreError(
            f"{KEY_FILE} in {folder} is not the one in use when snapshot {manifest.name} was made: put that one here, "
            f"and {LIST_FILE} with it, so that erased people stay erased"
        )
    return key


def _prepare_copy(ready: Path, current: Path, key: bytes, lines: list[ErasureRecord], event: AuditEvent) -> int:
    """Bring the copy up to date for use; returns how many entries of erased people were removed from it."""
    try:
        with closing(open_database(ready, dim=0, quick_check_s=QUICK_CHECK_S)) as connection:
            register_keyed_hash(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            numbers = _carry_over(connection, current, lines)
            count = erasure.replay_erasures(connection, key, [*lines, *erasure.erasures_in_database(connection)])
            for table, last in numbers.items():
                erasure.raise_sequence(connection, table, last)
            for (collection,) in connection.execute("SELECT key FROM collection").fetchall():
                log_change(connection, collection, [NO_ENTRY], deleted=False)  # a revision that no client has seen
            audit.record_event(
                connection, AuditEvent(event.principal, event.method, reason=event.reason, affected=count)
            )
            connection.execute("COMMIT")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            connection.execute("PRAGMA journal_mode=DELETE")
        assert not busy, "nothing else reads a copy that was just made"
    except sqlite3.Error as error:
        raise translate_error(error, PREPARED_FILE) from error
    return count


def _carry_over(connection: sqlite3.Connection, current: Path, lines: list[ErasureRecord]) -> dict[str, int]:
    """Copy later audit rows and the erase list from the database in use; returns the last keys it issued, by table.

    A database that cannot be read contributes nothing: a restore must work then too, with the erase list's file.
    """
    numbers: dict[str, int] = {}
    if not current.exists():
        return numbers
    with contextlib.suppress(sqlite3.Error), closing(connect(current, read_only=True)) as old:
        numbers = dict(old.execute(_NUMBERS).fetchall())
        lines += [line for line in erasure.erasures_in_database(old) if line not in set(lines)]
        (last,) = connection.execute("SELECT coalesce(max(key), 0) FROM audit").fetchone()
        rows = old.execute("SELECT * FROM audit WHERE key > ? ORDER BY key", (last,)).fetchall()
        connection.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return numbers


log = logging.getLogger(__name__)


async def erase_from_snapshots(store: Store) -> int:
    """Rewrite every snapshot that may contain people who were erased since; returns how many were rewritten.

    One that cannot be rewritten, because it is damaged or the disk is full, is logged and tried again at the next
    purge.
    """
    lines = await store.read(erasure.erasures_in_database)
    done = 0
    for name in await asyncio.to_thread(list_names, store.folder):
        try:
            done += await asyncio.to_thread(_rewrite_snapshot, store.folder, name, store.key, lines)
        except ReIDError as error:
            if name not in await asyncio.to_thread(list_names, store.folder):
                continue  # it was removed in the meantime
            log.error("erased people may still be in snapshot %s, fix this or remove it: %s", name, error)
    return done


def _rewrite_snapshot(folder: Path, name: str, key: bytes, lines: Sequence[ErasureRecord]) -> bool:
    """Rewrite a snapshot if the erase list has grown since; returns whether it was rewritten."""
    before = read_manifest(folder, name)
    if before.erased >= len(lines):
        return False
    verify(folder, name)
    final = folder / SNAPSHOTS_FOLDER / name
    try:
        with temporary_folder(final) as made:
            made.chmod(0o700)
            copy = made / DATABASE_FILE
            os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            shutil.copyfile(final / DATABASE_FILE, copy)
            erased = _erase_from_copy(copy, key, lines)
            after: SnapshotManifest = replace(describe_copy(copy, name, key), created=before.created)
            write_atomic(made / MANIFEST_FILE, (json.dumps(asdict(after), indent=1) + "\n").encode())
            replace_folder(made, final)
    except OSError as error:
        raise StorageFullError(f"it cannot be rewritten: {error.strerror}: free disk space") from error
    log.info("snapshot %s rewritten without %d entries of erased people", name, erased)
    return True


def _erase_from_copy(copy: Path, key: bytes, lines: Sequence[ErasureRecord]) -> int:
    try:
        with closing(open_database(copy, dim=0, quick_check_s=0.0)) as connection:
            register_keyed_hash(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            erased = erasure.replay_erasures(connection, key, lines)
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise translate_error(error, copy.parent.name) from error
    return erased
