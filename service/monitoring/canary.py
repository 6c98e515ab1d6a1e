"""Readiness by a synthetic request: a generated crop is decoded, embedded and searched every few seconds.

A server that answers health checks while its model's thread hangs is worse than one that is down. So readiness is the
result of the last canary request: the services that embed are SERVING if the crop was embedded within the interval, the
search service also needs an answered search. Liveness, the empty service name, only means that the process responds.
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

MIN_REPEAT_COSINE = 0.999  # between two features of the same crop and model; other batch sizes differ by less
EMBEDDING_SERVICES = ("resight.v1.EmbeddingService", "resight.v1.GalleryService")
SEARCH_SERVICES = ("resight.v1.SearchService",)


class Canary:
    """Checks the server periodically. Call `start` and `stop` in the event loop.

    Its requests have the lowest priority, which is never starved by callers, so an overloaded server stays SERVING.

    Args:
        models: the active one embeds the crop.
        tenants: the default tenant's first collection in that model's space is searched; without any, only the list of
            collections is read.
        status: receives the result.
        interval_s: between two checks, and the time limit of each step.
    """

    def __init__(
        self, models: ModelHost, tenants: Tenants, status: health.HealthServicer, *, interval_s: float
    ) -> None:
        self._models, self._tenants, self._status, self._interval_s = models, tenants, status, interval_s
        (self._crop,) = draw_jpegs(count=1)
        self._reference: tuple[str, Feature] | None = (
            None  # the active model's SHA-256 and its first feature of the crop
        )
        self._serving: dict[str, bool] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the checks; the services count as serving until the first failure."""
        self._task = asyncio.create_task(self._forever(), name="canary")

    async def stop(self) -> None:
        """Stop the checks."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _forever(self) -> None:
        while True:
            started = time.monotonic()
            await self.check()
            await asyncio.sleep(max(0.0, self._interval_s - (time.monotonic() - started)))

    async def check(self) -> None:
        """Check once, and set the status of the services."""
        feature = await self._attempt("embedding", EMBEDDING_SERVICES, self._embed())
        if feature is None:
            await self._set_status(SEARCH_SERVICES, False)
        else:
            await self._attempt("searching", SEARCH_SERVICES, self._search(feature))

    async def _attempt(self, what: str, services: Sequence[str], step: Awaitable[Feature]) -> Feature | None:
        """The result of a step, or None if it failed or took too long; sets the status of the services."""
        try:
            async with asyncio.timeout(self._interval_s):
                answer = await step
        except (ReIDError, TimeoutError) as error:
            log.error("canary: %s failed: %s", what, str(error) or f"not done within {self._interval_s:.1f} s")
            answer = None
        except Exception:
            log.exception("canary: %s failed", what)
            answer = None
        await self._set_status(services, answer is not None)
        return answer

    async def _embed(self) -> Feature:
        with self._models.lease() as model:
            deadline = time.monotonic() + self._interval_s
            (made,) = await model.embed([self._crop], deadline, priority=Priority.REEMBED)
            if isinstance(made, ReIDError):
                raise made
            if self._reference is None or self._reference[0] != model.sha256:
                self._reference = model.sha256, made.feature
            similarity = float(np.dot(self._reference[1], made.feature))
            if not similarity > MIN_REPEAT_COSINE:
                raise UnavailableError(f"the feature of the same crop has changed, similarity {similarity:.4f}")
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

    async def _set_status(self, services: Sequence[str], serving: bool) -> None:
        """Set the status of services, if it has changed."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in services:
            if self._serving.get(name, True) != serving:
                log.log(
                    logging.INFO if serving else logging.ERROR,
                    "%s is %s",
                    name,
                    "serving" if serving else "not serving",
                )
                await self._status.set(name, state)
            self._serving[name] = serving
