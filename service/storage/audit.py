"""The audit log: who searched, deleted or erased what, when and why. Triggers in the database make it append-only.

A row contains no crop, feature or name of a person: a subject is stored as a keyed hash
(`resight.service.storage.data_folder`). A write and its audit row share one transaction; the ``audited_*`` functions
combine the two. Searches do not wait for the disk: their rows are buffered and committed every `FLUSH_S`, so a crash
can lose the rows of the last `FLUSH_S` and of the commit in progress, and nothing else. When the disk is full, searches
continue and up to `MAX_WAITING` rows are buffered; rows beyond that are dropped and their number is written as a row of
its own (`LOST_EVENT`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from resight.errors import ReIDError
from resight.service.records import Collection, Enrolled, Enrolment, EntryRecord, Filter, now_us
from resight.service.storage import reads, spaces, writes
from resight.service.storage.store import Store

log = logging.getLogger(__name__)

FLUSH_S = 0.5
MAX_WAITING = 65_536
LOST_EVENT = "audit.lost"
PURGE_AT_ONCE = 10_000  # rows per transaction, so that enrolments do not wait for a large purge
MIN_RETENTION_S = 86_400  # also enforced by the trigger


@dataclass(frozen=True)
class AuditEvent:
    """One call that concerned personal data.

    Attributes:
        principal: the caller.
        method: of the API, such as ``SearchService.Search``.
        collection: its name; empty = all of the tenant.
        subject_hash: keyed hash of the subject; empty = no subject was named.
        affected: number of entries returned, deleted or erased.
        reason: as given by the caller.
        at_us: time of the call, microseconds since 1970.
        audit_id: the row's number, ascending; empty before it is written.
    """

    principal: str
    method: str
    collection: str = ""
    subject_hash: str = ""
    affected: int = 0
    reason: str = ""
    at_us: int = 0
    audit_id: str = ""


def record_event(connection: sqlite3.Connection, event: AuditEvent) -> str:
    """Write one row, in the caller's transaction; returns its id."""
    values = (event.at_us or now_us(), event.principal, event.method, event.collection, event.subject_hash)
    key = connection.execute(
        "INSERT INTO audit (at_us, principal, method, collection, subject_hash, affected, reason) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*values, event.affected, event.reason),
    ).lastrowid
    return str(key)


def list_events(
    connection: sqlite3.Connection, *, start_us: int | None, end_us: int | None, before: int | None, limit: int
) -> list[AuditEvent]:
    """Rows with ``start_us <= at_us < end_us`` and an id below ``before`` (None = unbounded), the newest first."""
    rows = connection.execute(
        "SELECT principal, method, collection, subject_hash, affected, reason, at_us, CAST(key AS TEXT) FROM audit "
        "WHERE (?1 IS NULL OR at_us >= ?1) AND (?2 IS NULL OR at_us < ?2) AND (?3 IS NULL OR key < ?3) "
        "ORDER BY key DESC LIMIT ?4",
        (start_us, end_us, before, limit),
    )
    return [AuditEvent(*row) for row in rows.fetchall()]


def purge_events(connection: sqlite3.Connection, before_us: int) -> int:
    """Remove rows older than ``before_us``, which must be at least a day ago; returns how many.

    At most `PURGE_AT_ONCE` rows are removed. The horizon only rises: setting the clock back removes nothing.
    """
    connection.execute("UPDATE audit_horizon SET before_us = ?1 WHERE before_us < ?1", (before_us,))
    return connection.execute(
        "DELETE FROM audit WHERE key IN (SELECT key FROM audit WHERE at_us < "
        "min(?, (SELECT before_us FROM audit_horizon)) LIMIT ?)",
        (before_us, PURGE_AT_ONCE),
    ).rowcount


async def purge_older_events(store: Store, retention_s: float) -> int:
    """Remove rows older than ``retention_s``, but never younger than `MIN_RETENTION_S`; returns how many."""
    before_us = now_us() - int(max(retention_s, MIN_RETENTION_S + 1) * 1e6)
    removed = total = await store.write_unchecked(purge_events, before_us)
    while removed == PURGE_AT_ONCE:
        removed = await store.write_unchecked(purge_events, before_us)
        total += removed
    return total


class WaitingEvents(NamedTuple):
    """Rows not yet on disk: their number, the time of the oldest (0 = none), and rows dropped since the start."""

    rows: int
    oldest_us: int
    lost: int


