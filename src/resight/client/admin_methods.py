"""The calls about models and migrations, as those in `resight.client.methods`.

The calls of operators, as those in `resight.client.methods`: how things stand, long work, and the audit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Literal
from uuid import uuid4

from resight.client import convert
from resight.client.responses import (
    AuditRow,
    CollectionStats,
    ModelInfo,
    OperationInfo,
    OperationState,
    SearchFigures,
    Shadow,
)
from resight.client.transport import CallPlan, PagedCall, Sleep, UnaryCall
from resight.errors import DeadlineError
from resight.v1 import admin_pb2, model_pb2, operation_pb2


def models() -> PagedCall[ModelInfo]:
    """All models, loaded or in the server's folder of models, by name."""
    ask = UnaryCall("models.ListModels", model_pb2.ListModelsRequest())
    return PagedCall(ask, lambda page: [convert.model(one) for one in page.models])


def model(model_id: str) -> CallPlan[ModelInfo]:
    """One model."""
    return convert.model((yield UnaryCall("models.GetModel", model_pb2.GetModelRequest(model_id=model_id))).model)


def load_model(model_id: str) -> CallPlan[OperationInfo]:
    """Begin to load a model from the server's folder of models; `wait` for it before it is activated."""
    request = model_pb2.LoadModelRequest(model_id=model_id)
    return convert.operation((yield UnaryCall("models.LoadModel", request, retry=False)).operation)


def unload_model(model_id: str) -> CallPlan[None]:
    """Let a loaded model go; requests that began with it end on it."""
    yield UnaryCall("models.UnloadModel", model_pb2.UnloadModelRequest(model_id=model_id), retry=False)


def activate_model(model_id: str, *, expected: str = "") -> CallPlan[tuple[ModelInfo, ModelInfo]]:
    """Let a loaded model embed what names none; returns it and the one before.

    Args:
        model_id: of a loaded model.
        expected: the model thought to be active now; `ConflictError` if another is. Empty = whichever.
    """
    request = model_pb2.ActivateModelRequest(model_id=model_id, expected_current_model_id=expected)
    reply = yield UnaryCall("models.ActivateModel", request, retry=False)
    return convert.model(reply.active), convert.model(reply.previous)


def migrate(
    collection: str, model_id: str, *, auto_activate: bool = False, drop_missing: bool = False
) -> CallPlan[OperationInfo]:
    """Begin to embed a collection's stored crops with a loaded model, or go on with it.

    Args:
        collection: its name.
        model_id: of a loaded model.
        auto_activate: search in the new space as soon as the gate is passed.
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
    """Search a collection in another of its spaces; returns the ids of that space and of the one before."""
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
    """Let a candidate model answer a sample of a collection's searches of crops too, for figures alone.

    Asked for again with the same model, it goes on, with the bounds of this call.

    Args:
        collection: its name; migrated to the model's space, and searched in another one.
        model_id: of a loaded model.
        sample: share of the searches, above 0, at most 1.
        max_searches: answered ones, after which it ends; 0 = without such an end.
        expire_after: None = without such an end.
    """
    request = model_pb2.StartShadowRequest(
        collection_id=collection, model_id=model_id, sample=sample, max_searches=max_searches
    )
    if expire_after is not None:
        request.expire_after.FromTimedelta(expire_after)
    return convert.shadow((yield UnaryCall("models.StartShadow", request)).shadow)


def get_shadow(collection: str) -> CallPlan[Shadow]:
    """A collection's shadow that runs, or ran last, with its figures so far."""
    request = model_pb2.GetShadowRequest(collection_id=collection)
    return convert.shadow((yield UnaryCall("models.GetShadow", request)).shadow)


def stop_shadow(collection: str) -> CallPlan[Shadow]:
    """End a collection's shadow; returns its last figures."""
    request = model_pb2.StopShadowRequest(collection_id=collection)
    return convert.shadow((yield UnaryCall("models.StopShadow", request)).shadow)


OPERATION_STATE_VALUES = {state: number for number, state in convert.OPERATION_STATES.items()}
MIN_POLL_S, MAX_POLL_S = 0.05, 1.0  # between two looks at an operation


def stats(collection: str) -> CallPlan[CollectionStats]:
    """How a collection and its index stand."""
    request = admin_pb2.GetCollectionStatsRequest(collection_id=collection)
    return convert.stats((yield UnaryCall("admin.GetCollectionStats", request)))


def search_figures(
    collection: str,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    space_id: str = "",
    reference: tuple[datetime, datetime] | None = None,
) -> CallPlan[list[SearchFigures]]:
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
    reply = yield UnaryCall("admin.GetSearchFigures", request)
    return [convert.search_figures(one) for one in reply.figures]


