"""The servicer of models and of collections' spaces: translate, call, translate."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from resight.errors import ModelNotFoundError
from resight.service import audited, reads, translate
from resight.service.audit import Event
from resight.service.auth import current
from resight.service.long_work import LongWork
from resight.service.migrate import Migrations, Wanted
from resight.service.model import Model, ModelInfo, ModelState, space_of
from resight.service.models import ModelHost
from resight.service.operations import LOAD, Operation
from resight.service.paging import name_of_token, page_size, page_token
from resight.service.rpc_operations import operation_message
from resight.service.shadows import Shadows
from resight.service.tenants import Tenant, Tenants
from resight.service.translate_figures import shadow_bounds, shadow_message
from resight.v1 import model_pb2, model_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

STATES = {
    ModelState.AVAILABLE: model_pb2.MODEL_STATE_AVAILABLE,
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


def model_message(info: ModelInfo) -> model_pb2.Model:
    """A model for the wire."""
    message = model_pb2.Model(
        model_id=info.model_id, state=STATES[info.state], sha256=info.sha256, active=info.active, problem=info.problem
    )
    if info.manifest is not None:
        message.version = info.manifest.created
        message.space.CopyFrom(translate.space_message(space_of(info.manifest)))
    if info.loaded is not None:
        message.provider, message.max_batch_size = info.loaded.provider, info.loaded.max_batch
        message.parity_min_cosine = info.loaded.min_cosine
    return message


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Models of the server, and the spaces of the caller's collections."""

    def __init__(
        self, models: ModelHost, migrations: Migrations, shadows: Shadows, tenants: Tenants, work: LongWork
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

        operation = await self._work.begin(tenant.operations, LOAD, load, total=1, model_id=request.model_id)
        tenant.audit.note(_event("LoadModel", reason=f"model {request.model_id}"))
        return model_pb2.LoadModelResponse(operation=operation_message(operation))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Let a model go when the last request that began with it has ended."""
        tenant = await self._own()
        await self._models.unload(request.model_id)
        tenant.audit.note(_event("UnloadModel", reason=f"model {request.model_id}"))
        return model_pb2.UnloadModelResponse()

    async def ActivateModel(
        self, request: model_pb2.ActivateModelRequest, context: Context
    ) -> model_pb2.ActivateModelResponse:
        """Let a loaded model embed what names none."""
        tenant = await self._own()
        active, previous = await self._models.activate(request.model_id, expected=request.expected_current_model_id)
        tenant.audit.note(_event("ActivateModel", reason=f"model {active.model_id}"))
        return model_pb2.ActivateModelResponse(active=self._told(active), previous=self._told(previous))

    def _told(self, model: Model) -> model_pb2.Model:
        return model_message(self._models.info_of(model))

    async def MigrateCollection(
        self, request: model_pb2.MigrateCollectionRequest, context: Context
    ) -> model_pb2.MigrateCollectionResponse:
        """Begin to embed a collection anew, or go on with it."""
        tenant = await self._own()
        wanted = Wanted(
            request.collection_id,
            request.target_model_id,
            auto_activate=request.auto_activate,
            drop_missing=request.missing_crops == model_pb2.MISSING_CROP_POLICY_DROP,
        )
        operation = await self._migrations.begin(tenant, wanted, request_id=request.request_id)
        told = _event("MigrateCollection", request.collection_id, operation.total, f"model {request.target_model_id}")
        tenant.audit.note(told)
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
            audited.activate_space,
            request.collection_id,
            request.space_id,
            _event("ActivateSpace"),
            expected=request.expected_current_space_id,
            allow_incomplete=request.allow_incomplete,
        )
        tenant.gallery.searcher.follow(now)
        return model_pb2.ActivateSpaceResponse(
            active=translate.space_message(now.space), previous=translate.space_message(previous.space)
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
        tenant.audit.note(_event("StopShadow", told.collection, told.figures.answered, f"model {told.model_id}"))
        return model_pb2.StopShadowResponse(shadow=shadow_message(told))


def _event(method: str, collection: str = "", affected: int = 0, reason: str = "") -> Event:
    """A row of the audit for a call of this service that now runs; which model stands where callers give reasons."""
    return Event(current().name, f"ModelService.{method}", collection, affected=affected, reason=reason)
