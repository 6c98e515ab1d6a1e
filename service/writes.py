"""What is written to the gallery's database: functions of the writer's connection, inside its transaction.

Each raises before it has written anything, or its caller undoes it; none commits.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import replace

from resight.errors import (
    CollectionExistsError,
    CollectionNotEmptyError,
    CollectionNotFoundError,
    DeleteCapError,
    EntryExistsError,
    EntryNotFoundError,
    InputError,
)
from resight.service import reads
from resight.service.entries import Collection, Enrolled, Enrolment, Filter, now_us

REQUEST_MEMORY_US = 24 * 3600 * 1_000_000  # how long a replay is recognised
PURGE_AT_ONCE = 1000  # entries of one transaction, so that enrolments do not wait for a large purge


def create_collection(connection: sqlite3.Connection, new: Collection) -> Collection:
    """Make an empty collection of a space.

    Raises:
        CollectionExistsError: the name is taken.
    """
    if connection.execute("SELECT 1 FROM collection WHERE name = ?", (new.name,)).fetchone():
        raise CollectionExistsError(
            f"collection {new.name} exists: use it, or choose another name",
            field="collection.collection_id",
            collection=new.name,
        )
    space, now = new.space, now_us()
    connection.execute(
        "INSERT INTO space VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (space.space_id, space.model_id, space.dim, now),
    )
    connection.execute(
        "INSERT INTO collection (name, space_id, ttl_us, keep_crops, revision, created_us) VALUES (?, ?, ?, ?, 0, ?)",
        (new.name, space.space_id, new.ttl_us, new.keep_crops, now),
    )
    return reads.collection(connection, new.name)


def delete_collection(connection: sqlite3.Connection, name: str, *, force: bool) -> Collection:
    """Remove a collection with all it holds.

    Raises:
        CollectionNotFoundError: no such one.
        CollectionNotEmptyError: it has living entries, and ``force`` is not set.
    """
    gone = reads.collection(connection, name)
    held = reads.count(connection, gone.key, Filter())
    if held and not force:
        raise CollectionNotEmptyError(
            f"collection {name} has {held} entries: delete them first, or force it",
            field="force",
            collection=name,
            entry_count=held,
        )
    connection.execute("DELETE FROM collection WHERE key = ?", (gone.key,))
    return gone


def enrol(connection: sqlite3.Connection, into: Collection, new: Enrolment) -> Enrolled:
    """Store one entry with its feature, labels and, where the collection keeps them, crops.

    Raises:
        CollectionNotFoundError: it was deleted meanwhile.
        EntryExistsError: the id is taken, and ``replace`` is not set.
        InputError: the request_id was used for another request.
        EntryNotFoundError: a replay, whose entry was deleted since.
    """
    if reads.revision(connection, into.key) < 0:
        raise CollectionNotFoundError(
            f"collection {into.name} was deleted meanwhile: create it again",
            field="collection_id",
            collection=into.name,
        )
    if new.request_id and (replayed := _replayed(connection, into, new)):
        return replayed
    now = now_us()
    expire_us = new.entry.expire_us
    if expire_us is None and into.ttl_us is not None:
        expire_us = now + into.ttl_us
    entry = replace(new.entry, created_us=now, expire_us=expire_us)
    _make_room(connection, into, new)
    row = (into.key, entry.entry_id, entry.subject_id, entry.camera_id, entry.track_id, entry.capture_us, expire_us)
    cursor = connection.execute(
        "INSERT INTO entry (collection, entry_id, subject_id, camera_id, track_id, capture_us, expire_us, quality, "
        "shot_count, created_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, entry.quality, entry.shot_count, now),
    )
    key = cursor.lastrowid
    assert key is not None
    vector = new.feature.astype("<f4").tobytes()
    connection.execute(
        "INSERT INTO feature VALUES (?, ?, ?, ?)", (key, into.space.space_id, vector, zlib.crc32(vector))
    )
    connection.executemany("INSERT INTO label VALUES (?, ?, ?)", [(key, *label) for label in entry.labels.items()])
    if into.keep_crops:
        crops = [(key, number, crop) for number, crop in enumerate(new.crops)]
        connection.executemany("INSERT INTO crop VALUES (?, ?, ?)", crops)
    revision = _log(connection, into.key, [key], deleted=False)
    if new.request_id:
        connection.execute(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)", (new.request_id, new.digest, into.key, key, revision, now)
        )
    return Enrolled(entry, revision)


def _replayed(connection: sqlite3.Connection, into: Collection, new: Enrolment) -> Enrolled | None:
    """The answer of the first call with this request_id, if there was one."""
    row = connection.execute(
        "SELECT r.digest, r.revision, e.entry_id FROM request r LEFT JOIN entry e ON e.key = r.entry "
        "WHERE request_id = ?",
        (new.request_id,),
    ).fetchone()
    if row is None:
        return None
    digest, revision, entry_id = row
    if digest != new.digest:
        raise InputError(
            f"request_id {new.request_id} was used for another request: take a new one for each", field="request_id"
        )
    if entry_id is None:
        raise EntryNotFoundError(
            f"the entry that request {new.request_id} enrolled was deleted since: enrol it with a new request_id",
            field="request_id",
            collection=into.name,
        )
    return Enrolled(reads.entry(connection, into, entry_id)[1], revision, replayed=True)


def _make_room(connection: sqlite3.Connection, into: Collection, new: Enrolment) -> None:
    """Let an expired or replaced entry of the same id go; refuse where one lives."""
    row = connection.execute(
        "SELECT key, expire_us FROM entry WHERE collection = ? AND entry_id = ?", (into.key, new.entry.entry_id)
    ).fetchone()
    if row is None:
        return
    key, expire_us = row
    living = expire_us is None or expire_us > now_us()
    if living and not new.replace:
        raise EntryExistsError(
            f"entry {new.entry.entry_id!r} exists in collection {into.name}: choose another id, or ask to replace it",
            field="entry.entry_id",
            entry=new.entry.entry_id,
            collection=into.name,
        )
    _delete(connection, into.key, [key])


def delete_entry(connection: sqlite3.Connection, found_in: Collection, entry_id: str, *, allow_missing: bool) -> int:
    """Remove one entry; returns the collection's revision.

    Raises:
        EntryNotFoundError: no such one, and ``allow_missing`` is not set.
    """
    try:
        key, _ = reads.entry(connection, found_in, entry_id)
    except EntryNotFoundError:
        if allow_missing:
            return reads.revision(connection, found_in.key)
        raise
    return _delete(connection, found_in.key, [key])


def delete_entries(
    connection: sqlite3.Connection, found_in: Collection, filters: Filter, *, cap: int | None
) -> tuple[int, int]:
    """Remove what passes a filter; returns how many and the collection's revision.

    Raises:
        DeleteCapError: more than ``cap`` would go; nothing went.
    """
    keys = reads.candidates(connection, found_in.key, filters).tolist()
    if cap is not None and len(keys) > cap:
        raise DeleteCapError(
            f"{len(keys)} entries pass the filter, at most {cap} may go: narrow the filter or raise max_deletes",
            field="max_deletes",
            matched_count=len(keys),
        )
    return len(keys), _delete(connection, found_in.key, keys)


def purge(connection: sqlite3.Connection) -> int:
    """Remove expired entries; returns how many, at most `PURGE_AT_ONCE`."""
    rows = connection.execute(
        "SELECT collection, key FROM entry WHERE expire_us <= ? ORDER BY expire_us LIMIT ?", (now_us(), PURGE_AT_ONCE)
    ).fetchall()
    for collection in {row[0] for row in rows}:
        _delete(connection, collection, [key for owner, key in rows if owner == collection])
    return len(rows)


def forget(connection: sqlite3.Connection, taken_in: Sequence[tuple[int, int]]) -> None:
    """Remove old requests, and the part of the change log the index has taken in: (collection key, revision) each."""
    connection.execute("DELETE FROM request WHERE at_us < ?", (now_us() - REQUEST_MEMORY_US,))
    connection.executemany("DELETE FROM change WHERE collection = ? AND revision <= ?", taken_in)


def _delete(connection: sqlite3.Connection, collection: int, keys: Sequence[int]) -> int:
    connection.executemany("DELETE FROM entry WHERE key = ?", [(key,) for key in keys])
    return _log(connection, collection, keys, deleted=True)


def _log(connection: sqlite3.Connection, collection: int, keys: Sequence[int], *, deleted: bool) -> int:
    """Note a change of the collection and return its revision, which only ever grows."""
    connection.executemany(
        "INSERT INTO change (collection, entry, deleted) VALUES (?, ?, ?)", [(collection, key, deleted) for key in keys]
    )
    connection.execute(
        "UPDATE collection SET revision = (SELECT coalesce(max(revision), collection.revision) FROM change "
        "WHERE collection = ?1) WHERE key = ?1",
        (collection,),
    )
    return reads.revision(connection, collection)
