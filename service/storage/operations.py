"""Long-running operations, stored in the database so that they survive a restart.

An operation that was running when the process died becomes INTERRUPTED at the next start; its ``details`` hold what is
needed to resume it. Operations that another process carries out (`EXTERNAL_KINDS`), such as requested adaptations, stay
PENDING until the site's cycle reports that it runs them; they are cancelled at once, and the cycle learns of it when it
reports next. Module functions take the writer's connection and run in its transaction.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

from google.rpc import status_pb2

from resight.errors import (
    InputError,
    LimitError,
    NotCancellableError,
    OperationNotFoundError,
    ReIDError,
    TrainingError,
)
from resight.service.records import now_us
from resight.service.storage.store import Store
from resight.status import from_status, to_status

MAX_KEPT = 1000  # finished operations kept
ADAPT = "adapt"
EXTERNAL_KINDS = (ADAPT,)  # carried out by another process, so they may still be running after a restart of this one
REBUILD, LOAD = "rebuild", "load_model"
NOT_CANCELLABLE_KINDS = (REBUILD, LOAD)  # they run in a thread that cannot be stopped
_EXTERNAL_KINDS_SQL = ", ".join(repr(kind) for kind in EXTERNAL_KINDS)


class OperationState(StrEnum):
    """As ``OperationState`` in operation.proto."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self not in (OperationState.PENDING, OperationState.RUNNING)


@dataclass(frozen=True)
class Operation:
    """One long-running operation. ``key`` ascends with the time of creation; ``end_us`` is None while it runs."""

    operation_id: str
    kind: str
    state: OperationState
    total: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped: int = 0
    error: ReIDError | None = field(default=None, compare=False)  # exceptions compare by identity
    result: dict[str, str] = field(default_factory=dict)
    start_us: int = 0
    end_us: int | None = None
    cancel_requested: bool = False
    request_id: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    key: int = 0


_COLUMNS = (
    "operation_id, kind, state, total, succeeded, failed, skipped, error, result, start_us, end_us, cancel, "
    "request_id, details, key"
)


class Operations:
    """The long-running operations of one gallery's database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def interrupt_unfinished(self) -> int:
        """At start: mark operations that were unfinished when the process died as INTERRUPTED; returns how many."""
        return await self._store.write_unchecked(_interrupt)

    async def start(
        self, kind: str, *, total: int = 0, request_id: str = "", continues: str = "", **details: Any
    ) -> Operation:
        """Create an operation in state RUNNING; returns an existing one of the same kind and ``request_id`` instead.

        Args:
            kind: of work.
            total: number of items, where known.
            request_id: makes a repeated request return the first operation; empty = none.
            continues: id of an interrupted operation that this one resumes. Its result's ``continued_by`` is set in the
                same transaction, so that a client waiting for it can always find this one.
            **details: JSON values stored with it.
        """
        return await self._store.write_unchecked(
            create_operation, kind, total, request_id, details, continues=continues
        )

    async def any_running(self) -> bool:
        """Whether an operation of this process is unfinished."""
        return await self._store.read(_any_running)

    async def get(self, operation_id: str) -> Operation:
        """The operation of that id; raises OperationNotFoundError."""
        return await self._store.read(get_operation, operation_id)

    async def list_operations(
        self, *, before: int | None = None, limit: int = 100, kind: str = "", state: OperationState | None = None
    ) -> list[Operation]:
        """Operations with a key below ``before``, the newest first; optionally of one kind or in one state."""
        return await self._store.read(_listed, before, limit, kind or None, state)

    async def progress(
        self,
        operation_id: str,
        *,
        details: dict[str, Any] | None = None,
        result: dict[str, str] | None = None,
        **counts: int,
    ) -> Operation:
        """Set counts (``total``, ``succeeded``, ``failed``, ``skipped``); merge into ``details`` and ``result``.

        Returns:
            The updated operation; the caller should check its ``cancel_requested``.
        """
        return await self._store.write_unchecked(update_progress, operation_id, counts, details or {}, result or {})

    async def finish(
        self,
        operation_id: str,
        *,
        error: ReIDError | None = None,
        cancelled: bool = False,
        result: dict[str, str] | None = None,
    ) -> Operation:
        """Set the final state: FAILED with an error, CANCELLED, or SUCCEEDED; no effect on one that has ended."""
        state = (
            OperationState.CANCELLED
            if cancelled
            else OperationState.SUCCEEDED
            if error is None
            else OperationState.FAILED
        )
        return await self._store.write_unchecked(finish_operation, operation_id, state, error, result or {})

    async def cancel(self, operation_id: str) -> Operation:
        """Request cancellation: the worker stops at its next step; one of `EXTERNAL_KINDS` is CANCELLED at once.

        No effect on an operation that has ended.

        Raises:
            OperationNotFoundError: there is no operation of that id.
            NotCancellableError: its kind is in `NOT_CANCELLABLE_KINDS` and it has not ended.
        """
        return await self._store.write_unchecked(_cancel, operation_id)


def _operation(row: Sequence[Any]) -> Operation:
    operation_id, kind, state, *counts, error, result, start_us, end_us, cancel, request_id, details, key = row
    problem = None if error is None else from_status(status_pb2.Status.FromString(error))
    ends = (json.loads(result), start_us, end_us, bool(cancel), request_id, json.loads(details), key)
    total, succeeded, failed, skipped = counts
    return Operation(operation_id, kind, OperationState(state), total, succeeded, failed, skipped, problem, *ends)


def get_operation(connection: sqlite3.Connection, operation_id: str) -> Operation:
    """The operation of that id; raises OperationNotFoundError."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM operation WHERE operation_id = ?", (operation_id,)).fetchone()
    if row is None:
        raise OperationNotFoundError(
            f"no operation {operation_id!r} here: see which there are with ListOperations",
            field="operation_id",
            operation=operation_id,
        )
    return _operation(row)


