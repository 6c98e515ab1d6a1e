"""Reads of the gallery's database: functions of a connection, each one short read.

Expired entries are never returned, from the moment they expire. Stored crops are streamed entry by entry, each read
when it is requested, so that a slow client never receives what was deleted or has expired in the meantime.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature
from resight.calibration import Calibration
from resight.errors import CollectionNotFoundError, EntryNotFoundError, FormatError, StoreError
from resight.service.records import Collection, EntryRecord, Filter, Space, now_us
from resight.service.storage.store import Store

log = logging.getLogger(__name__)

Keys = NDArray[np.int64]
"""int64 (N,): keys of entries, ascending, which is the order of enrolment."""

_ENTRY = (
    "e.key, e.entry_id, e.subject_id, e.camera_id, e.track_id, e.capture_us, e.expire_us, "
    "(SELECT json_group_object(name, value) FROM label WHERE entry = e.key) AS labels, "
    "e.quality, e.shot_count, e.created_us, e.version"
)
_COLLECTION = (
    "SELECT s.space_id, s.model_id, s.dim, s.model_version, s.calibration, c.name, c.ttl_us, c.keep_crops, c.key, "
    "c.revision, c.max_entries, c.accept_probability, c.reject_probability, c.min_quality, "
    "coalesce(c.previous_space_id, ''), (SELECT json_group_array(space_id) FROM collection_space "
    "WHERE collection = c.key AND space_id <> c.space_id), c.version FROM collection c JOIN space s USING (space_id) "
)


class SqlCondition(NamedTuple):
    """An SQL condition on ``entry e`` and its parameters."""

    sql: str
    values: list[Any]


class ChangeSet(NamedTuple):
    """Changes for an index to apply: added entries, removed entries, and the revision reached."""

    added: Keys
    features: Feature
    removed: Keys
    revision: int


def entry_condition(key: int, filters: Filter) -> SqlCondition:
    """The condition for unexpired entries of a collection that pass a filter."""
    parts, values = ["e.collection = ?", "(e.expire_us IS NULL OR e.expire_us > ?)"], [key, now_us()]  # type: list[str], list[Any]
    for column, listed, verb in (
        ("camera_id", filters.camera_ids, "IN"),
        ("camera_id", filters.exclude_camera_ids, "NOT IN"),
        ("track_id", filters.track_ids, "IN"),
        ("track_id", filters.exclude_track_ids, "NOT IN"),
        ("subject_id", filters.subject_ids, "IN"),
        ("subject_id", filters.exclude_subject_ids, "NOT IN"),
        ("entry_id", filters.exclude_entry_ids, "NOT IN"),
    ):
        if listed:  # json_each: the same statement for every length of the list, so the statement cache works
            parts.append(f"e.{column} {verb} (SELECT value FROM json_each(?))")
            values.append(json.dumps(listed))
    for condition, bound in (
        ("e.capture_us >= ?", filters.start_us),
        ("e.capture_us < ?", filters.end_us),
        ("e.quality >= ?", filters.min_quality),
    ):
        if bound is not None:
            parts.append(condition)
            values.append(bound)
    for name, value in filters.labels:
        parts.append("EXISTS (SELECT 1 FROM label l WHERE l.entry = e.key AND l.name = ? AND l.value = ?)")
        values += [name, value]
    return SqlCondition(" AND ".join(parts), values)


def _collection(row: Sequence[Any]) -> Collection:
    name, ttl_us, keep_crops, key, revision, max_entries, accept, reject, quality, previous, others, version = row[5:]
    limits = (max_entries, accept, reject, quality, previous, tuple(json.loads(others)), version)
    return Collection(name, space_of_row(row[:5]), ttl_us, bool(keep_crops), key, revision, *limits)


def space_of_row(row: Sequence[Any]) -> Space:
    """A space from its columns space_id, model_id, dim, model_version and calibration."""
    space_id, model_id, dim, version, calibration = row
    return Space(space_id, model_id, dim, version, _calibration(calibration) if calibration else None)


@lru_cache(64)
def _calibration(text: str) -> Calibration | None:
    try:
        return Calibration.from_json(json.loads(text))
    except FormatError as error:  # of another version: similarities are still valid, without probabilities
        log.warning("a stored calibration cannot be read and is ignored: %s", error)
        return None


def _entry(row: Sequence[Any]) -> EntryRecord:
    key, entry_id, subject, camera, track, capture_us, expire_us, labels, quality, shots, created_us, version = row
    pairs = {} if labels == "{}" else json.loads(labels)  # most have none, and a search reads thousands
    etag = entry_etag(key, version)
    return EntryRecord(entry_id, subject, camera, track, capture_us, expire_us, pairs, quality, shots, created_us, etag)


def entry_etag(key: int, version: int) -> str:
    """An entry's etag: keys are never reused, so a new entry of the same id has a different one."""
    return f"{key:x}.{version:x}"


