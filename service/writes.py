"""What is written to the gallery's database: functions of the writer's connection, inside its transaction.

Each raises before it has written anything, or its caller undoes it; none commits.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from resight.errors import (
    CollectionExistsError,
    CollectionFullError,
    CollectionNotEmptyError,
    CollectionNotFoundError,
    ConflictError,
    DeleteCapError,
    EntryExistsError,
    EntryNotFoundError,
    ReIDError,
)
from resight.service import reads
from resight.service.entries import Collection, Enrolled, Enrolment, Filter, Space, now_us
from resight.service.rows import FIRST_VERSION, add_feature, check_etag, delete_keys, log_change, seen

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
    now = now_us()
    note_space(connection, new.space)
    settings = (new.max_entries, new.accept_probability, new.reject_probability, new.min_quality)
    connection.execute(
        "INSERT INTO collection (name, space_id, ttl_us, keep_crops, revision, created_us, max_entries, "
        "accept_probability, reject_probability, min_quality) VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, ?)",
        (new.name, new.space.space_id, new.ttl_us, new.keep_crops, now, *settings),
    )
    made = reads.collection(connection, new.name)
    connection.execute("INSERT INTO collection_space VALUES (?, ?, 'active', ?)", (made.key, new.space.space_id, now))
    return made


def note_space(connection: sqlite3.Connection, space: Space) -> None:
    """Remember a space, and the newest calibration told for it; one that is told without keeps what it has."""
    calibration = None if space.calibration is None else json.dumps(space.calibration.to_json())
    connection.execute(
        "INSERT INTO space (space_id, model_id, dim, created_us, model_version, calibration) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET model_version = excluded.model_version, "
        "calibration = coalesce(excluded.calibration, calibration)",
        (space.space_id, space.model_id, space.dim, now_us(), space.model_version, calibration),
    )


def delete_collection(connection: sqlite3.Connection, name: str, *, force: bool, etag: str = "") -> Collection:
    """Remove a collection with all it holds.

    Raises:
        CollectionNotFoundError: no such one.
        ConflictError: it was changed since ``etag`` was read.
        CollectionNotEmptyError: it has living entries, and ``force`` is not set.
    """
    gone = reads.collection(connection, name)
    check_etag(f"collection {name}", gone.etag, etag)
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

    What it refuses it refuses before it writes.

    Raises:
        CollectionNotFoundError: it was deleted meanwhile.
        EntryExistsError: the id is taken, and ``replace`` is not set.
        InputError: the request_id was used for another request.
        EntryNotFoundError: a replay, whose entry was deleted since.
    """
    space_id, most, held = _still_there(connection, into)
    if new.request_id and (replayed := _replayed(connection, into, new)):
        return replayed
    if space_id != into.space.space_id and space_id not in dict(new.others):
        raise ConflictError(
            f"collection {into.name} was switched to space {space_id} meanwhile, this entry has a feature in "
            f"{into.space.space_id} alone: enrol it again",
            field="collection_id",
        )
    now = now_us()
    expire_us = new.entry.expire_us
    if expire_us is None and into.ttl_us is not None:
        expire_us = now + into.ttl_us
    old, lives = _predecessor(connection, into, new)
    if most and held - (old is not None) >= most:
        _check_full(connection, into, most, leaving=int(lives))
    if old is not None:  # from here on nothing is refused
        delete_keys(connection, into.key, [old])
    entry = new.entry
    row = (into.key, entry.entry_id, entry.subject_id, entry.camera_id, entry.track_id, entry.capture_us, expire_us)
    cursor = connection.execute(
        "INSERT INTO entry (collection, entry_id, subject_id, camera_id, track_id, capture_us, expire_us, quality, "
        "shot_count, created_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, entry.quality, entry.shot_count, now),
    )
    key = cursor.lastrowid
    assert key is not None
    held_in = _spaces(connection, into.key) if new.others else {into.space.space_id}
    for space, feature in ((into.space.space_id, new.feature), *new.others):
        if space in held_in:  # else it was dropped meanwhile, and nothing would ever remove this
            add_feature(connection, key, space, feature)
    if entry.labels:
        connection.executemany("INSERT INTO label VALUES (?, ?, ?)", [(key, *label) for label in entry.labels.items()])
    if into.keep_crops and new.crops:
        crops = [(key, number, crop) for number, crop in enumerate(new.crops)]
        connection.executemany("INSERT INTO crop VALUES (?, ?, ?)", crops)
    revision = log_change(connection, into.key, [key], deleted=False)
    if new.request_id:
        connection.execute(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)", (new.request_id, new.digest, into.key, key, revision, now)
        )
    return Enrolled(
        replace(entry, created_us=now, expire_us=expire_us, etag=reads.entry_etag(key, FIRST_VERSION)), revision
    )


