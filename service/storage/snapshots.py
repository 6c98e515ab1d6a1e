"""Snapshots of a gallery's database in ``snapshots/NAME/``: creation while in use, verification, restore, and erasure.

A snapshot holds what one transaction saw, with a manifest. Index files are left out, since they are rebuilt; so is the
folder's key, which must be kept apart (`resight.service.storage.data_folder`).

A restore needs a stopped server and is all or nothing: the database is prepared beside the one in use, erased people
are removed from it, the audit since then is carried over, and numbers of entries and revisions continue above all that
were ever issued. Then the two are swapped, so a crash leaves the old database or the new one.

At the next purge after an erasure, each older snapshot is written anew without the erased people.
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
PAGES_PER_STEP = 1024  # 16 MiB between two tellings of progress
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Told pages copied and pages in all; what it raises ends the copy and leaves nothing."""


@dataclass(frozen=True)
class SnapshotManifest:
    """What a snapshot holds.

    Attributes:
        name: of its folder.
        created: ISO 8601, UTC.
        schema_version: of the database.
        bytes: of the database.
        sha256: of the database.
        entries: in all collections, expired ones too.
        collections: name to its entries and the space it is searched in.
        key_id: tells whether a folder's key is the one its hashes were made with.
        erased: lines of the erase list that it has taken account of.
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
    """Names a key without telling it: 8 hexadecimal digits."""
    return keyed_hash(key, "key-id")[:8]


def check_name(name: str) -> str:
    """A snapshot's name, which is never a path.

    Raises:
        InputError: another one than ``[a-z0-9][a-z0-9._-]{0,62}``.
    """
    if not SNAPSHOT_NAME.fullmatch(name):
        raise InputError(
            f"a snapshot's name is 1-63 of a-z, 0-9, '.', '_' and '-', a letter or digit first; found {name!r}",
            field="snapshot_id",
        )
    return name


def name_of_now() -> str:
    """A name for a snapshot without one, from the clock."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000 // 1_000_000:03d}"


def create(database: Path, name: str, *, progress: Progress | None = None) -> SnapshotManifest:
    """Copy a database, also while it is written to; takes a thread for the time of the copy.

    Readers and writers go on. Pages that are deleted meanwhile stay in the log until the copy is done.

    Raises:
        InputError: a bad name, or one that is taken.
        StorageFullError: no room for the copy; nothing is left of it.
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
        raise StorageFullError(f"snapshot {name} cannot be written: {error.strerror}: make room on the disk") from error
    return manifest


def list_names(folder: Path) -> list[str]:
    """The snapshots beside a database, by name; what is no snapshot is left out."""
    return [
        path.name
        for path in sorted((folder / SNAPSHOTS_FOLDER).glob("*"))
        if SNAPSHOT_NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST_FILE).is_file()
    ]


def list_manifests(folder: Path) -> list[SnapshotManifest]:
    """Manifests of the snapshots beside a database, by name; raises StoreError for a damaged one."""
    return [read_manifest(folder, name) for name in list_names(folder)]


def remove(folder: Path, name: str) -> None:
    """Remove a snapshot; one that is not there is no error. Raises InputError for a bad name.

    What a kill has left of an older one under its name goes first, or the next start would put that in its place.
    """
    path = folder / SNAPSHOTS_FOLDER / check_name(name)
    shutil.rmtree(path.with_name(f".{name}.old"), ignore_errors=True)  # see `resight.files.replace_folder`
    if path.is_dir() and not path.is_symlink():
        gone = path.with_name(f".{name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # in one step: a kill leaves all of it or nothing
        shutil.rmtree(gone, ignore_errors=True)


def read_manifest(folder: Path, name: str) -> SnapshotManifest:
    """Read a snapshot's manifest.

    Raises:
        InputError: a bad name.
        StoreError: there is none, or it is damaged or newer than this program.
    """
    path = folder / SNAPSHOTS_FOLDER / check_name(name) / MANIFEST_FILE
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            body = json.loads(file.read(MAX_MANIFEST_BYTES))
        found = SnapshotManifest(**body)
    except FileNotFoundError as error:
        raise StoreError(f"there is no snapshot {name} here: `resight snapshot list` tells which there are") from error
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"the manifest of snapshot {name} is damaged ({error}): use another snapshot") from error
    if found.format_version > FORMAT_VERSION or found.schema_version > SCHEMA_VERSION:
        raise StoreError(f"snapshot {name} is newer than this program: upgrade resight")
    return found


def verify(folder: Path, name: str) -> SnapshotManifest:
    """Read all of a snapshot and let SQLite check it.

    Raises:
        InputError: a bad name.
        StoreError: it is not there, altered, cut short, damaged or newer than this program.
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
            f"snapshot {name} is not what was written ({size} bytes, expected {manifest.bytes}; SHA-256 "
            f"{'equal' if digest == manifest.sha256 else 'differs'}): use another snapshot"
        )
    try:
        with closing(_immutable(path)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (told,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise translate_error(error, f"snapshot {name}") from error
    if application != APPLICATION_ID or told != "ok":
        raise StoreError(f"snapshot {name} is damaged ({told}): use another snapshot")
    return manifest


def _immutable(path: Path) -> sqlite3.Connection:
    """Read a database that nobody writes, without making a log beside it."""
    return sqlite3.connect(path.resolve().as_uri() + "?immutable=1", uri=True)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFullError(f"folder {folder.name} cannot be made: {error.strerror}") from error


def _backup(database: Path, copy: Path, progress: Progress | None) -> None:
    """SQLite's online backup, inside one read, so that writes do not make it begin anew."""
    with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(copy)) as target:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM entry LIMIT 1").fetchone()

        def told(status: int, remaining: int, total: int) -> None:
            if progress is not None:
                progress(total - remaining, total)

        source.backup(target, pages=PAGES_PER_STEP, progress=told, sleep=0.0)
        source.execute("COMMIT")
        target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it


def describe_copy(copy: Path, name: str, key: bytes) -> SnapshotManifest:
    """The manifest of a database that nobody writes to any more."""
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
        collections={of: {"entries": count, "space_id": space} for of, space, count in rows},
        key_id=key_id(key),
        erased=erased,
    )


