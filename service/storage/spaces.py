"""The feature spaces of a collection and their states: building, ready, active, retired, and then dropped.

New entries are written to all of a collection's spaces, so that switching and switching back lose nothing. Functions of
a connection: `begin_space` to `drop_retired_space` write and run in the writer's transaction, the others read.
"""

from __future__ import annotations

import sqlite3
from typing import Literal, NamedTuple

from resight.errors import ConflictError, InputError, SpaceMismatchError
from resight.service.records import Collection, Space, now_us
from resight.service.storage import reads
from resight.service.storage.writes import NO_ENTRY, log_change, save_space

SpaceState = Literal["building", "ready", "active", "retired"]

UNUSED_SPACE_US = 7 * 86_400_000_000  # a week, like the default for a retired space: time for an operator to switch


class CollectionSpace(NamedTuple):
    """One space of a collection: its state, since when, and how many entries have a feature in it."""

    space: Space
    state: SpaceState
    since_us: int
    entries: int


def begin_space(connection: sqlite3.Connection, name: str, space: Space) -> Collection:
    """Start to write new entries of a collection to another space as well; an existing space keeps its features.

    Raises:
        CollectionNotFoundError: no such collection.
        InputError: it is the active space.
    """
    found = reads.collection(connection, name)
    if space.space_id == found.space.space_id:
        raise InputError(f"collection {name} is searched in space {space.space_id} already: name another model")
    save_space(connection, space)
    connection.execute(
        "INSERT INTO collection_space VALUES (?, ?, 'building', ?) ON CONFLICT DO UPDATE SET state = 'building', "
        "since_us = excluded.since_us",
        (found.key, space.space_id, now_us()),
    )
    return reads.collection(connection, name)


def mark_space_ready(connection: sqlite3.Connection, found: Collection, space_id: str) -> None:
    """Set the state of a building space that passed its checks to ready."""
    connection.execute(
        "UPDATE collection_space SET state = 'ready', since_us = ? WHERE collection = ? AND space_id = ? AND "
        "state = 'building'",
        (now_us(), found.key, space_id),
    )


def activate_space(
    connection: sqlite3.Connection, name: str, space_id: str, *, expected: str, allow_incomplete: bool = False
) -> Collection:
    """Search a collection in another of its spaces from now on; the previous space is kept and still written to.

    Args:
        connection: the writer's.
        name: of the collection.
        space_id: one of its spaces.
        expected: the space the caller assumes to be active; empty = any.
        allow_incomplete: accept that entries without a feature in the space are no longer found.

    Raises:
        CollectionNotFoundError: no such collection.
        ConflictError: another space than ``expected`` is active.
        SpaceMismatchError: the collection or some of its entries have no features in that space.
    """
    found = reads.collection(connection, name)
    current = found.space.space_id
    if expected and expected != current:
        raise ConflictError(
            f"collection {name} is searched in space {current}, expected {expected}: it was switched in the meantime",
            field="expected_current_space_id",
            found_space_id=current,
        )
    if space_id == current:
        return found
    if space_id not in found.other_space_ids:
        raise SpaceMismatchError(
            f"collection {name} has no features in space {space_id}: migrate it first", field="space_id"
        )
    lacking = len(entries_without_feature(connection, found.key, space_id, after=0, limit=-1))
    if lacking and not allow_incomplete:
        raise SpaceMismatchError(
            f"{lacking} entries of collection {name} have no feature in space {space_id}: finish the migration, or "
            "allow it to be incomplete",
            field="space_id",
            missing_entries=lacking,
        )
    now = now_us()
    for state, of in (("retired", current), ("active", space_id)):
        connection.execute(
            "UPDATE collection_space SET state = ?, since_us = ? WHERE collection = ? AND space_id = ?",
            (state, now, found.key, of),
        )
    connection.execute(
        "UPDATE collection SET space_id = ?, previous_space_id = ?, version = version + 1 WHERE key = ?",
        (space_id, current, found.key),
    )
    log_change(connection, found.key, [NO_ENTRY], deleted=False)
    return reads.collection(connection, name)


