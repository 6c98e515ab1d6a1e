"""Writes to the gallery's database: functions of the writer's connection, inside its transaction.

Each raises before it has written anything, or its caller rolls back; none commits. Changes that remove personal data,
such as an old subject or image, must run with `Store.erase`, which also empties the write-ahead log.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from resight.arrays import Feature
from resight.errors import (
    CollectionExistsError,
    CollectionFullError,
    CollectionNotEmptyError,
    CollectionNotFoundError,
    ConflictError,
    DeleteCapError,
    EntryExistsError,
    EntryNotFoundError,
    InputError,
    ReIDError,
)
from resight.service.records import Collection, Enrolled, Enrolment, EntryRecord, Filter, Space, now_us
from resight.service.storage import reads

FIRST_ENTRY_VERSION = 1  # the default of the tables' version columns
NO_ENTRY = 0  # keys start at 1


def add_feature(connection: sqlite3.Connection, key: int, space_id: str, feature: Feature) -> None:
    """Store an entry's feature in a space, float32 (D,), replacing an existing one."""
    vector = feature.astype("<f4").tobytes()
    connection.execute("REPLACE INTO feature VALUES (?, ?, ?, ?)", (key, space_id, vector, zlib.crc32(vector)))


def check_etag(what: str, current: str, expected: str) -> None:
    """Compare the current etag with the one the caller expects; empty = any.

    Raises:
        ConflictError: they differ.
    """
    if expected and expected != current:
        raise ConflictError(
            f"{what} was changed in the meantime (etag {current}, expected {expected}): read it again, then decide",
            field="etag",
            etag=current,
        )


def delete_keys(connection: sqlite3.Connection, collection: int, keys: Sequence[int]) -> int:
    """Remove entries of one collection by key; returns its revision."""
    deleted = connection.executemany("DELETE FROM entry WHERE key = ?", [(key,) for key in keys]).rowcount
    connection.execute("UPDATE collection SET held = held - ? WHERE key = ?", (max(0, deleted), collection))
    return log_change(connection, collection, keys, deleted=True)


def log_change(connection: sqlite3.Connection, collection: int, keys: Sequence[int], *, deleted: bool) -> int:
    """Append to the change log of a collection and return its new revision; revisions only increase.

    Args:
        connection: the writer's.
        collection: its key.
        keys: of the added or deleted entries; `NO_ENTRY` for a change that does not concern the index.
        deleted: the entries were deleted; else added.
    """
    if not keys:
        return reads.revision(connection, collection)
    for key in keys:
        cursor = connection.execute(
            "INSERT INTO change (collection, entry, deleted) VALUES (?, ?, ?)", (collection, key, deleted)
        )
    revision = cursor.lastrowid
    assert revision is not None
    connection.execute(
        "UPDATE collection SET revision = ?, held = held + ? WHERE key = ?",
        (revision, 0 if deleted else sum(key != NO_ENTRY for key in keys), collection),
    )
    return revision


def earlier_request(connection: sqlite3.Connection, request_id: str, digest: bytes) -> tuple[int, str | None] | None:
    """The outcome of an earlier call with this request_id: its revision and the entry's id, None if deleted since.

    Returns None if there was no such call.

    Raises:
        InputError: the request_id was used for another request.
    """
    row = connection.execute(
        "SELECT r.digest, r.revision, e.entry_id FROM request r LEFT JOIN entry e ON e.key = r.entry "
        "WHERE request_id IN (?1, keyed(?1))",  # keyed once its entry was erased
        (request_id,),
    ).fetchone()
    if row is None:
        return None
    known, revision, entry_id = row
    if known and known != digest:
        raise InputError(
            f"request_id {request_id} was used for another request: use a new one for each", field="request_id"
        )
    return revision, entry_id


REQUEST_MEMORY_US = 24 * 3600 * 1_000_000  # how long a replay is recognised
PURGE_AT_ONCE = 1000  # entries per transaction, so that enrolments do not wait for a large purge


