"""Shadow runs: a candidate model answers a sample of live searches beside the active one, for statistics only.

A shadow search starts after the caller has received its answer and waits behind all callers. It embeds with the
priority of a migration, one search at a time and for no more than `TIME_SHARE` of the time; samples beyond that are
dropped and counted. A few crops wait in memory for some seconds; of a query only the counts of
`resight.service.jobs.shadow_comparison` are kept. A run ends with the process and stays listed as an operation. There
is at most one per collection.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from resight.errors import (
    CollectionNotFoundError,
    ConflictError,
    DeadlineError,
    ExpiredInQueueError,
    OverloadedError,
    ReIDError,
    ShadowNotFoundError,
    SpaceMismatchError,
    UnavailableError,
)
from resight.service.access.auth import current
from resight.service.inference.features import CropSource
from resight.service.inference.models import ModelHost
from resight.service.inference.priority_queue import QUIET_S, Priority
from resight.service.jobs.runner import JobCancelled, JobRunner
from resight.service.jobs.shadow_comparison import (
    ModelSide,
    ModelSideStatistics,
    ShadowStatistics,
    ShadowTally,
)
from resight.service.records import Collection, Space, now_us
from resight.service.search.ranking import RankedResult, SearchParams, run_search
from resight.service.storage import reads, spaces
from resight.service.storage.audit import AuditEvent
from resight.service.storage.operations import Operation
from resight.service.tenants import Tenant

log = logging.getLogger(__name__)

MAX_WAITING_SAMPLES = 16  # per run: their crops are in memory
MAX_SAMPLE_AGE_S = 5.0  # since the caller's answer; a sample not started by then is dropped
BUSY_CROPS = 4  # callers' crops and queries in progress above which a shadow search does not start
TIME_SHARE = 1 / 32  # of a core, at most: shadow batches must not show in the callers' 95th percentile
CHECK_EVERY_S = 1.0  # between two checks whether the run is to end
MEASURE_EVERY = 4  # one in so many searches is done with both models, to compare their times


class ShadowState(StrEnum):
    """As ``ShadowState`` in model.proto."""

    RUNNING = "running"
    DONE = "done"
    EXPIRED = "expired"
    STOPPED = "stopped"
    SUPERSEDED = "superseded"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class ShadowLimits:
    """How much is sampled.

    Attributes:
        sample: share of the searches, 0..1.
        max_searches: the run ends after so many answered searches; 0 = no limit.
        expire_us: the run ends at this time; None = no limit.
    """

    sample: float = 1.0
    max_searches: int = 0
    expire_us: int | None = None


@dataclass(frozen=True)
class ShadowStatus:
    """The state of a shadow run; the fields are those of ``ShadowRun`` in model.proto."""

    collection: str
    model_id: str
    space_id: str
    active_model_id: str
    active_space_id: str
    state: ShadowState
    bounds: ShadowLimits
    start_us: int
    end_us: int | None = None
    operation_id: str = ""
    figures: ShadowStatistics = field(default_factory=ShadowStatistics)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ShadowStatus:
        """From the result of `to_json`."""
        figures = body["figures"]
        sides = {side: ModelSideStatistics(**figures[side]) for side in ("active", "candidate")}
        fields = {**body, "state": ShadowState(body["state"]), "bounds": ShadowLimits(**body["bounds"])}
        return cls(**{**fields, "figures": ShadowStatistics(**{**figures, **sides})})


@dataclass(frozen=True)
class ShadowSample:
    """A search that was answered: its parameters, its crops, the answer, and its time in `time.monotonic` seconds."""

    collection: Collection
    params: SearchParams
    source: CropSource
    answer: RankedResult
    answered_s: float


class ShadowRun:
    """One shadow run. Used in the event loop's thread.

    Args:
        tenant: of the collection.
        initial: its status at the start.
        space: the candidate's.
        callers_crops: number of callers' crops that the server is working on.

    Attributes:
        bounds: may be changed while it runs.
        operation_id: of the long-running operation whose job is `run`.
    """

    def __init__(self, tenant: Tenant, initial: ShadowStatus, space: Space, callers_crops: Callable[[], int]) -> None:
        self._tenant, self._initial, self._space, self._callers_crops = tenant, initial, space, callers_crops
        self._tally, self._samples = ShadowTally(), asyncio.Queue[ShadowSample](MAX_WAITING_SAMPLES)
        self._state, self._ended = ShadowState.RUNNING, asyncio.Event()
        self._end_us: int | None = None
        self._working: asyncio.Task[None] | None = None
        self._reported: dict[str, int] = {}
        self._worked_s = 0.0  # on the current sample
        self.bounds, self.operation_id = initial.bounds, ""

    @property
    def running(self) -> bool:
        """Whether it takes samples."""
        return self._state is ShadowState.RUNNING

    def status(self) -> ShadowStatus:
        """Its current status."""
        return replace(
            self._initial,
            state=self._state,
            bounds=self.bounds,
            end_us=self._end_us,
            operation_id=self.operation_id,
            figures=self._tally.figures(),
        )

    def finish(self, state: ShadowState) -> None:
        """Take no more samples and drop the waiting ones; no effect on a run that has ended."""
        if self.running:
            self._state, self._end_us = state, now_us()
            self._ended.set()
            if self._working is not None:
                self._working.cancel()
            tally = self._tally
            tally.dropped = tally.sampled - tally.answered - tally.failed
            log.info("shadow %s collection=%s model=%s", state, self._initial.collection, self._initial.model_id)

    def matches(self, collection: Collection) -> bool:
        """Whether it runs and the collection's active space is still the one it is compared with; else ends the run."""
        if collection.space.space_id != self._initial.active_space_id:
            self.finish(ShadowState.SUPERSEDED)
        return self.running

    def offer(self, collection: Collection, params: SearchParams, source: CropSource, answer: RankedResult) -> None:
        """Offer an answered search as a sample; returns at once, whether it is taken or not."""
        if not self.matches(collection):
            return
        self._tally.offered += 1
        if random.random() >= self.bounds.sample:  # random: a periodic sample could always hit the same cameras
            return
        self._tally.sampled += 1
        if self._samples.full():
            self._tally.dropped += 1
        else:
            self._samples.put_nowait(ShadowSample(collection, params, source, answer, time.monotonic()))

    async def run(self) -> dict[str, str]:
        """Answer samples until the run ends: the job of its operation; returns the operation's result."""
        # A context of its own: its work must not count as part of the call that started it.
        self._working = asyncio.create_task(self._work_forever(), name="shadow", context=contextvars.Context())
        try:
            while self.running:
                await self._wait_and_check()
        finally:
            self._working.cancel()
            await asyncio.wait((self._working,))
        final = self.status()
        await self._report(final)
        if final.state is ShadowState.STOPPED:
            raise JobCancelled
        return {"state": final.state.value, "model_id": final.model_id, "space_id": final.space_id}

    async def _report(self, ended: ShadowStatus | None = None) -> Operation:
        """Update the operation's counts and, at the end, its final status; returns the operation."""
        tally = self._tally
        counts = {"total": tally.sampled, "succeeded": tally.answered, "failed": tally.failed, "skipped": tally.dropped}
        if ended is None and counts == self._reported:
            return await self._tenant.operations.get(self.operation_id)
        self._reported, details = counts, None if ended is None else {"shadow": ended.to_json()}
        return await self._tenant.operations.progress(self.operation_id, details=details, result=None, **counts)

    async def _wait_and_check(self) -> None:
        """Wait `CHECK_EVERY_S` or until the run ends, then check whether it should end."""
        left_s = CHECK_EVERY_S if self.bounds.expire_us is None else (self.bounds.expire_us - now_us()) / 1e6
        try:
            await asyncio.wait_for(self._ended.wait(), max(0.0, min(CHECK_EVERY_S, left_s)))
            return
        except TimeoutError:
            pass
        if self.bounds.expire_us is not None and now_us() >= self.bounds.expire_us:
            self.finish(ShadowState.EXPIRED)
        if (await self._report()).cancel_requested:
            self.finish(ShadowState.STOPPED)
        try:
            self.matches(await self._tenant.store.read(reads.collection, self._initial.collection))
        except CollectionNotFoundError:
            self.finish(ShadowState.SUPERSEDED)

    async def _work_forever(self) -> None:
        while True:
            sample = await self._samples.get()
            self._worked_s = 0.0
            try:
                await self._wait_until_idle(sample)
                await self._answer(sample)
            except (OverloadedError, DeadlineError, UnavailableError):
                self._tally.dropped += 1
            except ReIDError as error:
                self._tally.failed += 1
                log.warning("the shadow of %s cannot answer a search: %s", self._initial.collection, error)
            except Exception:
                self._tally.failed += 1
                log.exception("the shadow of %s failed", self._initial.collection)
            if 0 < self.bounds.max_searches <= self._tally.answered:
                self.finish(ShadowState.DONE)
            await asyncio.sleep(self._worked_s * (1 / TIME_SHARE - 1))

    async def _wait_until_idle(self, sample: ShadowSample) -> None:
        """Wait until the caller has its answer and few others are waiting.

        Raises:
            ExpiredInQueueError: that did not happen within `MAX_SAMPLE_AGE_S`.
        """
        await asyncio.sleep(sample.answered_s + QUIET_S - time.monotonic())
        while self._callers_crops() + self._tenant.gallery.searcher.waiting > BUSY_CROPS:
            if time.monotonic() >= sample.answered_s + MAX_SAMPLE_AGE_S:
                raise ExpiredInQueueError("the server was too busy for the shadow: it continues with the next search")
            await asyncio.sleep(QUIET_S)

    async def _answer(self, sample: ShadowSample) -> None:
        """Answer with the candidate and, one in `MEASURE_EVERY` times, the active model too, in alternating order."""
        tally = self._tally
        turns = [(tally.candidate, replace(sample.collection, space=self._space))]
        rounds, since = divmod(tally.answered, MEASURE_EVERY)
        if not since:
            turns.append((tally.active, sample.collection))
        found: dict[ModelSide, tuple[RankedResult, int]] = {}
        for side, collection in turns[:: -1 if rounds % 2 else 1]:
            found[side] = await self._search(collection, sample)
        tally.compare(sample.answer, found[tally.candidate][0])
        for side, (answer, infer_ns) in found.items() if len(found) == 2 else ():
            side.measure(infer_ns, answer.search_ns)

    async def _search(self, collection: Collection, sample: ShadowSample) -> tuple[RankedResult, int]:
        """The sample's search in a collection's space, and the inference time per crop in nanoseconds."""
        gallery, deadline = self._tenant.gallery, sample.answered_s + MAX_SAMPLE_AGE_S
        made = await gallery.extract_feature(
            collection, sample.source, deadline, space=collection.space, priority=Priority.REEMBED
        )
        (answer,) = await run_search(gallery.searcher, collection, [sample.params.with_feature(made.feature)], deadline)
        self._worked_s += (made.timings.decode_ns + made.timings.infer_ns + answer.search_ns + answer.rerank_ns) / 1e9
        return answer, made.timings.infer_ns // len(sample.source.images)