def drop_space(connection: sqlite3.Connection, name: str, space_id: str) -> int:
    """Remove a collection's features in a space that is not active; returns how many. Run it with `Store.erase`.

    Raises:
        CollectionNotFoundError: no such collection.
        SpaceMismatchError: the space is active.
    """
    found = reads.collection(connection, name)
    if space_id == found.space.space_id:
        raise SpaceMismatchError(
            f"collection {name} is searched in space {space_id}: activate another one first", field="space_id"
        )
    removed = connection.execute(
        "DELETE FROM feature WHERE space_id = ? AND entry IN (SELECT key FROM entry WHERE collection = ?)",
        (space_id, found.key),
    ).rowcount
    connection.execute("DELETE FROM collection_space WHERE collection = ? AND space_id = ?", (found.key, space_id))
    connection.execute(
        "UPDATE collection SET version = version + 1, previous_space_id = nullif(previous_space_id, ?) WHERE key = ?",
        (space_id, found.key),
    )
    return removed


def drop_retired_space(connection: sqlite3.Connection, name: str, space_id: str, before_us: int) -> int:
    """`drop_space`, unless the space is in use again since, by a migration or a switch."""
    return (
        drop_space(connection, name, space_id)
        if (name, space_id) in spaces_retired_before(connection, before_us)
        else 0
    )


def spaces_retired_before(connection: sqlite3.Connection, before_us: int) -> list[tuple[str, str]]:
    """Pairs (collection name, space id) that a purge may drop: spaces retired before ``before_us``.

    Includes spaces that were migrated to but not activated within `UNUSED_SPACE_US`, such as those of refused models.
    """
    return connection.execute(
        "SELECT c.name, s.space_id FROM collection_space s JOIN collection c ON c.key = s.collection "
        "WHERE s.state = 'retired' AND s.since_us < ?1 OR s.state IN ('ready', 'building') AND s.since_us < ?2",
        (before_us, min(before_us, now_us() - UNUSED_SPACE_US)),
    ).fetchall()


def entries_without_feature(
    connection: sqlite3.Connection, key: int, space_id: str, *, after: int, limit: int
) -> list[int]:
    """Keys of entries without a feature in a space, ascending, starting after key ``after``."""
    rows = connection.execute(
        "SELECT e.key FROM entry e WHERE e.collection = ? AND e.key > ? AND NOT EXISTS (SELECT 1 FROM feature f WHERE "
        "f.entry = e.key AND f.space_id = ?) ORDER BY e.key LIMIT ?",
        (key, after, space_id, limit),
    )
    return [row[0] for row in rows.fetchall()]


def crops_of_entries(connection: sqlite3.Connection, keys: list[int]) -> dict[int, tuple[bytes, ...]]:
    """The stored crops by entry key, in the order they were enrolled; entries without crops are left out."""
    found: dict[int, tuple[bytes, ...]] = {}
    for key in keys:
        rows = connection.execute("SELECT image FROM crop WHERE entry = ? ORDER BY number", (key,)).fetchall()
        if rows:
            found[key] = tuple(row[0] for row in rows)
    return found


def collection_spaces(connection: sqlite3.Connection, key: int) -> list[CollectionSpace]:
    """The spaces of a collection, the active one first."""
    rows = connection.execute(
        "SELECT s.space_id, s.model_id, s.dim, s.model_version, s.calibration, c.state, c.since_us, (SELECT count(*) "
        "FROM feature f JOIN entry e ON e.key = f.entry WHERE e.collection = c.collection AND f.space_id = c.space_id) "
        "FROM collection_space c JOIN space s USING (space_id) WHERE c.collection = ? "
        "ORDER BY c.state <> 'active', c.since_us",
        (key,),
    ).fetchall()
    return [CollectionSpace(reads.space_of_row(row[:5]), *row[5:]) for row in rows]
