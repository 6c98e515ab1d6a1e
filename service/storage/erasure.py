"""Permanent erasure of a subject: from all tables and files and, at a restore, from an older snapshot.

The erase list records which subjects and entries must not be restored. Subjects are stored as keyed hashes and entries
as keys, which are never reused, so the list contains no names. It is kept in the database and, because a restore may
have no readable database, also in `LIST_FILE` beside it, one JSON line per erasure; the file is written first.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resight.errors import InputError, StorageFullError, StoreError
from resight.service.records import now_us
from resight.service.storage import audit, reads
from resight.service.storage.audit import AuditEvent
from resight.service.storage.data_folder import keyed_hash
from resight.service.storage.store import Store
from resight.service.storage.writes import delete_keys

LIST_FILE = "erased.jsonl"
RETRY_S = 0.05  # between attempts to empty the log while a reader uses it
MAX_REASON = 256  # characters

DropSegments = Callable[[int], Awaitable[None]]
"""Removes the index files of a collection, by key, from the disk."""


@dataclass(frozen=True)
class ErasureRecord:
    """One line of the erase list.

    Attributes:
        at_us: time of the erasure, microseconds since 1970.
        collection: its name; empty = all collections.
        subject_hash: keyed hash of the subject.
        up_to: the highest entry key at that time; entries of the subject with a higher key were enrolled later and
            are kept.
        entries: keys of the erased entries, removed again whatever subject an older snapshot has for them.
    """

    at_us: int
    collection: str
    subject_hash: str
    up_to: int
    entries: tuple[int, ...]


@dataclass(frozen=True)
class ErasureResult:
    """Result of an erasure; ``storage_scrubbed``: SQLite reported the write-ahead log emptied afterwards."""

    erased_count: int
    audit_id: str
    storage_scrubbed: bool


async def erase_subject(
    store: Store,
    subject_id: str,
    *,
    principal: str,
    deadline: float,
    collection: str = "",
    reason: str = "",
    drop_segments: Sequence[DropSegments] = (),
) -> ErasureResult:
    """Erase all entries of a subject, including expired ones; repeated for an erased subject, it reports 0 entries.

    Args:
        store: of the tenant.
        subject_id: not empty.
        principal: the caller, for the audit log.
        deadline: in `time.monotonic` seconds; how long to wait for readers that use the write-ahead log.
        collection: its name; empty = all collections.
        reason: at most `MAX_REASON` characters, for the audit log.
        drop_segments: called for each collection that had one of the entries.

    Raises:
        InputError: the subject is empty or the reason too long.
        CollectionNotFoundError: no such collection.
        StorageFullError: nothing was erased.
    """
    if not subject_id:
        raise InputError("expected a subject_id, found none: give that of the person to erase", field="subject_id")
    if len(reason) > MAX_REASON:
        raise InputError(f"a reason has at most {MAX_REASON} characters, found {len(reason)}", field="reason")
    event = AuditEvent(principal, "GalleryService.EraseSubject", collection, reason=reason)
    count, audit_id, touched = await store.erase(_erase_entries, store.key, store.folder / LIST_FILE, subject_id, event)
    for drop in drop_segments:
        await asyncio.gather(*(drop(key) for key in touched))
    return ErasureResult(count, audit_id, await scrub_until(store, deadline))


async def scrub_until(store: Store, deadline: float) -> bool:
    """Try to empty the write-ahead log until it succeeds or the deadline passes; returns whether it succeeded."""
    while not await store.scrub():
        if time.monotonic() + RETRY_S >= deadline:
            return False
        await asyncio.sleep(RETRY_S)
    return True


def _erase_entries(
    connection: sqlite3.Connection, key: bytes, list_file: Path, subject_id: str, event: AuditEvent
) -> tuple[int, str, list[int]]:
    """In the writer's transaction; returns the number of entries, the audit row's id and the affected collections."""
    collections = (
        [reads.collection(connection, event.collection)]
        if event.collection
        else reads.collections(connection, limit=-1)
    )
    found = {
        one.key: [
            row[0]
            for row in connection.execute(
                "SELECT key FROM entry WHERE collection = ? AND subject_id = ?", (one.key, subject_id)
            ).fetchall()
        ]
        for one in collections
    }
    entries = tuple(sorted(number for keys in found.values() for number in keys))
    up_to = connection.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'entry'").fetchone()[0]
    line = ErasureRecord(now_us(), event.collection, keyed_hash(key, subject_id), up_to, entries)
    append_erasures(list_file, [line])
    record_erasures(connection, [line])
    affected = {collection: keys for collection, keys in found.items() if keys}
    count = delete_erased(connection, affected)
    audit_id = audit.record_event(connection, replace(event, subject_hash=line.subject_hash, affected=count))
    return count, audit_id, list(affected)


def delete_erased(connection: sqlite3.Connection, entries: dict[int, list[int]]) -> int:
    """Remove entries, given as collection key to entry keys, with all rows that refer to them; returns how many.

    The enrolment requests of these entries are kept for a day under a hashed id, so that a replay does not enrol again.
    """
    for collection, keys in entries.items():
        connection.executemany(
            "UPDATE request SET request_id = keyed(request_id), digest = x'' WHERE entry = ?", [(key,) for key in keys]
        )
        delete_keys(connection, collection, keys)
    return sum(map(len, entries.values()))


def record_erasures(connection: sqlite3.Connection, lines: Iterable[ErasureRecord]) -> None:
    """Add lines to the erase list in the database; lines it has already are not added again."""
    known = set(erasures_in_database(connection))
    connection.executemany(
        "INSERT INTO erased (at_us, collection, subject_hash, up_to, entries) VALUES (?, ?, ?, ?, ?)",
        [
            (line.at_us, line.collection, line.subject_hash, line.up_to, json.dumps(line.entries))
            for line in lines
            if line not in known
        ],
    )


def erasures_in_database(connection: sqlite3.Connection) -> list[ErasureRecord]:
    """The erase list in the database."""
    rows = connection.execute("SELECT at_us, collection, subject_hash, up_to, entries FROM erased ORDER BY key")
    return [
        ErasureRecord(at_us, collection, subject_hash, up_to, tuple(json.loads(entries)))
        for at_us, collection, subject_hash, up_to, entries in rows.fetchall()
    ]


def append_erasures(path: Path, lines: Sequence[ErasureRecord]) -> None:
    """Append lines to the erase list's file and flush them to disk.

    Raises:
        StorageFullError: the write failed; readers skip an incomplete line.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, "".join(f"\n{json.dumps(asdict(line))}\n" for line in lines).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageFullError(f"{path.name} cannot be written: {error.strerror}: nothing was erased") from error


