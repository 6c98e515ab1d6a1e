"""Long work one can ask after: kept in the database, so that it is known after a restart.

Work that was running when the process died is INTERRUPTED at the next start; what it needs to be taken up again stands
in its ``details``. What another process carries out (`ELSEWHERE`) goes on, or waits, as before. Counts are what was
read back, never what was asked for.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

from google.rpc import status_pb2

from resight.errors import NotCancellableError, OperationNotFoundError, ReIDError
from resight.reasons import from_status, to_status
from resight.service.entries import now_us
from resight.service.store import Store

KEPT = 1000  # finished operations remembered
ADAPT = "adapt"
ELSEWHERE = (ADAPT,)  # kinds that another process carries out: they outlive this one
REBUILD, LOAD = "rebuild", "load_model"
FIXED = (REBUILD, LOAD)  # kinds that end by themselves, in a thread that nothing stops
_NOT_HERE = ", ".join(repr(kind) for kind in ELSEWHERE)


class State(StrEnum):
    """As ``OperationState`` in operation.proto."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        return self not in (State.PENDING, State.RUNNING)


@dataclass(frozen=True)
class Operation:
    """One piece of long work. ``key`` orders them, the newest highest; ``end_us`` None while it runs."""

    operation_id: str
    kind: str
    state: State
    total: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    error: ReIDError | None = field(default=None, compare=False)  # exceptions equal only themselves
    result: dict[str, str] = field(default_factory=dict)
    start_us: int = 0
    end_us: int | None = None
    cancel_asked: bool = False
    request_id: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    key: int = 0


_COLUMNS = (
    "operation_id, kind, state, total, succeeded, failed, skipped, error, result, start_us, end_us, cancel, "
    "request_id, details, key"
)


class Operations:
    """The long work of one gallery's database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def recover(self) -> int:
        """At start: what was running when the process died is interrupted; returns how many."""
        return await self._store.book(_interrupt)

    async def start(
        self, kind: str, *, total: int = 0, request_id: str = "", continues: str = "", **details: Any
    ) -> Operation:
        """Begin one, RUNNING. One of the same kind and ``request_id`` is answered instead, as it stands.

        One that ``continues`` an interrupted one is that one's ``continued_by`` from its first moment, so that no kill
        leaves whoever waits for the old one without a way to the new one.
        """
        return await self._store.book(begin, kind, total, request_id, details, continues=continues)

    async def any_running(self) -> bool:
        """Whether something is under way in this process."""
        return await self._store.read(_any_running)

    async def get(self, operation_id: str) -> Operation:
        """One by id; raises OperationNotFoundError."""
        return await self._store.read(by_id, operation_id)

    async def listed(
        self, *, before: int | None = None, limit: int = 100, kind: str = "", state: State | None = None
    ) -> list[Operation]:
        """The newest first, from the one before key ``before``; of one kind or in one state, where told."""
        return await self._store.read(_listed, before, limit, kind or None, state)

    async def progress(
        self,
        operation_id: str,
        *,
        details: dict[str, Any] | None = None,
        result: dict[str, str] | None = None,
        **counts: int,
    ) -> Operation:
        """Set counts (``total``, ``succeeded``, ``failed``, ``skipped``); add to ``details`` and ``result``.

        Returns:
            It as it stands: look at ``cancel_asked``.
        """
        return await self._store.book(progress, operation_id, counts, details or {}, result or {})

    async def finish(
        self,
        operation_id: str,
        *,
        error: ReIDError | None = None,
        cancelled: bool = False,
        result: dict[str, str] | None = None,
    ) -> Operation:
        """End one: FAILED with an error, CANCELLED, or SUCCEEDED; one that has ended stays as it is."""
        state = State.CANCELLED if cancelled else State.SUCCEEDED if error is None else State.FAILED
        return await self._store.book(finish, operation_id, state, error, result or {})

    async def cancel(self, operation_id: str) -> Operation:
        """Ask it to end; the one who works on it does so at the next step, and what is `ELSEWHERE` has ended now.

        What has ended stays as it is.

        Raises:
            OperationNotFoundError: none of that id.
            NotCancellableError: its kind is one of `FIXED`, and it has not ended.
        """
        return await self._store.book(_cancel, operation_id)


def _operation(row: Sequence[Any]) -> Operation:
    operation_id, kind, state, *counts, error, result, start_us, end_us, cancel, request_id, details, key = row
    problem = None if error is None else from_status(status_pb2.Status.FromString(error))
    ends = (json.loads(result), start_us, end_us, bool(cancel), request_id, json.loads(details), key)
    total, succeeded, failed, skipped = counts
    return Operation(operation_id, kind, State(state), total, succeeded, failed, skipped, problem, *ends)


def by_id(connection: sqlite3.Connection, operation_id: str) -> Operation:
    """One by id; raises OperationNotFoundError."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM operation WHERE operation_id = ?", (operation_id,)).fetchone()
    if row is None:
        raise OperationNotFoundError(
            f"no operation {operation_id!r} here: see which there are with ListOperations",
            field="operation_id",
            operation=operation_id,
        )
    return _operation(row)


