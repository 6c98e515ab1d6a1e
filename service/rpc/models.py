"""The servicer of models and embedding spaces, and the conversion of search and shadow statistics."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from resight.errors import InputError, ModelNotFoundError
from resight.service.access.auth import current
from resight.service.access.interceptors import Context
from resight.service.inference.models import (
    LoadedModel,
    ModelHost,
    ModelState,
    ModelStatus,
    space_of_manifest,
)
from resight.service.jobs.migration import MigrationRequest, Migrations
from resight.service.jobs.runner import JobRunner
from resight.service.jobs.shadow import ShadowLimits, ShadowManager, ShadowState
from resight.service.jobs.shadow import ShadowStatus as ToldShadow
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


def shadow_bounds(request: model_pb2.StartShadowRequest) -> ShadowLimits:
    """How much a shadow samples.

    Raises:
        InputError: a share, number or duration out of its range.
    """
    sample = request.sample if request.HasField("sample") else 1.0
    if not 0.0 < sample <= 1.0:
        raise InputError(f"sample is a share above 0, at most 1, found {sample:g}", field="sample")
    if request.max_searches < 0:
        raise InputError(f"max_searches is 0 or more, found {request.max_searches}", field="max_searches")
    if not request.HasField("expire_after"):
        return ShadowLimits(sample, request.max_searches)
    after_us = request.expire_after.ToMicroseconds()
    if after_us <= 0:
        raise InputError("expire_after is above 0: leave it out for a shadow without end", field="expire_after")
    return ShadowLimits(sample, request.max_searches, now_us() + after_us)


def shadow_message(told: ToldShadow) -> model_pb2.Shadow:
    """A shadow with its figures."""
    active, candidate = (model_pb2.ShadowSide(**asdict(side)) for side in (told.figures.active, told.figures.candidate))
    return model_pb2.Shadow(
        collection_id=told.collection,
        model_id=told.model_id,
        space_id=told.space_id,
        active_model_id=told.active_model_id,
        active_space_id=told.active_space_id,
        state=SHADOW_STATES[told.state],
        sample=told.bounds.sample,
        max_searches=told.bounds.max_searches,
        start_time=timestamp(told.start_us),
        end_time=None if told.end_us is None else timestamp(told.end_us),
        expire_time=None if told.bounds.expire_us is None else timestamp(told.bounds.expire_us),
        operation_id=told.operation_id,
        figures=model_pb2.ShadowFigures(**{**asdict(told.figures), "active": active, "candidate": candidate}),
    )


MODEL_STATES = {
    ModelState.AVAILABLE: model_pb2.MODEL_STATE_AVAILABLE,
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


def model_message(info: ModelStatus) -> model_pb2.Model:
    """A model for the wire."""
    message = model_pb2.Model(
        model_id=info.model_id,
        state=MODEL_STATES[info.state],
        sha256=info.sha256,
        active=info.active,
        problem=info.problem,
    )
    if info.manifest is not None:
        message.version = info.manifest.created
        message.space.CopyFrom(convert.space_message(space_of_manifest(info.manifest)))
    if info.loaded is not None:
        message.provider, message.max_batch_size = info.loaded.provider, info.loaded.max_batch
        message.parity_min_cosine = info.loaded.min_cosine
    return message


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Models of the server, and the spaces of the caller's collections."""

    def __init__(
        self, models: ModelHost, migrations: Migrations, shadows: ShadowManager, tenants: Tenants, work: JobRunner
    ) -> None:
        self._models, self._migrations, self._shadows = models, migrations, shadows
        self._tenants, self._work = tenants, work

    async def _own(self) -> Tenant:
        """The caller's own."""
        return await self._tenants.tenant(current().tenant)

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """Models by name, page by page."""
        limit = page_size(request.page_size)
        after = name_of_token(request.page_token)
        names = [name for name in await asyncio.to_thread(self._models.names) if name > after]
        found = [await self._info(name) for name in names[:limit]]
        return model_pb2.ListModelsResponse(
            models=found, next_page_token=page_token(names[limit - 1]) if len(names) > limit else ""
        )

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """One model as it stands."""
        return model_pb2.GetModelResponse(model=await self._info(request.model_id))

    async def _info(self, model_id: str) -> model_pb2.Model:
        return model_message(await asyncio.to_thread(self._models.info, model_id))

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        """Begin to load a model; the operation tells when it can be activated, or why not."""
        self._models.root.find(request.model_id)
        tenant = await self._own()
        host = self._models

        async def load(operation: Operation) -> dict[str, str]:
            model = await host.load(request.model_id)
            await tenant.operations.progress(operation.operation_id, succeeded=1)
            return {"model_id": model.model_id, "space_id": model.space.space_id}

        operation = await self._work.start(tenant.operations, LOAD, load, total=1, model_id=request.model_id)
        tenant.audit.add(_audit_event("LoadModel", reason=f"model {request.model_id}"))
        return model_pb2.LoadModelResponse(operation=operation_message(operation))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Let a model go when the last request that began with it has ended."""
        tenant = await self._own()
        await self._models.unload(request.model_id)
        tenant.audit.add(_audit_event("UnloadModel", reason=f"model {request.model_id}"))
        return model_pb2.UnloadModelResponse()

    async def ActivateModel(
        self, request: model_pb2.ActivateModelRequest, context: Context
    ) -> model_pb2.ActivateModelResponse:
        """Let a loaded model embed what names none."""
        tenant = await self._own()
        active, previous = await self._models.activate(request.model_id, expected=request.expected_current_model_id)
        tenant.audit.add(_audit_event("ActivateModel", reason=f"model {active.model_id}"))
        return model_pb2.ActivateModelResponse(active=self._told(active), previous=self._told(previous))

    def _told(self, model: LoadedModel) -> model_pb2.Model:
        return model_message(self._models.info_of(model))

    async def MigrateCollection(
        self, request: model_pb2.MigrateCollectionRequest, context: Context
    ) -> model_pb2.MigrateCollectionResponse:
        """Begin to embed a collection anew, or go on with it."""
        tenant = await self._own()
        wanted = MigrationRequest(
            request.collection_id,
            request.target_model_id,
            auto_activate=request.auto_activate,
            drop_missing=request.missing_crops == model_pb2.MISSING_CROP_POLICY_DROP,
        )
        operation = await self._migrations.start(tenant, wanted, request_id=request.request_id)
        told = _audit_event(
            "MigrateCollection", request.collection_id, operation.total, f"model {request.target_model_id}"
        )
        tenant.audit.add(told)
        return model_pb2.MigrateCollectionResponse(operation=operation_message(operation))

    async def ActivateSpace(
        self, request: model_pb2.ActivateSpaceRequest, context: Context
    ) -> model_pb2.ActivateSpaceResponse:
        """Search a collection in another of its spaces from the next search on."""
        tenant = await self._own()
        previous = await tenant.store.read(reads.collection, request.collection_id)
        if self._models.in_space(request.space_id) is None:
            raise ModelNotFoundError(
                f"no loaded model embeds into space {request.space_id[:80]!r}, so no crop could be searched there: "
                "load its model first",
                field="space_id",
            )
        now = await tenant.store.write(
            audit.audited_activate_space,
            request.collection_id,
            request.space_id,
            _audit_event("ActivateSpace"),
            expected=request.expected_current_space_id,
            allow_incomplete=request.allow_incomplete,
        )
        tenant.gallery.searcher.follow(now)
        return model_pb2.ActivateSpaceResponse(
            active=convert.space_message(now.space), previous=convert.space_message(previous.space)
        )

    async def StartShadow(
        self, request: model_pb2.StartShadowRequest, context: Context
    ) -> model_pb2.StartShadowResponse:
        """Let a candidate answer a sample of a collection's searches too, or go on with it."""
        tenant, bounds = await self._own(), shadow_bounds(request)
        told = await self._shadows.start(tenant, request.collection_id, request.model_id, bounds)
        return model_pb2.StartShadowResponse(shadow=shadow_message(told))

    async def GetShadow(self, request: model_pb2.GetShadowRequest, context: Context) -> model_pb2.GetShadowResponse:
        """A collection's shadow as it stands, or ended."""
        tenant = await self._own()
        told = await self._shadows.get(tenant, request.collection_id)
        return model_pb2.GetShadowResponse(shadow=shadow_message(told))

    async def StopShadow(self, request: model_pb2.StopShadowRequest, context: Context) -> model_pb2.StopShadowResponse:
        """End a collection's shadow."""
        tenant = await self._own()
        told = await self._shadows.stop(tenant, request.collection_id)
        tenant.audit.add(_audit_event("StopShadow", told.collection, told.figures.answered, f"model {told.model_id}"))
        return model_pb2.StopShadowResponse(shadow=shadow_message(told))


def _audit_event(method: str, collection: str = "", affected: int = 0, reason: str = "") -> AuditEvent:
    """A row of the audit for a call of this service that now runs; which model stands where callers give reasons."""
    return AuditEvent(current().name, f"ModelService.{method}", collection, affected=affected, reason=reason)
