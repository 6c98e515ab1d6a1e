"""The calls of operators, as those in `resight.asks`: how things stand, long work, and the audit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Literal
from uuid import uuid4

from resight import replies, replies_figures
from resight.answers import AuditRow, CollectionStats, OperationInfo, OperationState
from resight.answers_figures import SearchFigures
from resight.calls import Ask, Listing, Pause, Road
from resight.errors import DeadlineError
from resight.v1 import admin_pb2, operation_pb2

STATES = {state: number for number, state in replies.OPERATION_STATES.items()}
FIRST_LOOK_S, LAST_LOOK_S = 0.05, 1.0  # between two looks at an operation


def stats(collection: str) -> Road[CollectionStats]:
    """How a collection and its index stand."""
    request = admin_pb2.GetCollectionStatsRequest(collection_id=collection)
    return replies.stats((yield Ask("admin.GetCollectionStats", request)))


def search_figures(
    collection: str,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    space_id: str = "",
    reference: tuple[datetime, datetime] | None = None,
) -> Road[list[SearchFigures]]:
    """What a collection's searches came to, in each space, by its first search in the window.

    Args:
        collection: its name.
        start: of the window, which is widened to whole minutes; None = as far back as is kept.
        end: exclusive; None = until now.
        space_id: of one space; empty = of all.
        reference: window, begin and end, that drift is told against; None = the space's first 1000 best hits.
    """
    request = admin_pb2.GetSearchFiguresRequest(collection_id=collection, space_id=space_id)
    if start is not None:
        request.window.start_time.FromDatetime(start)
    if end is not None:
        request.window.end_time.FromDatetime(end)
    if reference is not None:
        request.reference.start_time.FromDatetime(reference[0])
        request.reference.end_time.FromDatetime(reference[1])
    reply = yield Ask("admin.GetSearchFigures", request)
    return [replies_figures.search_figures(one) for one in reply.figures]


def rebuild_index(collection: str, index_type: str = "") -> Road[OperationInfo]:
    """Begin to build a collection's index anew: ``flat``, ``flat-fp16``, ``hnsw``, or empty = by its size."""
    request = admin_pb2.RebuildIndexRequest(collection_id=collection, index_type=index_type)
    return replies.operation((yield Ask("admin.RebuildIndex", request, retry=False)).operation)


def create_snapshot(name: str = "") -> Road[OperationInfo]:
    """Begin to copy the tenant's database; empty = named by the time. The name stands in the result."""
    request = admin_pb2.CreateSnapshotRequest(snapshot_id=name)
    return replies.operation((yield Ask("admin.CreateSnapshot", request, retry=False)).operation)


def audit_events(*, start: datetime | None = None, end: datetime | None = None) -> Listing[AuditRow]:
    """Who searched, deleted and erased what; the newest first. ``start`` is inclusive, ``end`` exclusive."""
    request = admin_pb2.ListAuditEventsRequest()
    if start is not None:
        request.window.start_time.FromDatetime(start)
    if end is not None:
        request.window.end_time.FromDatetime(end)
    return Listing(Ask("admin.ListAuditEvents", request), lambda page: [replies.audit_row(row) for row in page.events])


def operation(operation_id: str) -> Road[OperationInfo]:
    """Long work as it stands."""
    request = operation_pb2.GetOperationRequest(operation_id=operation_id)
    return replies.operation((yield Ask("operations.GetOperation", request)).operation)


def operations(*, kind: str = "", state: OperationState | None = None) -> Listing[OperationInfo]:
    """Long work, the newest first; only of one kind or in one state, where told."""
    number = STATES[state] if state else operation_pb2.OPERATION_STATE_UNSPECIFIED
    ask = Ask("operations.ListOperations", operation_pb2.ListOperationsRequest(kind=kind, state=number))
    return Listing(ask, lambda page: [replies.operation(one) for one in page.operations])


def cancel_operation(operation_id: str) -> Road[OperationInfo]:
    """Ask long work to end at its next step."""
    request = operation_pb2.CancelOperationRequest(operation_id=operation_id)
    return replies.operation((yield Ask("operations.CancelOperation", request)).operation)


def start_adaptation(site: str) -> Road[OperationInfo]:
    """Ask the cycle of a site, by the name in its file, for a run; the operation is pending until that takes it.

    One that is pending for this site already is answered again.
    """
    request = admin_pb2.StartAdaptationRequest(job_spec_id=site, request_id=str(uuid4()))
    return replies.operation((yield Ask("admin.StartAdaptation", request)).operation)


def pending_adaptations(site: str = "") -> Listing[OperationInfo]:
    """Adaptations that were asked for and that no cycle has taken; their ``result["site"]`` tells whose they are.

    Args:
        site: only of this one; empty = of every one.
    """
    found = operations(kind="adapt", state="pending")
    return Listing(found.ask, lambda page: [one for one in found.items(page) if site in ("", one.result["site"])])


def report_adaptation(
    operation_id: str,
    state: Literal["running", "succeeded", "failed"],
    *,
    result: Mapping[str, str] | None = None,
    error: str = "",
) -> Road[OperationInfo]:
    """Tell how an adaptation goes that this program carries out; answered as ``cancelled``, it is to be given up.

    Args:
        operation_id: from `pending_adaptations`.
        state: running takes it, and may be told again with new results; the others end it.
        result: added to what was told before.
        error: why it failed; with failed alone.
    """
    request = admin_pb2.ReportAdaptationRequest(
        operation_id=operation_id, state=STATES[state], result=result or {}, error=error
    )
    return replies.operation((yield Ask("admin.ReportAdaptation", request)).operation)


def wait(
    operation: OperationInfo,
    *,
    timeout_s: float = 600.0,
    told: Callable[[OperationInfo], None] = lambda operation: None,
) -> Road[OperationInfo]:
    """Return when long work has ended, however it did.

    Args:
        operation: from the call that began it.
        timeout_s: for that.
        told: is told each time it is looked at.

    Raises:
        DeadlineError: it goes on after ``timeout_s``.
    """
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_LOOK_S
    while not operation.ended:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"operation {operation.operation_id} goes on after {timeout_s:.0f} s: look at it again later"
            )
        yield Pause(pause_s)
        pause_s = min(LAST_LOOK_S, 1.5 * pause_s)
        operation = yield from _operation(operation.operation_id)
        told(operation)
    return operation


_operation = operation  # which `wait` calls its argument