def erasures_in_file(path: Path) -> list[ErasureRecord]:
    """The erase list in the file; empty when there is no file.

    Raises:
        StoreError: a line is damaged, other than one cut short by a crash.
    """
    return list(_read_erasures(path)) if path.exists() else []


def _read_erasures(path: Path) -> Iterator[ErasureRecord]:
    text = path.read_text().split("\n")
    for number, row in enumerate(text):
        if not row:
            continue
        try:
            body = json.loads(row)
            yield ErasureRecord(**body | {"entries": tuple(body["entries"])})
        except (ValueError, TypeError, KeyError) as error:
            if row.startswith("{") and not row.endswith("}"):  # cut short by a full disk; its call failed
                continue
            raise StoreError(f"{path.name} line {number + 1} is damaged: restore it from a backup") from error


def replay_erasures(connection: sqlite3.Connection, key: bytes, lines: Sequence[ErasureRecord]) -> int:
    """Apply the erase list to a restored database, in the caller's transaction; returns how many entries it removed.

    New entries get keys above all those on the list, so that a key is never reused.
    """
    erased: dict[int, list[int]] = {}
    by_collection: dict[str, dict[str, int]] = {}
    numbers = {number for line in lines for number in line.entries}
    for line in lines:
        subjects = by_collection.setdefault(line.collection, {})
        subjects[line.subject_hash] = max(line.up_to, subjects.get(line.subject_hash, 0))
    rows = connection.execute(
        "SELECT e.key, e.collection, c.name, e.subject_id FROM entry e JOIN collection c ON c.key = e.collection"
    )
    for number, collection, name, subject_id in rows.fetchall():
        hashed = keyed_hash(key, subject_id) if subject_id else ""
        last = max(by_collection.get(scope, {}).get(hashed, 0) for scope in (name, ""))
        if number in numbers or (subject_id and number <= last):
            erased.setdefault(collection, []).append(number)
    count = delete_erased(connection, erased)
    record_erasures(connection, lines)
    up_to = max((line.up_to for line in lines), default=0)
    raise_sequence(connection, "entry", up_to)
    return count


def raise_sequence(connection: sqlite3.Connection, table: str, to: int) -> None:
    """Make a table's AUTOINCREMENT keys continue above ``to``."""
    changed = connection.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (to, table)).rowcount
    if not changed:
        connection.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (table, to))