def create_collection(connection: sqlite3.Connection, new: Collection) -> Collection:
    """Create an empty collection in a space.

    Raises:
        CollectionExistsError: a collection of that name exists.
    """
    if connection.execute("SELECT 1 FROM collection WHERE name = ?", (new.name,)).fetchone():
        raise CollectionExistsError(
            f"collection {new.name} exists: use it, or choose another name",
            field="collection.collection_id",
            collection=new.name,
        )
    now = now_us()
    save_space(connection, new.space)
    settings = (new.max_entries, new.accept_probability, new.reject_probability, new.min_quality)
    connection.execute(
        "INSERT INTO collection (name, space_id, ttl_us, keep_crops, revision, created_us, max_entries, "
        "accept_probability, reject_probability, min_quality) VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?, ?)",
        (new.name, new.space.space_id, new.ttl_us, new.keep_crops, now, *settings),
    )
    made = reads.collection(connection, new.name)
    connection.execute("INSERT INTO collection_space VALUES (?, ?, 'active', ?)", (made.key, new.space.space_id, now))
    return made


def save_space(connection: sqlite3.Connection, space: Space) -> None:
    """Insert or update a space; without a new calibration, the stored one is kept."""
    calibration = None if space.calibration is None else json.dumps(space.calibration.to_json())
    connection.execute(
        "INSERT INTO space (space_id, model_id, dim, created_us, model_version, calibration) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET model_version = excluded.model_version, "
        "calibration = coalesce(excluded.calibration, calibration)",
        (space.space_id, space.model_id, space.dim, now_us(), space.model_version, calibration),
    )


def delete_collection(connection: sqlite3.Connection, name: str, *, force: bool, etag: str = "") -> Collection:
    """Remove a collection with all its entries; returns the removed collection.

    Raises:
        CollectionNotFoundError: it does not exist.
        ConflictError: it was changed since ``etag`` was read.
        CollectionNotEmptyError: it has unexpired entries, and ``force`` is not set.
    """
    found = reads.collection(connection, name)
    check_etag(f"collection {name}", found.etag, etag)
    count = reads.count(connection, found.key, Filter())
    if count and not force:
        raise CollectionNotEmptyError(
            f"collection {name} has {count} entries: delete them first, or set force",
            field="force",
            collection=name,
            entry_count=count,
        )
    connection.execute("DELETE FROM collection WHERE key = ?", (found.key,))
    return found


def enrol(connection: sqlite3.Connection, collection: Collection, new: Enrolment) -> Enrolled:
    """Store one entry with its features, labels and, if the collection keeps them, crops.

    All checks come before the first write, so a refused enrolment has written nothing.

    Raises:
        CollectionNotFoundError: the collection was deleted in the meantime.
        CollectionFullError: it has ``max_entries`` unexpired entries.
        ConflictError: it was switched to a space in which the entry has no feature.
        EntryExistsError: the id exists, and ``replace`` is not set.
        InputError: the request_id was used for another request.
        EntryNotFoundError: a replay whose entry was deleted since.
    """
    space_id, max_entries, stored = _collection_now(connection, collection)
    if new.request_id and (replayed := _earlier_answer(connection, collection, new)):
        return replayed
    if space_id != collection.space.space_id and space_id not in dict(new.others):
        raise ConflictError(
            f"collection {collection.name} was switched to space {space_id} in the meantime, this entry has a feature "
            f"only in {collection.space.space_id}: enrol it again",
            field="collection_id",
        )
    now = now_us()
    expire_us = new.entry.expire_us
    if expire_us is None and collection.ttl_us is not None:
        expire_us = now + collection.ttl_us
    old, unexpired = _predecessor(connection, collection, new)
    if max_entries and stored - (old is not None) >= max_entries:
        _check_full(connection, collection, max_entries, leaving=int(unexpired))
    if old is not None:  # all checks have passed
        delete_keys(connection, collection.key, [old])
    entry = new.entry
    row = (
        collection.key,
        entry.entry_id,
        entry.subject_id,
        entry.camera_id,
        entry.track_id,
        entry.capture_us,
        expire_us,
    )
    cursor = connection.execute(
        "INSERT INTO entry (collection, entry_id, subject_id, camera_id, track_id, capture_us, expire_us, quality, "
        "shot_count, created_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, entry.quality, entry.shot_count, now),
    )
    key = cursor.lastrowid
    assert key is not None
    existing = _spaces(connection, collection.key) if new.others else {collection.space.space_id}
    for space, feature in ((collection.space.space_id, new.feature), *new.others):
        if space in existing:  # else it was dropped in the meantime, and nothing would ever remove the feature
            add_feature(connection, key, space, feature)
    if entry.labels:
        connection.executemany("INSERT INTO label VALUES (?, ?, ?)", [(key, *label) for label in entry.labels.items()])
    if collection.keep_crops and new.crops:
        crops = [(key, number, crop) for number, crop in enumerate(new.crops)]
        connection.executemany("INSERT INTO crop VALUES (?, ?, ?)", crops)
    revision = log_change(connection, collection.key, [key], deleted=False)
    if new.request_id:
        connection.execute(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)",
            (new.request_id, new.digest, collection.key, key, revision, now),
        )
    return Enrolled(
        replace(entry, created_us=now, expire_us=expire_us, etag=reads.entry_etag(key, FIRST_ENTRY_VERSION)), revision
    )