def by_request(connection: sqlite3.Connection, kind: str, request_id: str) -> Operation | None:
    """The one that a request of this kind began."""
    sql = f"SELECT {_COLUMNS} FROM operation WHERE request_id = ? AND request_id <> '' AND kind = ?"
    row = connection.execute(sql, (request_id, kind)).fetchone()
    return None if row is None else _operation(row)


def _listed(
    connection: sqlite3.Connection, before: int | None, limit: int, kind: str | None, state: State | None
) -> list[Operation]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM operation WHERE (?1 IS NULL OR key < ?1) AND (?3 IS NULL OR kind = ?3) "
        "AND (?4 IS NULL OR state = ?4) ORDER BY key DESC LIMIT ?2",
        (before, limit, kind, state),
    )
    return [_operation(row) for row in rows.fetchall()]


def begin(
    connection: sqlite3.Connection,
    kind: str,
    total: int,
    request_id: str,
    details: dict[str, Any],
    state: State = State.RUNNING,
    *,
    continues: str = "",
) -> Operation:
    """`Operations.start`, in the writer's transaction."""
    if request_id and (first := by_request(connection, kind, request_id)):
        return first
    operation_id = uuid4().hex
    connection.execute(
        "INSERT INTO operation (operation_id, kind, state, total, succeeded, failed, skipped, result, start_us, "
        "cancel, request_id, details) VALUES (?, ?, ?, ?, 0, 0, 0, '{}', ?, 0, ?, ?)",
        (operation_id, kind, state, total, now_us(), request_id, json.dumps(details)),
    )
    if continues:
        progress(connection, continues, {}, {}, {"continued_by": operation_id})
    connection.execute(
        "DELETE FROM operation WHERE end_us IS NOT NULL AND key <= (SELECT max(key) FROM operation) - ?", (KEPT,)
    )
    return by_id(connection, operation_id)


def progress(
    connection: sqlite3.Connection,
    operation_id: str,
    counts: dict[str, int],
    details: dict[str, Any],
    result: dict[str, str],
) -> Operation:
    """`Operations.progress`, in the writer's transaction."""
    unknown = set(counts) - {"total", "succeeded", "failed", "skipped"}
    assert not unknown, unknown  # they go into the statement
    now = by_id(connection, operation_id)
    values = {"details": json.dumps(now.details | details), "result": json.dumps(now.result | result)} | counts
    connection.execute(
        f"UPDATE operation SET {', '.join(f'{name} = ?' for name in values)} WHERE operation_id = ?",
        (*values.values(), operation_id),
    )
    return by_id(connection, operation_id)


def finish(
    connection: sqlite3.Connection, operation_id: str, state: State, error: ReIDError | None, result: dict[str, str]
) -> Operation:
    """`Operations.finish`, in the writer's transaction."""
    now = by_id(connection, operation_id)
    if now.state.ended:
        return now
    told = None if error is None else to_status(error).SerializeToString()
    connection.execute(
        "UPDATE operation SET state = ?, error = ?, result = ?, end_us = ? WHERE operation_id = ?",
        (state, told, json.dumps(now.result | result), now_us(), operation_id),
    )
    return by_id(connection, operation_id)


def _cancel(connection: sqlite3.Connection, operation_id: str) -> Operation:
    found = by_id(connection, operation_id)
    if not found.state.ended and found.kind in FIXED:
        raise NotCancellableError(
            f"operation {operation_id} is of the kind {found.kind}, which cannot be cancelled: wait until it has ended",
            field="operation_id",
            kind=found.kind,
        )
    if not found.state.ended:
        connection.execute("UPDATE operation SET cancel = 1 WHERE operation_id = ?", (operation_id,))
    if found.kind in ELSEWHERE:
        return finish(connection, operation_id, State.CANCELLED, None, {})
    return by_id(connection, operation_id)


def _any_running(connection: sqlite3.Connection) -> bool:
    sql = f"SELECT 1 FROM operation WHERE end_us IS NULL AND kind NOT IN ({_NOT_HERE}) LIMIT 1"
    return connection.execute(sql).fetchone() is not None


def _interrupt(connection: sqlite3.Connection) -> int:
    return connection.execute(
        f"UPDATE operation SET state = ?, end_us = ? WHERE state IN (?, ?) AND kind NOT IN ({_NOT_HERE})",
        (State.INTERRUPTED, now_us(), State.PENDING, State.RUNNING),
    ).rowcount
