"""The call plans of the client's methods for operators: models, migrations, shadows, operations, statistics and audit.

See `resight.client.methods`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Literal
from uuid import uuid4

from resight.client import convert
from resight.client.requests import set_time
from resight.client.responses import (
    AuditRow,
    CollectionStats,
    ModelInfo,
    OperationInfo,
    OperationState,
    SearchStatistics,
    Shadow,
)
from resight.client.transport import CallPlan, PagedCall, Sleep, UnaryCall
from resight.errors import DeadlineError
from resight.v1 import admin_pb2, model_pb2, operation_pb2


def models() -> PagedCall[ModelInfo]:
    """List all models, loaded or in the server's folder of models, ordered by name."""
    call = UnaryCall("models.ListModels", model_pb2.ListModelsRequest())
    return PagedCall(call, lambda page: [convert.model(one) for one in page.models])


def model(model_id: str) -> CallPlan[ModelInfo]:
    """Get a model."""
    return convert.model((yield UnaryCall("models.GetModel", model_pb2.GetModelRequest(model_id=model_id))).model)


def load_model(model_id: str) -> CallPlan[OperationInfo]:
    """Start to load a model from the server's folder of models; `wait` for it before activating the model."""
    request = model_pb2.LoadModelRequest(model_id=model_id)
    return convert.operation((yield UnaryCall("models.LoadModel", request, retry=False)).operation)


def unload_model(model_id: str) -> CallPlan[None]:
    """Unload a model; requests that already use it are completed."""
    yield UnaryCall("models.UnloadModel", model_pb2.UnloadModelRequest(model_id=model_id), retry=False)


def activate_model(model_id: str, *, expected: str = "") -> CallPlan[tuple[ModelInfo, ModelInfo]]:
    """Make a loaded model the default; returns it and the previous default.

    Args:
        model_id: of a loaded model.
        expected: the model expected to be active now; `ConflictError` if it is not. Empty = any.
    """
    request = model_pb2.ActivateModelRequest(model_id=model_id, expected_current_model_id=expected)
    reply = yield UnaryCall("models.ActivateModel", request, retry=False)
    return convert.model(reply.active), convert.model(reply.previous)


def migrate(
    collection: str, model_id: str, *, auto_activate: bool = False, drop_missing: bool = False
) -> CallPlan[OperationInfo]:
    """Start or resume embedding a collection's stored crops with a loaded model.

    Args:
        collection: its name.
        model_id: of a loaded model.
        auto_activate: switch searches to the new space when the migration passes its checks.
        drop_missing: entries without a stored crop are absent from the new space.
    """
    request = model_pb2.MigrateCollectionRequest(
        collection_id=collection,
        target_model_id=model_id,
        auto_activate=auto_activate,
        missing_crops=model_pb2.MISSING_CROP_POLICY_DROP if drop_missing else model_pb2.MISSING_CROP_POLICY_FAIL,
        request_id=str(uuid4()),
    )
    return convert.operation((yield UnaryCall("models.MigrateCollection", request)).operation)


def activate_space(
    collection: str, space_id: str, *, expected: str = "", allow_incomplete: bool = False
) -> CallPlan[tuple[str, str]]:
    """Switch a collection's searches to another of its spaces; returns the ids of that space and the previous one."""
    request = model_pb2.ActivateSpaceRequest(
        collection_id=collection,
        space_id=space_id,
        expected_current_space_id=expected,
        allow_incomplete=allow_incomplete,
    )
    reply = yield UnaryCall("models.ActivateSpace", request, retry=False)
    return reply.active.space_id, reply.previous.space_id


def start_shadow(
    collection: str,
    model_id: str,
    *,
    sample: float = 1.0,
    max_searches: int = 0,
    expire_after: timedelta | None = None,
) -> CallPlan[Shadow]:
    """Start a shadow: a candidate model also runs a sample of a collection's searches of crops, only to be measured.

    If a shadow of the same model is running, it continues with the limits of this call.

    Args:
        collection: its name; it must be migrated to the model's space but searched in another space.
        model_id: of a loaded model.
        sample: share of the searches, above 0, at most 1.
        max_searches: number of answered searches after which it ends; 0 = no limit.
        expire_after: time after which it ends; None = no limit.
    """
    request = model_pb2.StartShadowRequest(
        collection_id=collection, model_id=model_id, sample=sample, max_searches=max_searches
    )
    if expire_after is not None:
        request.expire_after.FromTimedelta(expire_after)
    return convert.shadow((yield UnaryCall("models.StartShadow", request)).shadow)