def enrol_each(
    connection: sqlite3.Connection, collection: Collection, new: Sequence[Enrolment]
) -> list[Enrolled | ReIDError]:
    """Store entries in their order; each has its own outcome, so a failed one does not affect the others.

    In one transaction this takes half the time of separate ones.
    """
    outcomes: list[Enrolled | ReIDError] = []
    for one in new:
        try:
            outcomes.append(enrol(connection, collection, one))
        except ReIDError as error:  # raised before anything of this entry was written
            outcomes.append(error)
    return outcomes


def enrol_all(connection: sqlite3.Connection, collection: Collection, new: Sequence[Enrolment]) -> list[Enrolled]:
    """Store all entries or none: the writer rolls back when a function raises.

    Raises:
        ReIDError: as `enrol`, for the first entry that cannot be stored; its fact ``item`` is the entry's position.
    """
    done = []
    for number, one in enumerate(new):
        try:
            done.append(enrol(connection, collection, one))
        except ReIDError as error:
            error.facts["item"] = str(number)
            raise
    return done


def _collection_now(connection: sqlite3.Connection, collection: Collection) -> tuple[str, int, int]:
    """The collection's current space, limit and number of stored rows, which may have changed since it was read.

    Raises:
        CollectionNotFoundError: it was deleted in the meantime.
    """
    row = connection.execute(
        "SELECT space_id, max_entries, held FROM collection WHERE key = ?", (collection.key,)
    ).fetchone()
    if row is None:
        raise CollectionNotFoundError(
            f"collection {collection.name} was deleted in the meantime: create it again",
            field="collection_id",
            collection=collection.name,
        )
    space_id, max_entries, stored = row
    return space_id, max_entries, stored


def _spaces(connection: sqlite3.Connection, key: int) -> set[str]:
    """Ids of all spaces of a collection."""
    rows = connection.execute("SELECT space_id FROM collection_space WHERE collection = ?", (key,)).fetchall()
    return {row[0] for row in rows}


def _check_full(connection: sqlite3.Connection, collection: Collection, max_entries: int, *, leaving: int) -> None:
    """Raise if the collection is full; expired entries that are not purged yet do not count."""
    unexpired = reads.count(connection, collection.key, Filter()) - leaving
    if unexpired >= max_entries:
        raise CollectionFullError(
            f"collection {collection.name} has {unexpired} entries, at most {max_entries} are allowed: delete some, or "
            "raise max_entries",
            field="collection_id",
            collection=collection.name,
            max_entries=max_entries,
        )


def _earlier_answer(connection: sqlite3.Connection, collection: Collection, new: Enrolment) -> Enrolled | None:
    """The result of an earlier call with this request_id, if there was one."""
    first = earlier_request(connection, new.request_id, new.digest)
    if first is None:
        return None
    revision, entry_id = first
    if entry_id is None:
        raise EntryNotFoundError(
            f"the entry that request {new.request_id} enrolled was deleted since: enrol it with a new request_id",
            field="request_id",
            collection=collection.name,
        )
    return Enrolled(reads.entry(connection, collection, entry_id)[1], revision, replayed=True)


