"""Deletions with the row of the audit that tells of them: functions of the writer's connection, in one transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from resight.service import audit, reads, writes
from resight.service.audit import Event
from resight.service.entries import Collection, Filter


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
