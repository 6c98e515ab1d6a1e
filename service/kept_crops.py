"""The crops that a collection keeps, one entry after the other: what a site's next model learns from.

Each is read at the moment it is asked for, so that nothing that was deleted or has expired meanwhile is answered,
however slowly the answers are taken.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from resight.service import reads
from resight.service.entries import Collection, Entry, Filter
from resight.service.store import Store

LOOK_AHEAD = 256  # keys read at a time; a key is 8 bytes, an entry with its crops up to a message


class Kept(NamedTuple):
    """An entry with its crops: image files as they were enrolled, in their order. ``key`` orders by enrolment."""

    key: int
    entry: Entry
    images: tuple[bytes, ...]


async def kept(
    store: Store, found_in: Collection, filters: Filter, *, since_us: int | None, after: int
) -> AsyncIterator[Kept]:
    """Entries with crops that are there when this begins, in order of enrolment.

    Args:
        store: of the tenant.
        found_in: the collection.
        filters: what passes.
        since_us: enrolled then or later; None = whenever.
        after: from the one after this key.
    """
    last = await store.read(_last, found_in.key)
    while keys := await store.read(_keys, found_in.key, filters, since_us, after, last):
        for key in keys:
            found = await store.read(_one, found_in.key, filters, key)
            if found is not None:
                yield found
        after = keys[-1]


def _last(connection: sqlite3.Connection, collection: int) -> int:
    (key,) = connection.execute(
        "SELECT coalesce(max(key), 0) FROM entry WHERE collection = ?", (collection,)
    ).fetchone()
    return int(key)


def _keys(
    connection: sqlite3.Connection, collection: int, filters: Filter, since_us: int | None, after: int, last: int
) -> list[int]:
    """The next keys that pass, of entries with crops."""
    passing = reads.where(collection, filters)
    rows = connection.execute(
        f"SELECT e.key FROM entry e WHERE {passing.sql} AND e.key > ? AND e.key <= ? AND e.created_us >= ? "
        "AND EXISTS (SELECT 1 FROM crop c WHERE c.entry = e.key) ORDER BY e.key LIMIT ?",
        (*passing.values, after, last, since_us or 0, LOOK_AHEAD),
    )
    return [row[0] for row in rows.fetchall()]


def _one(connection: sqlite3.Connection, collection: int, filters: Filter, key: int) -> Kept | None:
    """An entry with its crops; None if it went meanwhile, or they did."""
    entry = reads.confirmed(connection, collection, np.array([key]), filters).get(key)
    rows = connection.execute("SELECT image FROM crop WHERE entry = ? ORDER BY number", (key,)).fetchall()
    return Kept(key, entry, tuple(row[0] for row in rows)) if entry is not None and rows else None