def collection(connection: sqlite3.Connection, name: str) -> Collection:
    """The collection of that name.

    Raises:
        CollectionNotFoundError: it does not exist.
    """
    row = connection.execute(_COLLECTION + "WHERE c.name = ?", (name,)).fetchone()
    if row is None:
        raise CollectionNotFoundError(
            f"no collection {name!r} here: create it first, or see which there are with ListCollections",
            field="collection_id",
            collection=name,
        )
    return _collection(row)


def collections(connection: sqlite3.Connection, *, after: str = "", limit: int = 1000) -> list[Collection]:
    """Collections in order of name, starting after ``after``."""
    rows = connection.execute(_COLLECTION + "WHERE c.name > ? ORDER BY c.name LIMIT ?", (after, limit))
    return [_collection(row) for row in rows.fetchall()]


def count_entries(connection: sqlite3.Connection, found: Sequence[Collection]) -> list[tuple[Collection, int]]:
    """Collections with the number of their unexpired entries, which takes a scan of their rows."""
    return [(one, count(connection, one.key, Filter())) for one in found]


def revision(connection: sqlite3.Connection, key: int) -> int:
    """The revision of the last committed write of a collection; -1 when it was deleted."""
    row = connection.execute("SELECT revision FROM collection WHERE key = ?", (key,)).fetchone()
    return -1 if row is None else int(row[0])


def entry(connection: sqlite3.Connection, collection: Collection, entry_id: str) -> tuple[int, EntryRecord]:
    """The unexpired entry of that id, with its key.

    Raises:
        EntryNotFoundError: it does not exist or has expired.
    """
    living = entry_condition(collection.key, Filter())
    row = connection.execute(
        f"SELECT {_ENTRY} FROM entry e WHERE {living.sql} AND e.entry_id = ?", (*living.values, entry_id)
    ).fetchone()
    if row is None:
        raise EntryNotFoundError(
            f"no entry {entry_id!r} in collection {collection.name}: it was never enrolled, was deleted or has expired",
            field="entry_id",
            entry=entry_id,
            collection=collection.name,
        )
    return row[0], _entry(row)


def entry_by_key(connection: sqlite3.Connection, key: int) -> EntryRecord:
    """The entry of a key that exists, whether expired or not."""
    return _entry(connection.execute(f"SELECT {_ENTRY} FROM entry e WHERE e.key = ?", (key,)).fetchone())


def entries(
    connection: sqlite3.Connection, key: int, filters: Filter, *, after: int, limit: int
) -> list[tuple[int, EntryRecord]]:
    """Unexpired entries that pass a filter, in order of enrolment, starting after key ``after``."""
    passing = entry_condition(key, filters)
    rows = connection.execute(
        f"SELECT {_ENTRY} FROM entry e WHERE {passing.sql} AND e.key > ? ORDER BY e.key LIMIT ?",
        (*passing.values, after, limit),
    )
    return [(row[0], _entry(row)) for row in rows.fetchall()]


def count(connection: sqlite3.Connection, key: int, filters: Filter) -> int:
    """Number of unexpired entries that pass a filter."""
    passing = entry_condition(key, filters)
    return int(connection.execute(f"SELECT count(*) FROM entry e WHERE {passing.sql}", passing.values).fetchone()[0])


def expired(connection: sqlite3.Connection, key: int) -> int:
    """Number of expired entries of a collection that are not purged yet."""
    row = connection.execute(
        "SELECT count(*) FROM entry WHERE collection = ? AND expire_us <= ?", (key, now_us())
    ).fetchone()
    return int(row[0])


def any_expired(connection: sqlite3.Connection) -> bool:
    """Whether there are expired entries to purge."""
    return connection.execute("SELECT 1 FROM entry WHERE expire_us <= ? LIMIT 1", (now_us(),)).fetchone() is not None


def candidates(connection: sqlite3.Connection, key: int, filters: Filter) -> Keys:
    """The keys of unexpired entries that pass a filter, ascending."""
    passing = entry_condition(key, filters)
    rows = connection.execute(f"SELECT e.key FROM entry e WHERE {passing.sql}", passing.values).fetchall()
    return np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))


def confirm_candidates(connection: sqlite3.Connection, key: int, keys: Keys, filters: Filter) -> dict[int, EntryRecord]:
    """The entries of ``keys`` that are unexpired, belong to the collection and pass the filter.

    This is the final check of every hit before it is returned.
    """
    passing = entry_condition(key, filters)
    rows = connection.execute(  # CROSS: look these few up by key instead of scanning an index that fits the filter
        f"SELECT {_ENTRY} FROM json_each(?) j CROSS JOIN entry e ON e.key = j.value WHERE {passing.sql}",
        (json.dumps(keys.tolist()), *passing.values),
    )
    return {row[0]: _entry(row) for row in rows.fetchall()}