SHADOW_KIND = "shadow"
MAX_LISTED = 1000  # operations, the newest first: as many as are kept


class ShadowManager:
    """All shadow runs of one server. Used in the event loop's thread only.

    Args:
        models: has the candidates.
        waiting: number of crops in progress, by priority.
        work: runs the jobs.
    """

    def __init__(self, models: ModelHost, waiting: Callable[[], dict[Priority, int]], work: JobRunner) -> None:
        self._models, self._waiting, self._work = models, waiting, work
        self._shadows: dict[tuple[str, int], ShadowRun] = {}  # by tenant and collection's key, until ended
        self._turn = asyncio.Lock()

    def running_shadow(self, tenant: Tenant, collection: Collection) -> ShadowRun | None:
        """The run of a collection that takes samples, if any."""
        found = self._shadows.get((tenant.name, collection.key))
        return found if found is not None and found.running else None

    def running(self) -> list[tuple[str, ShadowStatus]]:
        """The running ones: tenant name and status."""
        return [(tenant, shadow.status()) for (tenant, _), shadow in self._shadows.items() if shadow.running]

    async def start(self, tenant: Tenant, name: str, model_id: str, bounds: ShadowLimits) -> ShadowStatus:
        """Start a run; if one with that model is running, change its bounds instead.

        Raises:
            CollectionNotFoundError: no such collection.
            ModelNotFoundError: the model is not loaded.
            SpaceMismatchError: the collection was not migrated to the model's space, or that space is active.
            ConflictError: another model shadows the collection.
        """
        async with self._turn:
            collection = await tenant.store.read(reads.collection, name)
            running = self.running_shadow(tenant, collection)
            if running is not None and running.matches(collection):
                now = running.status()
                if now.model_id != model_id:
                    raise ConflictError(
                        f"model {now.model_id} shadows collection {name}: stop it first", field="model_id"
                    )
                running.bounds = bounds
                return running.status()
            with self._models.lease(model_id) as model:
                space = model.space
            await self._check_space(tenant, collection, model_id, space)
            return await self._start(tenant, collection, model_id, space, bounds)

    async def _check_space(self, tenant: Tenant, collection: Collection, model_id: str, space: Space) -> None:
        """Raise SpaceMismatchError unless the collection's features in the candidate's space are ready."""
        found = await tenant.store.read(spaces.collection_spaces, collection.key)
        state = next((one.state for one in found if one.space.space_id == space.space_id), None)
        if state == "ready":
            return
        problem = {
            None: f"has no features of model {model_id}: migrate it to that model first, without activation",
            "building": f"is being migrated to model {model_id}: wait until that has ended",
            "active": f"is searched with model {model_id} already: name the candidate",
            "retired": f"left the space of model {model_id}: migrate it again, which adds what is missing",
        }[state]
        raise SpaceMismatchError(f"collection {collection.name} {problem}", field="model_id", space_id=space.space_id)

    async def _start(
        self, tenant: Tenant, collection: Collection, model_id: str, space: Space, bounds: ShadowLimits
    ) -> ShadowStatus:
        old = collection.space
        active = self._models.model_of_space(old.space_id)
        names = (model_id, space.space_id, active.model_id if active else old.model_id, old.space_id)
        initial = ShadowStatus(collection.name, *names, ShadowState.RUNNING, bounds, now_us())
        shadow = ShadowRun(tenant, initial, space, self._callers_crops)

        place = tenant.name, collection.key

        async def work(operation: Operation) -> dict[str, str]:
            try:
                with self._models.lease(model_id, pin=True):
                    return await shadow.run()
            finally:
                shadow.finish(ShadowState.INTERRUPTED)  # no effect if it has ended; else the server stops or failed
                if self._shadows.get(place) is shadow:
                    del self._shadows[place]

        operation = await self._work.start(
            tenant.operations,
            SHADOW_KIND,
            work,
            key=collection.key,
            collection=collection.name,
            shadow=initial.to_json(),
        )
        shadow.operation_id = operation.operation_id  # the job has not run yet
        self._shadows[place] = shadow
        event = AuditEvent(current().name, "ModelService.StartShadow", collection.name, reason=f"model {model_id}")
        tenant.audit.add(event)
        tenant.gallery.searcher.schedule_update(
            replace(collection, space=space)
        )  # loads the index, if it is not loaded yet
        return shadow.status()

    def _callers_crops(self) -> int:
        waiting = self._waiting()
        return waiting[Priority.INTERACTIVE] + waiting[Priority.ENROL]

    async def get(self, tenant: Tenant, name: str) -> ShadowStatus:
        """The collection's running shadow, or the last one.

        Raises:
            CollectionNotFoundError: no such collection.
            ShadowNotFoundError: there was none, among the operations that are kept.
        """
        collection = await tenant.store.read(reads.collection, name)
        if (shadow := self._shadows.get((tenant.name, collection.key))) is not None:
            shadow.matches(collection)  # ends it if the collection was switched
            return shadow.status()
        for old in await tenant.operations.list_operations(limit=MAX_LISTED, kind=SHADOW_KIND):
            if old.details["key"] == collection.key:
                status = replace(ShadowStatus.from_json(old.details["shadow"]), operation_id=old.operation_id)
                if status.state is ShadowState.RUNNING:  # stored at the start and never updated: it did not end well
                    status = replace(status, state=ShadowState.INTERRUPTED, end_us=old.end_us)
                return status
        raise ShadowNotFoundError(
            f"no model has shadowed collection {name}: start one with StartShadow", field="collection_id", shadow=name
        )

    async def stop(self, tenant: Tenant, name: str) -> ShadowStatus:
        """Stop the collection's shadow; raises the errors of `get`."""
        status = await self.get(tenant, name)
        collection = await tenant.store.read(reads.collection, name)
        if (running := self.running_shadow(tenant, collection)) is not None:
            running.finish(ShadowState.STOPPED)
            status = running.status()
        return status
