"""Writes with the row of the audit that tells of them: functions of the writer's connection, in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace

from resight.errors import ReIDError
from resight.service import audit, changes, reads, spaces, writes
from resight.service.audit import Event
from resight.service.entries import Collection, Enrolled, Enrolment, Entry, Filter


def enrol_each(
    connection: sqlite3.Connection, into: Collection, new: Sequence[Enrolment], event: Event
) -> list[Enrolled | ReIDError]:
    """`resight.service.writes.enrol_each`, told; what a replay answers is not counted again."""
    outcomes = writes.enrol_each(connection, into, new)
    _enrolled(connection, into, outcomes, event)
    return outcomes


def enrol_all(
    connection: sqlite3.Connection, into: Collection, new: Sequence[Enrolment], event: Event
) -> list[Enrolled]:
    """`resight.service.writes.enrol_all`, told likewise."""
    done = writes.enrol_all(connection, into, new)
    _enrolled(connection, into, done, event)
    return done


def _enrolled(
    connection: sqlite3.Connection, into: Collection, outcomes: Sequence[Enrolled | ReIDError], event: Event
) -> None:
    new = sum(isinstance(one, Enrolled) and not one.replayed for one in outcomes)
    audit.record(connection, replace(event, collection=into.name, affected=new))


def update_entry(
    connection: sqlite3.Connection,
    found_in: Collection,
    new: Entry,
    fields: Iterable[str],
    event: Event,
    *,
    etag: str = "",
    may_outlive: bool = True,
) -> Enrolled:
    """`resight.service.changes.update_entry`, told."""
    changed = changes.update_entry(connection, found_in, new, fields, etag=etag, may_outlive=may_outlive)
    audit.record(connection, replace(event, collection=found_in.name, affected=1))
    return changed


def activate_space(
    connection: sqlite3.Connection, name: str, space_id: str, event: Event, *, expected: str, allow_incomplete: bool
) -> Collection:
    """`resight.service.spaces.activate`, told with the number of entries."""
    found = spaces.activate(connection, name, space_id, expected=expected, allow_incomplete=allow_incomplete)
    count = reads.count(connection, found.key, Filter())
    audit.record(connection, replace(event, collection=name, affected=count, reason=f"space {space_id}"))
    return found


def delete_collection(
    connection: sqlite3.Connection, name: str, event: Event, *, force: bool, etag: str = ""
) -> Collection:
    """`resight.service.writes.delete_collection`, told."""
    held = reads.count(connection, reads.collection(connection, name).key, Filter())
    gone = writes.delete_collection(connection, name, force=force, etag=etag)
    audit.record(connection, replace(event, collection=name, affected=held))
    return gone


def delete_entry(
    connection: sqlite3.Connection,
    found_in: Collection,
    entry_id: str,
    event: Event,
    *,
    allow_missing: bool,
    etag: str = "",
) -> int:
    """`resight.service.writes.delete_entry`, told."""
    before = reads.revision(connection, found_in.key)
    revision = writes.delete_entry(connection, found_in, entry_id, allow_missing=allow_missing, etag=etag)
    audit.record(connection, replace(event, collection=found_in.name, affected=int(revision != before)))
    return revision


def delete_entries(
    connection: sqlite3.Connection, found_in: Collection, filters: Filter, event: Event, *, cap: int | None
) -> tuple[int, int]:
    """`resight.service.writes.delete_entries`, told."""
    count, revision = writes.delete_entries(connection, found_in, filters, cap=cap)
    audit.record(connection, replace(event, collection=found_in.name, affected=count))
    return count, revision
