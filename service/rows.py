"""What every write to the gallery's database is made of: functions of the writer's connection, in its transaction."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Sequence

from resight.errors import ConflictError, InputError
from resight.service import reads
from resight.service.runtime import Feature

FIRST_VERSION = 1  # of an entry or a collection, as the tables' default
NO_ENTRY = 0  # keys begin at 1


def add_feature(connection: sqlite3.Connection, key: int, space_id: str, feature: Feature) -> None:
    """Store an entry's feature in a space, float32 (D,); one that is there is replaced."""
    vector = feature.astype("<f4").tobytes()
    connection.execute("REPLACE INTO feature VALUES (?, ?, ?, ?)", (key, space_id, vector, zlib.crc32(vector)))


def check_etag(what: str, current: str, expected: str) -> None:
    """Compare an etag where the caller gave one.

    Raises:
        ConflictError: it differs.
    """
    if expected and expected != current:
        raise ConflictError(
            f"{what} was changed meanwhile (etag {current}, expected {expected}): read it again, then decide",
            field="etag",
            etag=current,
        )


def delete_keys(connection: sqlite3.Connection, collection: int, keys: Sequence[int]) -> int:
    """Remove entries of one collection by key; returns its revision."""
    gone = connection.executemany("DELETE FROM entry WHERE key = ?", [(key,) for key in keys]).rowcount
    connection.execute("UPDATE collection SET held = held - ? WHERE key = ?", (max(0, gone), collection))
    return log_change(connection, collection, keys, deleted=True)


def log_change(connection: sqlite3.Connection, collection: int, keys: Sequence[int], *, deleted: bool) -> int:
    """Note a change of the collection and return its revision, which only ever grows.

    Args:
        connection: the writer's.
        collection: its key.
        keys: of the entries that came or went; `NO_ENTRY` for a change that no index holds.
        deleted: they went.
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


def seen(connection: sqlite3.Connection, request_id: str, digest: bytes) -> tuple[int, str | None] | None:
    """What the first call with this request_id came to: its revision and its entry's id, None if that is gone.

    Raises:
        InputError: it was another request.
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
            f"request_id {request_id} was used for another request: take a new one for each", field="request_id"
        )
    return revision, entry_id