def find_by_request(connection: sqlite3.Connection, kind: str, request_id: str) -> Operation | None:
    """The operation that was created for this request_id, if any."""
    sql = f"SELECT {_COLUMNS} FROM operation WHERE request_id = ? AND request_id <> '' AND kind = ?"
    row = connection.execute(sql, (request_id, kind)).fetchone()
    return None if row is None else _operation(row)


def _listed(
    connection: sqlite3.Connection, before: int | None, limit: int, kind: str | None, state: OperationState | None
) -> list[Operation]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM operation WHERE (?1 IS NULL OR key < ?1) AND (?3 IS NULL OR kind = ?3) "
        "AND (?4 IS NULL OR state = ?4) ORDER BY key DESC LIMIT ?2",
        (before, limit, kind, state),
    )
    return [_operation(row) for row in rows.fetchall()]


def create_operation(
    connection: sqlite3.Connection,
    kind: str,
    total: int,
    request_id: str,
    details: dict[str, Any],
    state: OperationState = OperationState.RUNNING,
    *,
    continues: str = "",
) -> Operation:
    """`Operations.start`, in the writer's transaction."""
    if request_id and (first := find_by_request(connection, kind, request_id)):
        return first
    operation_id = uuid4().hex
    connection.execute(
        "INSERT INTO operation (operation_id, kind, state, total, succeeded, failed, skipped, result, start_us, "
        "cancel, request_id, details) VALUES (?, ?, ?, ?, 0, 0, 0, '{}', ?, 0, ?, ?)",
        (operation_id, kind, state, total, now_us(), request_id, json.dumps(details)),
    )
    if continues:
        update_progress(connection, continues, {}, {}, {"continued_by": operation_id})
    connection.execute(
        "DELETE FROM operation WHERE end_us IS NOT NULL AND key <= (SELECT max(key) FROM operation) - ?", (MAX_KEPT,)
    )
    return get_operation(connection, operation_id)


def update_progress(
    connection: sqlite3.Connection,
    operation_id: str,
    counts: dict[str, int],
    details: dict[str, Any],
    result: dict[str, str],
) -> Operation:
    """`Operations.progress`, in the writer's transaction."""
    unknown = set(counts) - {"total", "succeeded", "failed", "skipped"}
    assert not unknown, unknown  # they go into the statement
    now = get_operation(connection, operation_id)
    values = {"details": json.dumps(now.details | details), "result": json.dumps(now.result | result)} | counts
    connection.execute(
        f"UPDATE operation SET {', '.join(f'{name} = ?' for name in values)} WHERE operation_id = ?",
        (*values.values(), operation_id),
    )
    return get_operation(connection, operation_id)


def finish_operation(
    connection: sqlite3.Connection,
    operation_id: str,
    state: OperationState,
    error: ReIDError | None,
    result: dict[str, str],
) -> Operation:
    """`Operations.finish`, in the writer's transaction."""
    now = get_operation(connection, operation_id)
    if now.state.ended:
        return now
    status = None if error is None else to_status(error).SerializeToString()
    connection.execute(
        "UPDATE operation SET state = ?, error = ?, result = ?, end_us = ? WHERE operation_id = ?",
        (state, status, json.dumps(now.result | result), now_us(), operation_id),
    )
    return get_operation(connection, operation_id)


def _cancel(connection: sqlite3.Connection, operation_id: str) -> Operation:
    found = get_operation(connection, operation_id)
    if not found.state.ended and found.kind in NOT_CANCELLABLE_KINDS:
        raise NotCancellableError(
            f"operation {operation_id} is of the kind {found.kind}, which cannot be cancelled: wait until it has ended",
            field="operation_id",
            kind=found.kind,
        )
    if not found.state.ended:
        connection.execute("UPDATE operation SET cancel = 1 WHERE operation_id = ?", (operation_id,))
    if found.kind in EXTERNAL_KINDS:
        return finish_operation(connection, operation_id, OperationState.CANCELLED, None, {})
    return get_operation(connection, operation_id)


