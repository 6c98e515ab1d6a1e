"""Putting a snapshot back, on a stopped server: all or nothing, and without those who were erased since.

The restored database is made ready beside the one in use: erased people are taken out of it, the audit since then is
carried over, and numbers of entries and revisions go on above all that were ever told. Only then do the two change
places (`resight.service.exchange`), so a crash leaves the old database or the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from resight.atomic import sync
from resight.errors import StorageFullError, StoreError
from resight.service import audit, erasure, snapshot
from resight.service.audit import Event
from resight.service.erasure import LIST_FILE, Erased
from resight.service.exchange import READY, SNAPSHOTS, exchange, finish, remove
from resight.service.folder import DATABASE_FILE
from resight.service.rows import NO_ENTRY, log_change
from resight.service.schema import connect, open_database, translated
from resight.service.secret import KEY_FILE, load_key, register
from resight.service.snapshot import Manifest

QUICK_CHECK_S = 60.0
METHOD = "snapshot.restore"
_NUMBERS = "SELECT name, seq FROM sqlite_sequence WHERE name IN ('entry', 'change', 'collection')"


@dataclass(frozen=True)
class Restored:
    """What a restore did: of which snapshot, and how many entries of erased people did not come back."""

    manifest: Manifest
    erased_count: int


def restore(folder: Path, name: str, *, principal: str = "local operator") -> Restored:
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
    finish(folder)
    manifest = snapshot.verify(folder, name)
    key = _key_for(folder, manifest)
    lines = erasure.in_file(folder / LIST_FILE)
    ready = folder / READY
    try:
        os.close(os.open(ready, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        shutil.copyfile(folder / SNAPSHOTS / name / DATABASE_FILE, ready)
        event = Event(principal, METHOD, reason=f"snapshot {name}")
        erased = _prepare(ready, folder / DATABASE_FILE, key, lines, event)
        sync(ready)
    except BaseException as error:
        remove(ready)
        if isinstance(error, OSError):
            raise StorageFullError(f"snapshot {name} cannot be put back: {error.strerror}: make room") from error
        raise
    exchange(folder)
    return Restored(manifest, erased)


def _key_for(folder: Path, manifest: Manifest) -> bytes:
    if not (folder / KEY_FILE).exists():
        raise StoreError(
            f"{KEY_FILE} is missing from {folder}: put the one here that was in use when snapshot {manifest.name} was "
            f"made, and {LIST_FILE} with it, so that erased people stay erased"
        )
    key = load_key(folder)
    if snapshot.key_id(key) != manifest.key_id:
        raise StoreError(
            f"{KEY_FILE} in {folder} is not the one in use when snapshot {manifest.name} was made: put that one here, "
            f"and {LIST_FILE} with it, so that erased people stay erased"
        )
    return key


def _prepare(ready: Path, current: Path, key: bytes, lines: list[Erased], event: Event) -> int:
    """Make the copy fit to be used; returns how many entries of erased people it held."""
    try:
        with closing(open_database(ready, dim=0, quick_check_s=QUICK_CHECK_S)) as connection:
            register(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            numbers = _carry_over(connection, current, lines)
            count = erasure.replay(connection, key, [*lines, *erasure.in_database(connection)])
            for table, last in numbers.items():
                erasure.raise_sequence(connection, table, last)
            for (collection,) in connection.execute("SELECT key FROM collection").fetchall():
                log_change(connection, collection, [NO_ENTRY], deleted=False)  # a revision nobody was told yet
            audit.record(connection, Event(event.principal, event.method, reason=event.reason, affected=count))
            connection.execute("COMMIT")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            connection.execute("PRAGMA journal_mode=DELETE")
        assert not busy, "nobody else reads a copy that was just made"
    except sqlite3.Error as error:
        raise translated(error, READY) from error
    return count


def _carry_over(connection: sqlite3.Connection, current: Path, lines: list[Erased]) -> dict[str, int]:
    """Take the audit and the erase list from the database in use; the last numbers it gave out.

    One that cannot be read any more gives nothing: that is what a restore is for. The erase list's file has the rest.
    """
    numbers: dict[str, int] = {}
    if not current.exists():
        return numbers
    with contextlib.suppress(sqlite3.Error), closing(connect(current, read_only=True)) as old:
        numbers = dict(old.execute(_NUMBERS).fetchall())
        lines += [line for line in erasure.in_database(old) if line not in set(lines)]
        (last,) = connection.execute("SELECT coalesce(max(key), 0) FROM audit").fetchone()
        rows = old.execute("SELECT * FROM audit WHERE key > ? ORDER BY key", (last,)).fetchall()
        connection.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return numbers
