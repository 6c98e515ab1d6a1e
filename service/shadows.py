"""The shadows of a server: one a collection, begun, told and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from resight.errors import ConflictError, ShadowNotFoundError, SpaceMismatchError
from resight.service import reads, spaces
from resight.service.audit import Event
from resight.service.auth import current
from resight.service.entries import Collection, Space, now_us
from resight.service.lanes import Priority
from resight.service.long_work import LongWork
from resight.service.models import ModelHost
from resight.service.operations import Operation
from resight.service.shadow import Bounds, Shadow, ShadowState, Told
from resight.service.tenants import Tenant

KIND = "shadow"
LOOKED_AT = 1000  # operations, the newest first: as many finished ones as are remembered


class Shadows:
    """All of one server. Only the event loop's thread uses it.

    Args:
        models: has the candidates.
        waiting: crops that are under way, by priority.
        work: carries them out.
    """

    def __init__(self, models: ModelHost, waiting: Callable[[], dict[Priority, int]], work: LongWork) -> None:
        self._models, self._waiting, self._work = models, waiting, work
        self._shadows: dict[tuple[str, int], Shadow] = {}  # by tenant and collection's key, until noted as ended
        self._turn = asyncio.Lock()

    def of(self, tenant: Tenant, collection: Collection) -> Shadow | None:
        """The one that runs over a collection, to be offered what was answered."""
        found = self._shadows.get((tenant.name, collection.key))
        return found if found is not None and found.running else None

    def running(self) -> list[tuple[str, Told]]:
        """Tenants and shadows as they stand."""
        return [(tenant, shadow.told()) for (tenant, _), shadow in self._shadows.items() if shadow.running]

    async def start(self, tenant: Tenant, name: str, model_id: str, bounds: Bounds) -> Told:
        """Begin one, or give the one with that model other bounds and let it go on.

        Raises:
            CollectionNotFoundError: no such collection.
            ModelNotFoundError: the model is not loaded.
            SpaceMismatchError: the collection was not migrated to its space, or is searched in it.
            ConflictError: another model shadows the collection.
        """
        async with self._turn:
            of = await tenant.store.read(reads.collection, name)
            under_way = self.of(tenant, of)
            if under_way is not None and under_way.fits(of):
                now = under_way.told()
                if now.model_id != model_id:
                    raise ConflictError(
                        f"model {now.model_id} shadows collection {name}: stop it first", field="model_id"
                    )
                under_way.bounds = bounds
                return under_way.told()
            with self._models.lease(model_id) as model:
                space = model.space
            await self._check(tenant, of, model_id, space)
            return await self._begin(tenant, of, model_id, space, bounds)

    async def _check(self, tenant: Tenant, of: Collection, model_id: str, space: Space) -> None:
        held = await tenant.store.read(spaces.held, of.key)
        state = next((one.state for one in held if one.space.space_id == space.space_id), None)
        if state == "ready":
            return
        found = {
            None: f"has no features of model {model_id}: migrate it to that model first, without activation",
            "building": f"is being migrated to model {model_id}: wait until that has ended",
            "active": f"is searched with model {model_id} already: name the candidate",
            "retired": f"left the space of model {model_id}: migrate it again, which adds what is missing",
        }[state]
        raise SpaceMismatchError(f"collection {of.name} {found}", field="model_id", space_id=space.space_id)

    async def _begin(self, tenant: Tenant, of: Collection, model_id: str, space: Space, bounds: Bounds) -> Told:
        active = self._models.in_space(of.space.space_id)
        names = (model_id, space.space_id, active.model_id if active else of.space.model_id, of.space.space_id)
        begun = Told(of.name, *names, ShadowState.RUNNING, bounds, now_us())
        shadow = Shadow(tenant, begun, space, self._under_way)

        place = tenant.name, of.key

        async def work(operation: Operation) -> dict[str, str]:
            try:
                with self._models.lease(model_id, pin=True):
                    return await shadow.run()
            finally:
                shadow.end(ShadowState.INTERRUPTED)  # where it has not ended: the server does, or the disk is broken
                if self._shadows.get(place) is shadow:
                    del self._shadows[place]

        operation = await self._work.begin(
            tenant.operations, KIND, work, key=of.key, collection=of.name, shadow=begun.noted()
        )
        shadow.operation_id = operation.operation_id  # before its work begins
        self._shadows[place] = shadow
        row = Event(current().name, "ModelService.StartShadow", of.name, reason=f"model {model_id}")
        tenant.audit.note(row)  # of a beginning; who asks again to look at it begins nothing
        tenant.gallery.searcher.follow(replace(of, space=space))  # its index, should the server have started since
        return shadow.told()

    def _under_way(self) -> int:
        waiting = self._waiting()
        return waiting[Priority.INTERACTIVE] + waiting[Priority.ENROL]

    async def get(self, tenant: Tenant, name: str) -> Told:
        """The collection's shadow that runs, or ran last.

        Raises:
            CollectionNotFoundError: no such collection.
            ShadowNotFoundError: none was begun, as far as is remembered.
        """
        of = await tenant.store.read(reads.collection, name)
        if (held := self._shadows.get((tenant.name, of.key))) is not None:
            held.fits(of)
            return held.told()
        for old in await tenant.operations.listed(limit=LOOKED_AT, kind=KIND):
            if old.details["key"] == of.key:
                told = replace(Told.of(old.details["shadow"]), operation_id=old.operation_id)
                if told.state is ShadowState.RUNNING:  # as it was noted when it began
                    told = replace(told, state=ShadowState.INTERRUPTED, end_us=old.end_us)
                return told
        raise ShadowNotFoundError(
            f"no model has shadowed collection {name}: begin with StartShadow", field="collection_id", shadow=name
        )

    async def stop(self, tenant: Tenant, name: str) -> Told:
        """End the collection's shadow; raises what `get` does."""
        told = await self.get(tenant, name)
        of = await tenant.store.read(reads.collection, name)
        if (running := self.of(tenant, of)) is not None:
            running.end(ShadowState.STOPPED)
            told = running.told()
        return told
