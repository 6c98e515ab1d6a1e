"""ModelService: models, embedding spaces and shadows, and the conversion of their messages."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from resight.errors import InputError, ModelNotFoundError
from resight.service.access.auth import current
from resight.service.access.interceptors import Context
from resight.service.inference.models import (
    ModelHost,
    ModelState,
    ModelStatus,
    space_of_manifest,
)
from resight.service.jobs.migration import MigrationRequest, Migrations
from resight.service.jobs.runner import JobRunner
from resight.service.jobs.shadow import ShadowLimits, ShadowManager, ShadowState, ShadowStatus
from resight.service.records import now_us
from resight.service.rpc import convert
from resight.service.rpc.convert import name_of_token, page_size, page_token, timestamp
from resight.service.rpc.operations import operation_message
from resight.service.storage import audit, reads
from resight.service.storage.audit import AuditEvent
from resight.service.storage.operations import LOAD, Operation
from resight.service.tenants import Tenant, Tenants
from resight.v1 import model_pb2, model_pb2_grpc

SHADOW_STATES = {
    ShadowState.RUNNING: model_pb2.SHADOW_STATE_RUNNING,
    ShadowState.DONE: model_pb2.SHADOW_STATE_DONE,
    ShadowState.EXPIRED: model_pb2.SHADOW_STATE_EXPIRED,
    ShadowState.STOPPED: model_pb2.SHADOW_STATE_STOPPED,
    ShadowState.SUPERSEDED: model_pb2.SHADOW_STATE_SUPERSEDED,
    ShadowState.INTERRUPTED: model_pb2.SHADOW_STATE_INTERRUPTED,
}


def shadow_limits(request: model_pb2.StartShadowRequest) -> ShadowLimits:
    """The limits of a shadow.

    Raises:
        InputError: a value is out of range.
    """
    sample = request.sample if request.HasField("sample") else 1.0
    if not 0.0 < sample <= 1.0:
        raise InputError(f"expected sample in (0, 1], found {sample:g}", field="sample")
    if request.max_searches < 0:
        raise InputError(f"max_searches is 0 or more, found {request.max_searches}", field="max_searches")
    if not request.HasField("expire_after"):
        return ShadowLimits(sample, request.max_searches)
    after_us = request.expire_after.ToMicroseconds()
    if after_us <= 0:
        raise InputError("expire_after must be positive: omit it for a shadow without time limit", field="expire_after")
    return ShadowLimits(sample, request.max_searches, now_us() + after_us)


def shadow_message(status: ShadowStatus) -> model_pb2.Shadow:
    """Convert the status of a shadow."""
    active, candidate = (
        model_pb2.ShadowSide(**asdict(side)) for side in (status.figures.active, status.figures.candidate)
    )
    return model_pb2.Shadow(
        collection_id=status.collection,
        model_id=status.model_id,
        space_id=status.space_id,
        active_model_id=status.active_model_id,
        active_space_id=status.active_space_id,
        state=SHADOW_STATES[status.state],
        sample=status.bounds.sample,
        max_searches=status.bounds.max_searches,
        start_time=timestamp(status.start_us),
        end_time=None if status.end_us is None else timestamp(status.end_us),
        expire_time=None if status.bounds.expire_us is None else timestamp(status.bounds.expire_us),
        operation_id=status.operation_id,
        figures=model_pb2.ShadowFigures(**{**asdict(status.figures), "active": active, "candidate": candidate}),
    )


MODEL_STATES = {
    ModelState.AVAILABLE: model_pb2.MODEL_STATE_AVAILABLE,
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


def model_message(status: ModelStatus) -> model_pb2.Model:
    """Convert the status of a model."""
    message = model_pb2.Model(
        model_id=status.model_id,
        state=MODEL_STATES[status.state],
        sha256=status.sha256,
        active=status.active,
        problem=status.problem,
    )
    if status.manifest is not None:
        message.version = status.manifest.created
        message.space.CopyFrom(convert.space_message(space_of_manifest(status.manifest)))
    if status.loaded is not None:
        message.provider, message.max_batch_size = status.loaded.provider, status.loaded.max_batch
        message.parity_min_cosine = status.loaded.min_cosine
    return message


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """See model.proto."""

    def __init__(
        self, models: ModelHost, migrations: Migrations, shadows: ShadowManager, tenants: Tenants, jobs: JobRunner
    ) -> None:
        self._models, self._migrations, self._shadows = models, migrations, shadows
        self._tenants, self._jobs = tenants, jobs

    async def _tenant(self) -> Tenant:
        """The caller's tenant."""
        return await self._tenants.tenant(current().tenant)

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """Models sorted by name, paginated."""
        limit = page_size(request.page_size)
        after = name_of_token(request.page_token)
        names = [name for name in await asyncio.to_thread(self._models.names) if name > after]
        found = [await self._model_message(name) for name in names[:limit]]
        return model_pb2.ListModelsResponse(
            models=found, next_page_token=page_token(names[limit - 1]) if len(names) > limit else ""
        )

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """State of a model."""
        return model_pb2.GetModelResponse(model=await self._model_message(request.model_id))

    async def _model_message(self, model_id: str) -> model_pb2.Model:
        return model_message(await asyncio.to_thread(self._models.status, model_id))

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        """Start to load a model; when the operation has succeeded, it can be activated."""
        self._models.root.find(request.model_id)
        tenant = await self._tenant()
        host = self._models

        async def load(operation: Operation) -> dict[str, str]:
            model = await host.load(request.model_id)
            await tenant.operations.progress(operation.operation_id, succeeded=1)
            return {"model_id": model.model_id, "space_id": model.space.space_id}

        operation = await self._jobs.start(tenant.operations, LOAD, load, total=1, model_id=request.model_id)
        tenant.audit.add(_audit_event("LoadModel", reason=f"model {request.model_id}"))
        return model_pb2.LoadModelResponse(operation=operation_message(operation))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Unload a model; its memory is freed after the last request that uses it."""
        tenant = await self._tenant()
        await self._models.unload(request.model_id)
        tenant.audit.add(_audit_event("UnloadModel", reason=f"model {request.model_id}"))
        return model_pb2.UnloadModelResponse()

    async def ActivateModel(
        self, request: model_pb2.ActivateModelRequest, context: Context
    ) -> model_pb2.ActivateModelResponse:
        """Make a loaded model the default."""
        tenant = await self._tenant()
        active, previous = await self._models.activate(request.model_id, expected=request.expected_current_model_id)
        tenant.audit.add(_audit_event("ActivateModel", reason=f"model {active.model_id}"))
        return model_pb2.ActivateModelResponse(
            active=model_message(self._models.status_of(active)),
            previous=model_message(self._models.status_of(previous)),
        )

    async def MigrateCollection(
        self, request: model_pb2.MigrateCollectionRequest, context: Context
    ) -> model_pb2.MigrateCollectionResponse:
        """Start to re-embed a collection, or resume an interrupted migration."""
        tenant = await self._tenant()
        migration = MigrationRequest(
            request.collection_id,
            request.target_model_id,
            auto_activate=request.auto_activate,
            drop_missing=request.missing_crops == model_pb2.MISSING_CROP_POLICY_DROP,
        )
        operation = await self._migrations.start(tenant, migration, request_id=request.request_id)
        event = _audit_event(
            "MigrateCollection", request.collection_id, operation.total, f"model {request.target_model_id}"
        )
        tenant.audit.add(event)
        return model_pb2.MigrateCollectionResponse(operation=operation_message(operation))

    async def ActivateSpace(
        self, request: model_pb2.ActivateSpaceRequest, context: Context
    ) -> model_pb2.ActivateSpaceResponse:
        """Switch a collection to another of its spaces, from the next search on."""
        tenant = await self._tenant()
        previous = await tenant.store.read(reads.collection, request.collection_id)
        if self._models.model_of_space(request.space_id) is None:
            raise ModelNotFoundError(
                f"no loaded model has the space {request.space_id[:80]!r}, so crops could not be searched there: load "
                "its model first",
                field="space_id",
            )
        collection = await tenant.store.write(
            audit.audited_activate_space,
            request.collection_id,
            request.space_id,
            _audit_event("ActivateSpace"),
            expected=request.expected_current_space_id,
            allow_incomplete=request.allow_incomplete,
        )
        tenant.gallery.searcher.schedule_update(collection)
        return model_pb2.ActivateSpaceResponse(
            active=convert.space_message(collection.space), previous=convert.space_message(previous.space)
        )

    async def StartShadow(
        self, request: model_pb2.StartShadowRequest, context: Context
    ) -> model_pb2.StartShadowResponse:
        """Start a shadow: a candidate model repeats a sample of a collection's searches; or return the running one."""
        tenant, limits = await self._tenant(), shadow_limits(request)
        status = await self._shadows.start(tenant, request.collection_id, request.model_id, limits)
        return model_pb2.StartShadowResponse(shadow=shadow_message(status))

    async def GetShadow(self, request: model_pb2.GetShadowRequest, context: Context) -> model_pb2.GetShadowResponse:
        """Status of a collection's running or last shadow."""
        tenant = await self._tenant()
        status = await self._shadows.get(tenant, request.collection_id)
        return model_pb2.GetShadowResponse(shadow=shadow_message(status))

    async def StopShadow(self, request: model_pb2.StopShadowRequest, context: Context) -> model_pb2.StopShadowResponse:
        """Stop a collection's shadow."""
        tenant = await self._tenant()
        status = await self._shadows.stop(tenant, request.collection_id)
        tenant.audit.add(
            _audit_event("StopShadow", status.collection, status.figures.answered, f"model {status.model_id}")
        )
        return model_pb2.StopShadowResponse(shadow=shadow_message(status))


def _audit_event(method: str, collection: str = "", affected: int = 0, reason: str = "") -> AuditEvent:
    """The audit event of the current call; ``reason`` holds the model."""
    return AuditEvent(current().name, f"ModelService.{method}", collection, affected=affected, reason=reason)