def _any_running(connection: sqlite3.Connection) -> bool:
    sql = f"SELECT 1 FROM operation WHERE end_us IS NULL AND kind NOT IN ({_EXTERNAL_KINDS_SQL}) LIMIT 1"
    return connection.execute(sql).fetchone() is not None


def _interrupt(connection: sqlite3.Connection) -> int:
    return connection.execute(
        f"UPDATE operation SET state = ?, end_us = ? WHERE state IN (?, ?) AND kind NOT IN ({_EXTERNAL_KINDS_SQL})",
        (OperationState.INTERRUPTED, now_us(), OperationState.PENDING, OperationState.RUNNING),
    ).rowcount


SITE_KEY = "site"  # in the operation's result: the site whose cycle is to run the adaptation
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_RESULTS, MAX_RESULT_NAME, MAX_TEXT = 32, 63, 1024
REPORTABLE_STATES = (OperationState.RUNNING, OperationState.SUCCEEDED, OperationState.FAILED)


def request_adaptation(connection: sqlite3.Connection, site: str, *, request_id: str = "") -> Operation:
    """Create a PENDING adaptation of a site; returns one that is PENDING already or has the same request_id instead.

    Raises:
        InputError: not a valid site name.
    """
    if not SITE_NAME.fullmatch(site):
        raise InputError(
            f"a site's name is 1-63 of a-z, A-Z, 0-9, '.', '_' and '-', a letter or digit first; found {site[:80]!r}",
            field="job_spec_id",
        )
    if request_id and (first := find_by_request(connection, ADAPT, request_id)):
        return first
    row = connection.execute(
        f"SELECT operation_id FROM operation WHERE kind = ? AND state = ? AND json_extract(result, '$.{SITE_KEY}') = ?",
        (ADAPT, OperationState.PENDING, site),
    ).fetchone()
    if row is not None:
        return get_operation(connection, row[0])
    made = create_operation(connection, ADAPT, 0, request_id, {}, state=OperationState.PENDING)
    return update_progress(connection, made.operation_id, {}, {}, {SITE_KEY: site})


def report_adaptation(
    connection: sqlite3.Connection,
    operation_id: str,
    state: OperationState,
    *,
    result: Mapping[str, str],
    error: str = "",
) -> Operation:
    """Record the progress of an adaptation; no effect on one that has ended.

    Args:
        connection: the writer's.
        operation_id: of a requested adaptation.
        state: one of `REPORTABLE_STATES`; RUNNING may be reported repeatedly.
        result: merged into the previous reports; the site's name cannot be changed.
        error: reason of the failure; not empty exactly when the state is FAILED.

    Raises:
        OperationNotFoundError: there is no such adaptation.
        InputError: another state, an error without FAILED, or FAILED without an error.
        LimitError: result or error are too large.
    """
    if state not in REPORTABLE_STATES:
        known = ", ".join(one.name for one in REPORTABLE_STATES)
        raise InputError(f"state is one of {known}, found {state.name}: CancelOperation cancels", field="state")
    if bool(error) != (state is OperationState.FAILED):
        raise InputError(
            f"an error belongs to FAILED, and only to it; found {state.name} with {error[:80]!r}", field="error"
        )
    _check_result_size(result, error)
    found = get_operation(connection, operation_id)
    if found.kind != ADAPT:
        raise OperationNotFoundError(
            f"operation {operation_id} is of kind {found.kind}: only adaptations are reported from outside",
            field="operation_id",
            operation=operation_id,
        )
    if found.state.ended:
        return found
    merged = dict(result) | {SITE_KEY: found.result[SITE_KEY]}
    if state is not OperationState.RUNNING:
        return finish_operation(connection, operation_id, state, TrainingError(error) if error else None, merged)
    connection.execute("UPDATE operation SET state = ? WHERE operation_id = ?", (state, operation_id))
    return update_progress(connection, operation_id, {}, {}, merged)


def _check_result_size(result: Mapping[str, str], error: str) -> None:
    if len(result) > MAX_RESULTS:
        raise LimitError(f"at most {MAX_RESULTS} results, found {len(result)}: send fewer", field="result")
    for name, value in result.items():
        if not (1 <= len(name) <= MAX_RESULT_NAME and len(value) <= MAX_TEXT):
            raise LimitError(
                f"a result's name has 1-{MAX_RESULT_NAME} characters and its value at most {MAX_TEXT}, found "
                f"{name[:80]!r}: {len(name)} and {len(value)}",
                field="result",
            )
    if len(error) > MAX_TEXT:
        raise LimitError(f"an error has at most {MAX_TEXT} characters, found {len(error)}: shorten it", field="error")