QUICK_CHECK_S = 60.0
RESTORE_METHOD = "snapshot.restore"
_NUMBERS = "SELECT name, seq FROM sqlite_sequence WHERE name IN ('entry', 'change', 'collection')"


@dataclass(frozen=True)
class RestoreResult:
    """What a restore did: of which snapshot, and how many entries of erased people did not come back."""

    manifest: SnapshotManifest
    erased_count: int


def restore(folder: Path, name: str, *, principal: str = "local operator") -> RestoreResult:
    """Put a snapshot in the place of a database. The caller holds the data folder's lock.

    Args:
        folder: of the database.
        name: of the snapshot.
        principal: who asks, for the audit.

    Raises:
        InputError: a bad name.
        StoreError: the snapshot cannot be trusted, or the key or the erase list is missing or damaged; the database
            in use is as it was.
        StorageFullError: no room for a second copy; likewise.
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
            raise StorageFullError(f"snapshot {name} cannot be put back: {error.strerror}: make room") from error
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
    """Make the copy fit to be used; returns how many entries of erased people it held."""
    try:
        with closing(open_database(ready, dim=0, quick_check_s=QUICK_CHECK_S)) as connection:
            register_keyed_hash(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            numbers = _carry_over(connection, current, lines)
            count = erasure.replay_erasures(connection, key, [*lines, *erasure.erasures_in_database(connection)])
            for table, last in numbers.items():
                erasure.raise_sequence(connection, table, last)
            for (collection,) in connection.execute("SELECT key FROM collection").fetchall():
                log_change(connection, collection, [NO_ENTRY], deleted=False)  # a revision nobody was told yet
            audit.record_event(
                connection, AuditEvent(event.principal, event.method, reason=event.reason, affected=count)
            )
            connection.execute("COMMIT")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            connection.execute("PRAGMA journal_mode=DELETE")
        assert not busy, "nobody else reads a copy that was just made"
    except sqlite3.Error as error:
        raise translate_error(error, PREPARED_FILE) from error
    return count


def _carry_over(connection: sqlite3.Connection, current: Path, lines: list[ErasureRecord]) -> dict[str, int]:
    """Take the audit and the erase list from the database in use; the last numbers it gave out.

    One that cannot be read any more gives nothing: that is what a restore is for. The erase list's file has the rest.
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
    """Write anew every snapshot that may hold somebody who was erased since; returns how many.

    One that cannot be written anew, for want of room or because it is damaged, is named in the log and tried again.
    """
    lines = await store.read(erasure.erasures_in_database)
    done = 0
    for name in await asyncio.to_thread(list_names, store.folder):
        try:
            done += await asyncio.to_thread(_rewrite_snapshot, store.folder, name, store.key, lines)
        except ReIDError as error:
            if name not in await asyncio.to_thread(list_names, store.folder):
                continue  # somebody removed it meanwhile
            log.error("erased people may still be in snapshot %s, remove it or see to this: %s", name, error)
    return done


def _rewrite_snapshot(folder: Path, name: str, key: bytes, lines: Sequence[ErasureRecord]) -> bool:
    """Whether the snapshot had to be written anew, as it now is."""
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
            gone = _erase_from_copy(copy, key, lines)
            after: SnapshotManifest = replace(describe_copy(copy, name, key), created=before.created)
            write_atomic(made / MANIFEST_FILE, (json.dumps(asdict(after), indent=1) + "\n").encode())
            replace_folder(made, final)
    except OSError as error:
        raise StorageFullError(f"it cannot be written anew: {error.strerror}: make room on the disk") from error
    log.info("snapshot %s written anew without %d entries of erased people", name, gone)
    return True


def _erase_from_copy(copy: Path, key: bytes, lines: Sequence[ErasureRecord]) -> int:
    try:
        with closing(open_database(copy, dim=0, quick_check_s=0.0)) as connection:
            register_keyed_hash(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            gone = erasure.replay_erasures(connection, key, lines)
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise translate_error(error, copy.parent.name) from error
    return gone
