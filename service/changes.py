"""What may be changed afterwards: functions of the writer's connection, inside its transaction.

A change takes an old name or picture away, so run them with `Store.erase`, which empties the log of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from resight.errors import InputError
from resight.service import reads
from resight.service.entries import Collection, Enrolled, Entry
from resight.service.rows import NO_ENTRY, check_etag, log_change

ENTRY_FIELDS = ("subject_id", "labels", "expire_us")
CLOCKS_US = 60_000_000  # a caller's clock may be ahead of ours
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
    found_in: Collection,
    new: Entry,
    fields: Iterable[str],
    *,
    etag: str = "",
    may_outlive: bool = True,
) -> Enrolled:
    """Change an entry in place: its key, feature and crops stay.

    Args:
        connection: the writer's.
        found_in: its collection.
        new: carries ``entry_id`` and the named fields; ``expire_us`` None means the collection's time to live,
            counted from enrolment.
        fields: of `ENTRY_FIELDS`, at least one.
        etag: compared where it is not empty.
        may_outlive: it may expire later than the collection's time to live after its enrolment.

    Raises:
        EntryNotFoundError: no such one.
        ConflictError: it was changed since ``etag`` was read.
        InputError: no field, one that cannot be changed, or a time it may not live to.
    """
    wanted = _wanted(fields, ENTRY_FIELDS)
    key, found = reads.entry(connection, found_in, new.entry_id)
    check_etag(f"entry {new.entry_id!r}", found.etag, etag)
    if "subject_id" in wanted:
        connection.execute("UPDATE entry SET subject_id = ? WHERE key = ?", (new.subject_id, key))
    if "expire_us" in wanted:
        expire_us = new.expire_us
        if expire_us is None and found_in.ttl_us is not None:
            expire_us = found.created_us + found_in.ttl_us
        if not may_outlive and (error := outlives(found_in, expire_us, found.created_us)):
            raise error
        connection.execute("UPDATE entry SET expire_us = ? WHERE key = ?", (expire_us, key))
    if "labels" in wanted:
        connection.execute("DELETE FROM label WHERE entry = ?", (key,))
        connection.executemany("INSERT INTO label VALUES (?, ?, ?)", [(key, *label) for label in new.labels.items()])
    connection.execute("UPDATE entry SET version = version + 1 WHERE key = ?", (key,))
    revision = log_change(connection, found_in.key, [NO_ENTRY], deleted=False)
    return Enrolled(reads.entry_by_key(connection, key), revision)


def outlives(of: Collection, expire_us: int | None, since_us: int) -> InputError | None:
    """What is wrong with a time to expire at that lies beyond the collection's own, counted from ``since_us``."""
    if of.ttl_us is None or expire_us is None or expire_us <= since_us + of.ttl_us + CLOCKS_US:
        return None
    days = of.ttl_us / 86_400e6
    return InputError(
        f"entries of collection {of.name} live {days:g} days, this one would live longer: give an earlier expire_time, "
        "leave it out, or ask an operator",
        field="entry.expire_time",
    )


def update_collection(
    connection: sqlite3.Connection, new: Collection, fields: Iterable[str], *, etag: str = ""
) -> Collection:
    """Change a collection's settings; entries keep the time they expire at.

    Crops of a collection that keeps none any more are removed. A limit below what it holds refuses new entries only.

    Args:
        connection: the writer's.
        new: carries ``name`` and the named fields.
        fields: of `COLLECTION_FIELDS`, at least one.
        etag: compared where it is not empty.

    Raises:
        CollectionNotFoundError: no such one.
        ConflictError: it was changed since ``etag`` was read.
        InputError: no field, or one that cannot be changed.
    """
    wanted = _wanted(fields, COLLECTION_FIELDS)
    found = reads.collection(connection, new.name)
    check_etag(f"collection {new.name}", found.etag, etag)
    values: list[Any] = [getattr(new, name) for name in wanted]
    connection.execute(
        f"UPDATE collection SET {', '.join(f'{name} = ?' for name in wanted)}, version = version + 1 WHERE key = ?",
        (*values, found.key),
    )
    if "keep_crops" in wanted and not new.keep_crops:
        connection.execute("DELETE FROM crop WHERE entry IN (SELECT key FROM entry WHERE collection = ?)", (found.key,))
    return reads.collection(connection, new.name)


def _wanted(fields: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """The fields asked for, each once, in our order: they go into a statement, so none but these."""
    asked = set(fields)
    unknown = sorted(asked - set(known))
    if unknown or not asked:
        raise InputError(
            f"one or more of {', '.join(known)} can be changed, found {', '.join(unknown) or 'none'}: name them in "
            "update_mask",
            field="update_mask",
        )
    return [name for name in known if name in asked]