def rebuild_index(collection: str, index_type: str = "") -> CallPlan[OperationInfo]:
    """Begin to build a collection's index anew: ``flat``, ``flat-fp16``, ``hnsw``, or empty = by its size."""
    request = admin_pb2.RebuildIndexRequest(collection_id=collection, index_type=index_type)
    return convert.operation((yield UnaryCall("admin.RebuildIndex", request, retry=False)).operation)


def create_snapshot(name: str = "") -> CallPlan[OperationInfo]:
    """Begin to copy the tenant's database; empty = named by the time. The name stands in the result."""
    request = admin_pb2.CreateSnapshotRequest(snapshot_id=name)
    return convert.operation((yield UnaryCall("admin.CreateSnapshot", request, retry=False)).operation)


def audit_events(*, start: datetime | None = None, end: datetime | None = None) -> PagedCall[AuditRow]:
    """Who searched, deleted and erased what; the newest first. ``start`` is inclusive, ``end`` exclusive."""
    request = admin_pb2.ListAuditEventsRequest()
    if start is not None:
        request.window.start_time.FromDatetime(start)
    if end is not None:
        request.window.end_time.FromDatetime(end)
    return PagedCall(
        UnaryCall("admin.ListAuditEvents", request), lambda page: [convert.audit_event(row) for row in page.events]
    )


def operation(operation_id: str) -> CallPlan[OperationInfo]:
    """Long work as it stands."""
    request = operation_pb2.GetOperationRequest(operation_id=operation_id)
    return convert.operation((yield UnaryCall("operations.GetOperation", request)).operation)


def operations(*, kind: str = "", state: OperationState | None = None) -> PagedCall[OperationInfo]:
    """Long work, the newest first; only of one kind or in one state, where told."""
    number = OPERATION_STATE_VALUES[state] if state else operation_pb2.OPERATION_STATE_UNSPECIFIED
    ask = UnaryCall("operations.ListOperations", operation_pb2.ListOperationsRequest(kind=kind, state=number))
    return PagedCall(ask, lambda page: [convert.operation(one) for one in page.operations])


def cancel_operation(operation_id: str) -> CallPlan[OperationInfo]:
    """Ask long work to end at its next step."""
    request = operation_pb2.CancelOperationRequest(operation_id=operation_id)
    return convert.operation((yield UnaryCall("operations.CancelOperation", request)).operation)


def start_adaptation(site: str) -> CallPlan[OperationInfo]:
    """Ask the cycle of a site, by the name in its file, for a run; the operation is pending until that takes it.

    One that is pending for this site already is answered again.
    """
    request = admin_pb2.StartAdaptationRequest(job_spec_id=site, request_id=str(uuid4()))
    return convert.operation((yield UnaryCall("admin.StartAdaptation", request)).operation)


def pending_adaptations(site: str = "") -> PagedCall[OperationInfo]:
    """Adaptations that were asked for and that no cycle has taken; their ``result["site"]`` tells whose they are.

    Args:
        site: only of this one; empty = of every one.
    """
    found = operations(kind="adapt", state="pending")
    return PagedCall(found.ask, lambda page: [one for one in found.items(page) if site in ("", one.result["site"])])


def report_adaptation(
    operation_id: str,
    state: Literal["running", "succeeded", "failed"],
    *,
    result: Mapping[str, str] | None = None,
    error: str = "",
) -> CallPlan[OperationInfo]:
    """Tell how an adaptation goes that this program carries out; answered as ``cancelled``, it is to be given up.

    Args:
        operation_id: from `pending_adaptations`.
        state: running takes it, and may be told again with new results; the others end it.
        result: added to what was told before.
        error: why it failed; with failed alone.
    """
    request = admin_pb2.ReportAdaptationRequest(
        operation_id=operation_id, state=OPERATION_STATE_VALUES[state], result=result or {}, error=error
    )
    return convert.operation((yield UnaryCall("admin.ReportAdaptation", request)).operation)


def wait(
    operation: OperationInfo,
    *,
    timeout_s: float = 600.0,
    told: Callable[[OperationInfo], None] = lambda operation: None,
) -> CallPlan[OperationInfo]:
    """Return when long work has ended, however it did.

    Args:
        operation: from the call that began it.
        timeout_s: for that.
        told: is told each time it is looked at.

    Raises:
        DeadlineError: it goes on after ``timeout_s``.
    """
    deadline, pause_s = time.monotonic() + timeout_s, MIN_POLL_S
    while not operation.ended:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"operation {operation.operation_id} goes on after {timeout_s:.0f} s: look at it again later"
            )
        yield Sleep(pause_s)
        pause_s = min(MAX_POLL_S, 1.5 * pause_s)
        operation = yield from _operation(operation.operation_id)
        told(operation)
    return operation


_operation = operation  # which `wait` calls its argument