class AuditLog:
    """The audit log of one gallery's database. Call `start` and `stop` in the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[AuditEvent] = []
        self._lost = self._lost_ever = 0
        self._flushing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the task that writes the buffered rows every `FLUSH_S`."""
        self._flushing = asyncio.create_task(self._flush_forever(), name="audit")

    async def stop(self) -> None:
        """Stop the task and write the buffered rows; the store must still be open."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        await self.flush()

    def add(self, event: AuditEvent) -> None:
        """Buffer a row; it is on disk within `FLUSH_S` plus one commit."""
        if len(self._waiting) >= MAX_WAITING:
            self._lost += 1
            self._lost_ever += 1
        else:
            self._waiting.append(replace(event, at_us=event.at_us or now_us()))

    @property
    def waiting(self) -> WaitingEvents:
        """The rows that are not on disk yet."""
        oldest_us = self._waiting[0].at_us if self._waiting else 0
        return WaitingEvents(len(self._waiting), oldest_us, self._lost_ever)

    async def record(self, event: AuditEvent) -> str:
        """Write one row now; returns its id once it is on disk."""
        return await self._store.write_unchecked(record_event, event)

    async def list_events(
        self, *, start_us: int | None = None, end_us: int | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditEvent]:
        """As the function `list_events`, including the rows buffered until now."""
        await self.flush()
        return await self._store.read(list_events, start_us=start_us, end_us=end_us, before=before, limit=limit)

    async def flush(self) -> None:
        """Write the buffered rows; if the write fails, they stay buffered."""
        taken, lost = self._waiting, self._lost
        if not taken and not lost:
            return
        self._waiting, self._lost = [], 0
        events = [*taken, AuditEvent("", LOST_EVENT, affected=lost)] if lost else taken
        try:
            await self._store.write_unchecked(_record_events, events)
        except ReIDError as error:
            log.error("%d rows of the audit log could not be written, will retry: %s", len(taken), error)
            self._waiting = taken + self._waiting
            self._lost += lost

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()


def _record_events(connection: sqlite3.Connection, events: Sequence[AuditEvent]) -> None:
    for event in events:
        record_event(connection, event)


def audited_enrol_each(
    connection: sqlite3.Connection, collection: Collection, new: Sequence[Enrolment], event: AuditEvent
) -> list[Enrolled | ReIDError]:
    """`resight.service.storage.writes.enrol_each` with an audit row; replayed enrolments are not counted again."""
    outcomes = writes.enrol_each(connection, collection, new)
    _record_enrolments(connection, collection, outcomes, event)
    return outcomes


def audited_enrol_all(
    connection: sqlite3.Connection, collection: Collection, new: Sequence[Enrolment], event: AuditEvent
) -> list[Enrolled]:
    """`resight.service.storage.writes.enrol_all` with an audit row; replayed enrolments are not counted again."""
    done = writes.enrol_all(connection, collection, new)
    _record_enrolments(connection, collection, done, event)
    return done


def _record_enrolments(
    connection: sqlite3.Connection, collection: Collection, outcomes: Sequence[Enrolled | ReIDError], event: AuditEvent
) -> None:
    new = sum(isinstance(one, Enrolled) and not one.replayed for one in outcomes)
    record_event(connection, replace(event, collection=collection.name, affected=new))


def audited_update_entry(
    connection: sqlite3.Connection,
    collection: Collection,
    new: EntryRecord,
    fields: Iterable[str],
    event: AuditEvent,
    *,
    etag: str = "",
    may_outlive: bool = True,
) -> Enrolled:
    """`resight.service.storage.writes.update_entry` with an audit row."""
    changed = writes.update_entry(connection, collection, new, fields, etag=etag, may_outlive=may_outlive)
    record_event(connection, replace(event, collection=collection.name, affected=1))
    return changed


def audited_activate_space(
    connection: sqlite3.Connection,
    name: str,
    space_id: str,
    event: AuditEvent,
    *,
    expected: str,
    allow_incomplete: bool,
) -> Collection:
    """`resight.service.storage.spaces.activate_space` with an audit row that has the number of entries."""
    found = spaces.activate_space(connection, name, space_id, expected=expected, allow_incomplete=allow_incomplete)
    count = reads.count(connection, found.key, Filter())
    record_event(connection, replace(event, collection=name, affected=count, reason=f"space {space_id}"))
    return found


def audited_delete_collection(
    connection: sqlite3.Connection, name: str, event: AuditEvent, *, force: bool, etag: str = ""
) -> Collection:
    """`resight.service.storage.writes.delete_collection` with an audit row."""
    count = reads.count(connection, reads.collection(connection, name).key, Filter())
    deleted = writes.delete_collection(connection, name, force=force, etag=etag)
    record_event(connection, replace(event, collection=name, affected=count))
    return deleted


def audited_delete_entry(
    connection: sqlite3.Connection,
    collection: Collection,
    entry_id: str,
    event: AuditEvent,
    *,
    allow_missing: bool,
    etag: str = "",
) -> int:
    """`resight.service.storage.writes.delete_entry` with an audit row."""
    before = reads.revision(connection, collection.key)
    revision = writes.delete_entry(connection, collection, entry_id, allow_missing=allow_missing, etag=etag)
    record_event(connection, replace(event, collection=collection.name, affected=int(revision != before)))
    return revision


def audited_delete_entries(
    connection: sqlite3.Connection, collection: Collection, filters: Filter, event: AuditEvent, *, cap: int | None
) -> tuple[int, int]:
    """`resight.service.storage.writes.delete_entries` with an audit row."""
    count, revision = writes.delete_entries(connection, collection, filters, cap=cap)
    record_event(connection, replace(event, collection=collection.name, affected=count))
    return count, revision