def get_shadow(collection: str) -> CallPlan[Shadow]:
    """Get a collection's running or last shadow with its results so far."""
    request = model_pb2.GetShadowRequest(collection_id=collection)
    return convert.shadow((yield UnaryCall("models.GetShadow", request)).shadow)


def stop_shadow(collection: str) -> CallPlan[Shadow]:
    """Stop a collection's shadow; returns its final results."""
    request = model_pb2.StopShadowRequest(collection_id=collection)
    return convert.shadow((yield UnaryCall("models.StopShadow", request)).shadow)


OPERATION_STATE_VALUES = {state: number for number, state in convert.OPERATION_STATES.items()}
MIN_POLL_S, MAX_POLL_S = 0.05, 1.0  # interval between two polls of an operation


def stats(collection: str) -> CallPlan[CollectionStats]:
    """Get the statistics of a collection and its index."""
    request = admin_pb2.GetCollectionStatsRequest(collection_id=collection)
    return convert.stats((yield UnaryCall("admin.GetCollectionStats", request)))


def search_statistics(
    collection: str,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    space_id: str = "",
    reference: tuple[datetime, datetime] | None = None,
) -> CallPlan[list[SearchStatistics]]:
    """Get the search statistics of a collection, one item per space, ordered by its first search in the window.

    Args:
        collection: its name.
        start: of the window, which is widened to whole minutes; None = from the oldest kept.
        end: of the window, exclusive; None = now.
        space_id: only of this space; empty = of all.
        reference: start and end of the window that drift is measured against; None = the space's first 1000 best hits.
    """
    request = admin_pb2.GetSearchStatisticsRequest(collection_id=collection, space_id=space_id)
    if start is not None:
        set_time(request.window.start_time, start, "start")
    if end is not None:
        set_time(request.window.end_time, end, "end")
    if reference is not None:
        set_time(request.reference.start_time, reference[0], "reference")
        set_time(request.reference.end_time, reference[1], "reference")
    reply = yield UnaryCall("admin.GetSearchStatistics", request)
    return [convert.search_statistics(one) for one in reply.statistics]


def search_figures(
    collection: str,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    space_id: str = "",
    reference: tuple[datetime, datetime] | None = None,
) -> CallPlan[list[SearchStatistics]]:
    """Deprecated name of `search_statistics`."""
    warnings.warn("search_figures is deprecated: use search_statistics", DeprecationWarning, stacklevel=3)
    return search_statistics(collection, start=start, end=end, space_id=space_id, reference=reference)


def rebuild_index(collection: str, index_type: str = "") -> CallPlan[OperationInfo]:
    """Start to rebuild a collection's index as ``flat``, ``flat-fp16`` or ``hnsw``; empty = chosen by its size."""
    request = admin_pb2.RebuildIndexRequest(collection_id=collection, index_type=index_type)
    return convert.operation((yield UnaryCall("admin.RebuildIndex", request, retry=False)).operation)


def create_snapshot(name: str = "") -> CallPlan[OperationInfo]:
    """Start a snapshot of the tenant's database; an empty name = the time. The operation's result holds the name."""
    request = admin_pb2.CreateSnapshotRequest(snapshot_id=name)
    return convert.operation((yield UnaryCall("admin.CreateSnapshot", request, retry=False)).operation)


def audit_events(*, start: datetime | None = None, end: datetime | None = None) -> PagedCall[AuditRow]:
    """List the audit events of searches and changes, newest first. ``start`` is inclusive, ``end`` exclusive."""
    request = admin_pb2.ListAuditEventsRequest()
    if start is not None:
        set_time(request.window.start_time, start, "start")
    if end is not None:
        set_time(request.window.end_time, end, "end")
    return PagedCall(
        UnaryCall("admin.ListAuditEvents", request), lambda page: [convert.audit_event(row) for row in page.events]
    )