def _predecessor(connection: sqlite3.Connection, collection: Collection, new: Enrolment) -> tuple[int | None, bool]:
    """The key of an existing entry of the same id, and whether it is unexpired.

    Raises:
        EntryExistsError: it is unexpired, and ``new.replace`` is not set.
    """
    row = connection.execute(
        "SELECT key, expire_us FROM entry WHERE collection = ? AND entry_id = ?", (collection.key, new.entry.entry_id)
    ).fetchone()
    if row is None:
        return None, False
    key, expire_us = row
    unexpired = expire_us is None or expire_us > now_us()
    if unexpired and not new.replace:
        raise EntryExistsError(
            f"entry {new.entry.entry_id!r} exists in collection {collection.name}: choose another id, or set replace",
            field="entry.entry_id",
            entry=new.entry.entry_id,
            collection=collection.name,
        )
    return key, unexpired


def delete_entry(
    connection: sqlite3.Connection, collection: Collection, entry_id: str, *, allow_missing: bool, etag: str = ""
) -> int:
    """Remove one entry; returns the collection's revision.

    Raises:
        EntryNotFoundError: it does not exist, and ``allow_missing`` is not set.
        ConflictError: it was changed since ``etag`` was read.
    """
    try:
        key, found = reads.entry(connection, collection, entry_id)
        check_etag(f"entry {entry_id!r}", found.etag, etag)
    except EntryNotFoundError:
        if allow_missing:
            return reads.revision(connection, collection.key)
        raise
    return delete_keys(connection, collection.key, [key])


def delete_entries(
    connection: sqlite3.Connection, collection: Collection, filters: Filter, *, cap: int | None
) -> tuple[int, int]:
    """Remove the entries that pass a filter; returns how many and the collection's revision.

    Raises:
        DeleteCapError: more than ``cap`` entries pass; none was deleted.
    """
    keys = reads.candidates(connection, collection.key, filters).tolist()
    if cap is not None and len(keys) > cap:
        raise DeleteCapError(
            f"{len(keys)} entries pass the filter, at most {cap} may be deleted: narrow the filter or raise "
            "max_deletes",
            field="max_deletes",
            matched_count=len(keys),
        )
    return len(keys), delete_keys(connection, collection.key, keys)


def purge(connection: sqlite3.Connection) -> int:
    """Remove at most `PURGE_AT_ONCE` expired entries, the longest expired first; returns how many."""
    rows = connection.execute(
        "SELECT collection, key FROM entry WHERE expire_us <= ? ORDER BY expire_us LIMIT ?", (now_us(), PURGE_AT_ONCE)
    ).fetchall()
    for collection in {row[0] for row in rows}:
        delete_keys(connection, collection, [key for owner, key in rows if owner == collection])
    return len(rows)


def purge_requests(connection: sqlite3.Connection, applied: Sequence[tuple[int, int]]) -> None:
    """Remove old requests, and the changes that all indexes have applied.

    Args:
        connection: the writer's.
        applied: collection keys, each with the revision up to which its changes are applied.
    """
    connection.execute("DELETE FROM request WHERE at_us < ?", (now_us() - REQUEST_MEMORY_US,))
    connection.executemany("DELETE FROM change WHERE collection = ? AND revision <= ?", applied)


ENTRY_FIELDS = ("subject_id", "labels", "expire_us")
CLOCK_TOLERANCE_US = 60_000_000  # a caller's clock may be ahead of ours
COLLECTION_FIELDS = (
    "ttl_us",
    "keep_crops",
    "max_entries",
    "accept_probability",
    "reject_probability",
    "min_quality",
)