def feature(connection: sqlite3.Connection, key: int, space: Space) -> Feature:
    """The stored feature of an entry.

    Raises:
        StoreError: the feature is missing or damaged.
    """
    rows = connection.execute(
        "SELECT entry, vector, crc32 FROM feature WHERE entry = ? AND space_id = ?", (key, space.space_id)
    ).fetchall()
    _, features = unpack_features(rows, space)
    if len(features) != 1:
        raise StoreError("the stored feature of this entry is damaged: delete the entry and enrol it again")
    vector: Feature = features[0]
    return vector


def changes_since(connection: sqlite3.Connection, key: int, space: Space, since: int) -> ChangeSet:
    """Changes of a collection after revision ``since``; with -1, all its entries."""
    connection.execute("BEGIN")  # the revision and the rows must be from one snapshot
    try:
        reached = revision(connection, key)
        if since < 0:
            chosen, values = "SELECT key FROM entry WHERE collection = ?", (key,)  # type: str, tuple[int, ...]
            deleted: list[tuple[int]] = []
        else:
            chosen, values = (
                "SELECT entry FROM change WHERE collection = ? AND revision > ? AND NOT deleted",
                (key, since),
            )
            deleted = connection.execute(
                "SELECT entry FROM change WHERE collection = ? AND revision > ? AND deleted", (key, since)
            ).fetchall()
        rows = connection.execute(
            f"SELECT entry, vector, crc32 FROM feature WHERE entry IN ({chosen}) AND space_id = ? ORDER BY entry",
            (*values, space.space_id),
        ).fetchall()
    finally:
        connection.execute("COMMIT")
    added, features = unpack_features(rows, space)
    removed = np.sort(np.fromiter((row[0] for row in deleted), np.int64, len(deleted)))
    return ChangeSet(added, features, removed, reached)


def unpack_features(rows: Sequence[tuple[int, bytes, int]], space: Space) -> tuple[Keys, Feature]:
    """Convert rows (key, vector, crc32) to keys and float32 (N, D); damaged ones are left out and logged."""
    good = [row for row in rows if len(row[1]) == 4 * space.dim and zlib.crc32(row[1]) == row[2]]
    if len(good) < len(rows):
        intact = {row[0] for row in good}
        damaged = [row[0] for row in rows if row[0] not in intact]
        log.error("damaged features are left out of searches; entries by key: %s", damaged[:20])
    keys = np.fromiter((row[0] for row in good), np.int64, len(good))
    packed = np.frombuffer(b"".join(row[1] for row in good), "<f4")
    return keys, packed.reshape(len(good), space.dim).astype(np.float32, copy=False)


LOOK_AHEAD = 256  # keys read at a time; a key is 8 bytes, an entry with its crops up to a whole message


class StoredCrops(NamedTuple):
    """An entry with its crops: the enrolled image files in their order. ``key`` ascends in order of enrolment."""

    key: int
    entry: EntryRecord
    images: tuple[bytes, ...]


async def stream_crops(
    store: Store, collection: Collection, filters: Filter, *, since_us: int | None, after: int
) -> AsyncIterator[StoredCrops]:
    """Entries with crops, in order of enrolment; entries enrolled after the call are not included.

    Args:
        store: of the tenant.
        collection: the collection.
        filters: that the entries must pass.
        since_us: earliest time of enrolment; None = any.
        after: start after this key.
    """
    last = await store.read(_last_key, collection.key)
    while keys := await store.read(_next_crop_keys, collection.key, filters, since_us, after, last):
        for key in keys:
            found = await store.read(_entry_crops, collection.key, filters, key)
            if found is not None:
                yield found
        after = keys[-1]


def _last_key(connection: sqlite3.Connection, collection: int) -> int:
    (key,) = connection.execute(
        "SELECT coalesce(max(key), 0) FROM entry WHERE collection = ?", (collection,)
    ).fetchone()
    return int(key)


def _next_crop_keys(
    connection: sqlite3.Connection, collection: int, filters: Filter, since_us: int | None, after: int, last: int
) -> list[int]:
    """The next `LOOK_AHEAD` keys of entries that have crops and pass the filter."""
    passing = entry_condition(collection, filters)
    rows = connection.execute(
        f"SELECT e.key FROM entry e WHERE {passing.sql} AND e.key > ? AND e.key <= ? AND e.created_us >= ? "
        "AND EXISTS (SELECT 1 FROM crop c WHERE c.entry = e.key) ORDER BY e.key LIMIT ?",
        (*passing.values, after, last, since_us or 0, LOOK_AHEAD),
    )
    return [row[0] for row in rows.fetchall()]


def _entry_crops(connection: sqlite3.Connection, collection: int, filters: Filter, key: int) -> StoredCrops | None:
    """An entry with its crops; None if the entry or its crops were removed in the meantime."""
    entry = confirm_candidates(connection, collection, np.array([key]), filters).get(key)
    rows = connection.execute("SELECT image FROM crop WHERE entry = ? ORDER BY number", (key,)).fetchall()
    return StoredCrops(key, entry, tuple(row[0] for row in rows)) if entry is not None and rows else None