def operation(operation_id: str) -> CallPlan[OperationInfo]:
    """Get an operation."""
    request = operation_pb2.GetOperationRequest(operation_id=operation_id)
    return convert.operation((yield UnaryCall("operations.GetOperation", request)).operation)


def operations(*, kind: str = "", state: OperationState | None = None) -> PagedCall[OperationInfo]:
    """List operations, newest first, optionally of one kind or in one state."""
    number = OPERATION_STATE_VALUES[state] if state else operation_pb2.OPERATION_STATE_UNSPECIFIED
    call = UnaryCall("operations.ListOperations", operation_pb2.ListOperationsRequest(kind=kind, state=number))
    return PagedCall(call, lambda page: [convert.operation(one) for one in page.operations])


def cancel_operation(operation_id: str) -> CallPlan[OperationInfo]:
    """Request that an operation be cancelled; it ends at its next step."""
    request = operation_pb2.CancelOperationRequest(operation_id=operation_id)
    return convert.operation((yield UnaryCall("operations.CancelOperation", request)).operation)


def start_adaptation(site: str) -> CallPlan[OperationInfo]:
    """Request an adaptation run of the site with this name; the operation is pending until a cycle takes it.

    If a run of this site is already pending, that operation is returned.
    """
    request = admin_pb2.StartAdaptationRequest(job_spec_id=site, request_id=str(uuid4()))
    return convert.operation((yield UnaryCall("admin.StartAdaptation", request)).operation)


def pending_adaptations(site: str = "") -> PagedCall[OperationInfo]:
    """List requested adaptations that no cycle has taken; ``result["site"]`` names the site.

    Args:
        site: only of this site; empty = of all.
    """
    pending = operations(kind="adapt", state="pending")
    return PagedCall(
        pending.call, lambda page: [one for one in pending.items(page) if site in ("", one.result["site"])]
    )


def report_adaptation(
    operation_id: str,
    state: Literal["running", "succeeded", "failed"],
    *,
    result: Mapping[str, str] | None = None,
    error: str = "",
) -> CallPlan[OperationInfo]:
    """Report the state of an adaptation that this program runs; if the reply is ``cancelled``, stop it.

    Args:
        operation_id: from `pending_adaptations`.
        state: ``running`` takes the operation and may be repeated with new results; the others end it.
        result: added to the results reported before.
        error: why it failed; only with ``failed``.
    """
    request = admin_pb2.ReportAdaptationRequest(
        operation_id=operation_id, state=OPERATION_STATE_VALUES[state], result=result or {}, error=error
    )
    return convert.operation((yield UnaryCall("admin.ReportAdaptation", request)).operation)


def wait(
    operation: OperationInfo,
    *,
    timeout_s: float = 600.0,
    on_update: Callable[[OperationInfo], None] | None = None,
    told: Callable[[OperationInfo], None] | None = None,
) -> CallPlan[OperationInfo]:
    """Wait until an operation has ended, successfully or not.

    Args:
        operation: from the call that started it.
        timeout_s: longest time to wait.
        on_update: called with the operation each time it was polled.
        told: deprecated name of ``on_update``.

    Raises:
        DeadlineError: the operation has not ended after ``timeout_s``.
    """
    if told is not None:
        warnings.warn("wait(told=...) is deprecated: use on_update=", DeprecationWarning, stacklevel=3)
    return _wait(operation, timeout_s, on_update or told)


def _wait(
    operation: OperationInfo, timeout_s: float, on_update: Callable[[OperationInfo], None] | None
) -> CallPlan[OperationInfo]:
    deadline, pause_s = time.monotonic() + timeout_s, MIN_POLL_S
    while not operation.ended:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"operation {operation.operation_id} has not ended after {timeout_s:.0f} s: query it again later"
            )
        yield Sleep(pause_s)
        pause_s = min(MAX_POLL_S, 1.5 * pause_s)
        operation = yield from _get_operation(operation.operation_id)
        if on_update is not None:
            on_update(operation)
    return operation


_get_operation = operation  # in `_wait` that name is an argument
