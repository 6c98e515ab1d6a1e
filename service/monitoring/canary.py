"""Health by doing: a made-up crop goes through decoding, the model and a search every few seconds.

A server that answers health checks while its model's thread hangs is worse than one that is down. So readiness is what
the canary found: the services that embed are SERVING while a crop came through within the last interval, searching
also needs a search that was answered. Liveness, the empty service name, only tells that the process answers at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Sequence

import numpy as np
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs

from resight.arrays import Feature
from resight.bundle.probes import draw_jpegs
from resight.errors import ReIDError, UnavailableError
from resight.service.inference.models import ModelHost
from resight.service.inference.priority_queue import Priority
from resight.service.records import DEFAULT_TENANT, Filter
from resight.service.search.searcher import NearestQuery
from resight.service.storage import reads
from resight.service.tenants import Tenants

log = logging.getLogger(__name__)

MIN_REPEAT_COSINE = 0.999  # cosine of a crop with itself on the same model; batches of other sizes differ by less
EMBEDDING_SERVICES = ("resight.v1.EmbeddingService", "resight.v1.GalleryService")
SEARCH_SERVICES = ("resight.v1.SearchService",)


class Canary:
    """Goes through a server again and again. `start` and `stop` it in the event loop.

    It goes with the lowest priority, which no flood of callers starves, so an overloaded server stays SERVING.

    Args:
        models: the active one embeds it.
        tenants: the default one's first collection in that model's space is searched; without any, the store is read.
        status: is told.
        interval_s: between two, and how long one may take.
    """

    def __init__(
        self, models: ModelHost, tenants: Tenants, status: health.HealthServicer, *, interval_s: float
    ) -> None:
        self._models, self._tenants, self._status, self._interval_s = models, tenants, status, interval_s
        (self._crop,) = draw_jpegs(count=1)
        self._known: tuple[str, Feature] | None = None  # the active model's manifest and its feature
        self._serving: dict[str, bool] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the services count as serving until the first one is late."""
        self._task = asyncio.create_task(self._forever(), name="canary")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _forever(self) -> None:
        while True:
            started = time.monotonic()
            await self.fly()
            await asyncio.sleep(max(0.0, self._interval_s - (time.monotonic() - started)))

    async def fly(self) -> None:
        """Go through once, and tell what was found."""
        feature = await self._tried("embedding", EMBEDDING_SERVICES, self._embed())
        if feature is None:
            await self._tell(SEARCH_SERVICES, False)
        else:
            await self._tried("searching", SEARCH_SERVICES, self._search(feature))

    async def _tried(self, what: str, services: Sequence[str], step: Awaitable[Feature]) -> Feature | None:
        """A step's answer within the interval, or None; the services are told which."""
        try:
            async with asyncio.timeout(self._interval_s):
                answer = await step
        except (ReIDError, TimeoutError) as error:
            log.error("the canary found no way through %s: %s", what, str(error) or f"not in {self._interval_s:.1f} s")
            answer = None
        except Exception:
            log.exception("the canary failed in %s", what)
            answer = None
        await self._tell(services, answer is not None)
        return answer

    async def _embed(self) -> Feature:
        with self._models.lease() as model:
            deadline = time.monotonic() + self._interval_s
            (made,) = await model.embed([self._crop], deadline, priority=Priority.REEMBED)
            if isinstance(made, ReIDError):
                raise made
            if self._known is None or self._known[0] != model.sha256:
                self._known = model.sha256, made.feature
            similarity = float(np.dot(self._known[1], made.feature))
            if not similarity > MIN_REPEAT_COSINE:
                raise UnavailableError(f"the model gives another feature than before, similarity {similarity:.4f}")
            return made.feature

    async def _search(self, feature: Feature) -> Feature:
        tenant = await self._tenants.tenant(DEFAULT_TENANT)
        space = self._models.active.space.space_id
        for collection in await tenant.store.read(reads.collections, limit=-1):
            if collection.space.space_id == space:
                query = NearestQuery(feature, 1, Filter())
                deadline = time.monotonic() + self._interval_s
                await tenant.gallery.searcher.search(collection, [query], with_features=False, deadline=deadline)
                break
        return feature

    async def _tell(self, services: Sequence[str], serving: bool) -> None:
        """Set the status of services where it changes."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in services:
            if self._serving.get(name, True) != serving:
                log.log(logging.INFO if serving else logging.ERROR, "%s is %s", name, "serving" if serving else "not")
                await self._status.set(name, state)
            self._serving[name] = serving