def update_entry(
    connection: sqlite3.Connection,
    collection: Collection,
    new: EntryRecord,
    fields: Iterable[str],
    *,
    etag: str = "",
    may_outlive: bool = True,
) -> Enrolled:
    """Update fields of an entry; its key, features and crops are unchanged.

    Args:
        connection: the writer's.
        collection: its collection.
        new: has ``entry_id`` and the new values; ``expire_us`` None means the collection's time to live, counted from
            enrolment.
        fields: names from `ENTRY_FIELDS`, at least one.
        etag: expected etag; empty = any.
        may_outlive: allow a time of expiry beyond the collection's time to live.

    Raises:
        EntryNotFoundError: it does not exist.
        ConflictError: it was changed since ``etag`` was read.
        InputError: no field, one that cannot be changed, or an expiry too late.
    """
    changed = _known_fields(fields, ENTRY_FIELDS)
    key, found = reads.entry(connection, collection, new.entry_id)
    check_etag(f"entry {new.entry_id!r}", found.etag, etag)
    if "subject_id" in changed:
        connection.execute("UPDATE entry SET subject_id = ? WHERE key = ?", (new.subject_id, key))
    if "expire_us" in changed:
        expire_us = new.expire_us
        if expire_us is None and collection.ttl_us is not None:
            expire_us = found.created_us + collection.ttl_us
        if not may_outlive and (error := expiry_error(collection, expire_us, found.created_us)):
            raise error
        connection.execute("UPDATE entry SET expire_us = ? WHERE key = ?", (expire_us, key))
    if "labels" in changed:
        connection.execute("DELETE FROM label WHERE entry = ?", (key,))
        connection.executemany("INSERT INTO label VALUES (?, ?, ?)", [(key, *label) for label in new.labels.items()])
    connection.execute("UPDATE entry SET version = version + 1 WHERE key = ?", (key,))
    revision = log_change(connection, collection.key, [NO_ENTRY], deleted=False)
    return Enrolled(reads.entry_by_key(connection, key), revision)


def expiry_error(of: Collection, expire_us: int | None, since_us: int) -> InputError | None:
    """The error if a time of expiry is beyond the collection's time to live, counted from ``since_us``; else None."""
    if of.ttl_us is None or expire_us is None or expire_us <= since_us + of.ttl_us + CLOCK_TOLERANCE_US:
        return None
    days = of.ttl_us / 86_400e6
    return InputError(
        f"entries of collection {of.name} expire after {days:g} days, this one would expire later: give an earlier "
        "expire_time, leave it out, or have an operator set it",
        field="entry.expire_time",
    )


def update_collection(
    connection: sqlite3.Connection, new: Collection, fields: Iterable[str], *, etag: str = ""
) -> Collection:
    """Update a collection's settings; existing entries keep their time of expiry.

    Setting ``keep_crops`` to False removes the stored crops. A ``max_entries`` below the current number only refuses
    new entries.

    Args:
        connection: the writer's.
        new: has ``name`` and the new values.
        fields: names from `COLLECTION_FIELDS`, at least one.
        etag: expected etag; empty = any.

    Raises:
        CollectionNotFoundError: it does not exist.
        ConflictError: it was changed since ``etag`` was read.
        InputError: no field, or one that cannot be changed.
    """
    changed = _known_fields(fields, COLLECTION_FIELDS)
    found = reads.collection(connection, new.name)
    check_etag(f"collection {new.name}", found.etag, etag)
    values: list[Any] = [getattr(new, name) for name in changed]
    connection.execute(
        f"UPDATE collection SET {', '.join(f'{name} = ?' for name in changed)}, version = version + 1 WHERE key = ?",
        (*values, found.key),
    )
    if "keep_crops" in changed and not new.keep_crops:
        connection.execute("DELETE FROM crop WHERE entry IN (SELECT key FROM entry WHERE collection = ?)", (found.key,))
    return reads.collection(connection, new.name)


def _known_fields(fields: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """The requested fields, each once, in the order of ``known``; they become part of a statement, so only these."""
    requested = set(fields)
    unknown = sorted(requested - set(known))
    if unknown or not requested:
        raise InputError(
            f"expected one or more of {', '.join(known)}, found {', '.join(unknown) or 'none'}: name them in "
            "update_mask",
            field="update_mask",
        )
    return [name for name in known if name in requested]