def enrol_each(
    connection: sqlite3.Connection, into: Collection, new: Sequence[Enrolment]
) -> list[Enrolled | ReIDError]:
    """Store those that can be stored; each has its own outcome, and they are stored in their order.

    As one write this takes half the time of as many writes.
    """
    outcomes: list[Enrolled | ReIDError] = []
    for one in new:
        try:
            outcomes.append(enrol(connection, into, one))
        except ReIDError as error:  # raised before anything of this one was written
            outcomes.append(error)
    return outcomes


def enrol_all(connection: sqlite3.Connection, into: Collection, new: Sequence[Enrolment]) -> list[Enrolled]:
    """Store all of them or, as the writer undoes a function that raises, none.

    Raises:
        ReIDError: as `enrol`, of the first that cannot be stored; its ``item`` fact tells which.
    """
    done = []
    for number, one in enumerate(new):
        try:
            done.append(enrol(connection, into, one))
        except ReIDError as error:
            error.facts["item"] = str(number)
            raise
    return done


def _still_there(connection: sqlite3.Connection, into: Collection) -> tuple[str, int, int]:
    """The collection's space, limit and rows held, now; the caller read it a moment ago."""
    row = connection.execute("SELECT space_id, max_entries, held FROM collection WHERE key = ?", (into.key,)).fetchone()
    if row is None:
        raise CollectionNotFoundError(
            f"collection {into.name} was deleted meanwhile: create it again",
            field="collection_id",
            collection=into.name,
        )
    space_id, most, held = row
    return space_id, most, held


def _spaces(connection: sqlite3.Connection, key: int) -> set[str]:
    """Ids of the spaces a collection has features in."""
    rows = connection.execute("SELECT space_id FROM collection_space WHERE collection = ?", (key,)).fetchall()
    return {row[0] for row in rows}


def _check_full(connection: sqlite3.Connection, into: Collection, most: int, *, leaving: int) -> None:
    """Refuse where as many entries live as may; expired ones that wait to be purged take no place."""
    living = reads.count(connection, into.key, Filter()) - leaving
    if living >= most:
        raise CollectionFullError(
            f"collection {into.name} holds {living} entries and may hold {most}: delete some, or raise max_entries",
            field="collection_id",
            collection=into.name,
            max_entries=most,
        )


def _replayed(connection: sqlite3.Connection, into: Collection, new: Enrolment) -> Enrolled | None:
    """The answer of the first call with this request_id, if there was one."""
    first = seen(connection, new.request_id, new.digest)
    if first is None:
        return None
    revision, entry_id = first
    if entry_id is None:
        raise EntryNotFoundError(
            f"the entry that request {new.request_id} enrolled was deleted since: enrol it with a new request_id",
            field="request_id",
            collection=into.name,
        )
    return Enrolled(reads.entry(connection, into, entry_id)[1], revision, replayed=True)


def _predecessor(connection: sqlite3.Connection, into: Collection, new: Enrolment) -> tuple[int | None, bool]:
    """The key of an expired or replaced entry of the same id, and whether it lives; refuses where one must stay."""
    row = connection.execute(
        "SELECT key, expire_us FROM entry WHERE collection = ? AND entry_id = ?", (into.key, new.entry.entry_id)
    ).fetchone()
    if row is None:
        return None, False
    key, expire_us = row
    living = expire_us is None or expire_us > now_us()
    if living and not new.replace:
        raise EntryExistsError(
            f"entry {new.entry.entry_id!r} exists in collection {into.name}: choose another id, or ask to replace it",
            field="entry.entry_id",
            entry=new.entry.entry_id,
            collection=into.name,
        )
    return key, living


def delete_entry(
    connection: sqlite3.Connection, found_in: Collection, entry_id: str, *, allow_missing: bool, etag: str = ""
) -> int:
    """Remove one entry; returns the collection's revision.

    Raises:
        EntryNotFoundError: no such one, and ``allow_missing`` is not set.
        ConflictError: it was changed since ``etag`` was read.
    """
    try:
        key, found = reads.entry(connection, found_in, entry_id)
        check_etag(f"entry {entry_id!r}", found.etag, etag)
    except EntryNotFoundError:
        if allow_missing:
            return reads.revision(connection, found_in.key)
        raise
    return delete_keys(connection, found_in.key, [key])


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
    return len(keys), delete_keys(connection, found_in.key, keys)


def purge(connection: sqlite3.Connection) -> int:
    """Remove expired entries; returns how many, at most `PURGE_AT_ONCE`."""
    rows = connection.execute(
        "SELECT collection, key FROM entry WHERE expire_us <= ? ORDER BY expire_us LIMIT ?", (now_us(), PURGE_AT_ONCE)
    ).fetchall()
    for collection in {row[0] for row in rows}:
        delete_keys(connection, collection, [key for owner, key in rows if owner == collection])
    return len(rows)


def forget(connection: sqlite3.Connection, taken_in: Sequence[tuple[int, int]]) -> None:
    """Remove old requests, and the part of the change log the index has taken in: (collection key, revision) each."""
    connection.execute("DELETE FROM request WHERE at_us < ?", (now_us() - REQUEST_MEMORY_US,))
    connection.executemany("DELETE FROM change WHERE collection = ? AND revision <= ?", taken_in)
