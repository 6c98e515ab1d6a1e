"""Shadows: a candidate model answers a sample of live searches beside the active one, for statistics only.

A shadow search starts when the caller has its answer, waits behind all callers, embeds with the priority of a
migration, one search at a time and for no more than `TIME_SHARE` of the time; what does not fit is dropped and counted.
A few crops wait in memory for some seconds; of a query nothing is kept but the counts of
`resight.service.jobs.shadow_comparison`. A shadow ends with the process; as an operation it is listed afterwards. There
is at most one for each collection.
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
from resight.service.search.ranking import RankedAnswer, SearchParams, run_search
from resight.service.storage import reads, spaces
from resight.service.storage.audit import AuditEvent
from resight.service.storage.operations import Operation
from resight.service.tenants import Tenant

log = logging.getLogger(__name__)

MAX_WAITING_SAMPLES = 16  # samples of one shadow: crops in memory
MAX_SAMPLE_AGE_S = 5.0  # of a sample, from the caller's answer on: what is not begun by then is dropped
BUSY_CROPS = 4  # callers' crops and queries under way; above it a shadow begins nothing
TIME_SHARE = (
    1 / 32
)  # of a core's time, at most: callers' slowest twentieth must not be those that meet a shadow's batch
CHECK_EVERY_S = 1.0  # between two looks at whether it is to end
MEASURE_EVERY = 4  # searches of which one is done again with both models, to be timed


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
    """How much is sampled: a share, 0..1; answered searches, 0 = any number; until an instant, None = any."""

    sample: float = 1.0
    max_searches: int = 0
    expire_us: int | None = None


@dataclass(frozen=True)
class ShadowStatus:
    """A shadow as it stands; the fields are those of ``ShadowRun`` in model.proto."""

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

    def noted(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> ShadowStatus:
        """From what `noted` and JSON made of one."""
        figures = noted["figures"]
        sides = {side: ModelSideStatistics(**figures[side]) for side in ("active", "candidate")}
        told = {**noted, "state": ShadowState(noted["state"]), "bounds": ShadowLimits(**noted["bounds"])}
        return cls(**{**told, "figures": ShadowStatistics(**{**figures, **sides})})


@dataclass(frozen=True)
class ShadowSample:
    """One search that was answered: what was asked, of which crops, and the answer; from when on it may be redone."""

    collection: Collection
    wanted: SearchParams
    source: CropSource
    answer: RankedAnswer
    answered_s: float


class ShadowRun:
    """One shadow. Used in the event loop's thread.

    Args:
        tenant: whose collection.
        told: as it begins.
        space: the candidate's.
        under_way: callers' crops that the server is at.

    Attributes:
        bounds: may be changed while it runs.
        operation_id: of the long operation whose work `run` is.
    """

    def __init__(self, tenant: Tenant, told: ShadowStatus, space: Space, under_way: Callable[[], int]) -> None:
        self._tenant, self._begun, self._space, self._under_way = tenant, told, space, under_way
        self._tally, self._samples = ShadowTally(), asyncio.Queue[ShadowSample](MAX_WAITING_SAMPLES)
        self._state, self._ended = ShadowState.RUNNING, asyncio.Event()
        self._end_us: int | None = None
        self._working: asyncio.Task[None] | None = None
        self._noted: dict[str, int] = {}
        self._worked_s = 0.0  # on the sample it is at
        self.bounds, self.operation_id = told.bounds, ""

    @property
    def running(self) -> bool:
        """Whether it takes samples."""
        return self._state is ShadowState.RUNNING

    def told(self) -> ShadowStatus:
        """As it stands."""
        return replace(
            self._begun,
            state=self._state,
            bounds=self.bounds,
            end_us=self._end_us,
            operation_id=self.operation_id,
            figures=self._tally.figures(),
        )

    def end(self, state: ShadowState) -> None:
        """Take no more samples, and drop those that wait; one that has ended stays as it is."""
        if self.running:
            self._state, self._end_us = state, now_us()
            self._ended.set()
            if self._working is not None:
                self._working.cancel()
            tally = self._tally
            tally.dropped = tally.sampled - tally.answered - tally.failed
            log.info("shadow %s collection=%s model=%s", state, self._begun.collection, self._begun.model_id)

    def fits(self, collection: Collection) -> bool:
        """Whether the collection is still searched in the space it is compared with; if not, it ends."""
        if collection.space.space_id != self._begun.active_space_id:
            self.end(ShadowState.SUPERSEDED)
        return self.running

    def offer(self, collection: Collection, wanted: SearchParams, source: CropSource, answer: RankedAnswer) -> None:
        """Tell it of a search that was answered: it is taken or not, and the caller goes on at once."""
        if not self.fits(collection):
            return
        self._tally.offered += 1
        if random.random() >= self.bounds.sample:  # no cycle of cameras can fall in step with it
            return
        self._tally.sampled += 1
        if self._samples.full():
            self._tally.dropped += 1
        else:
            self._samples.put_nowait(ShadowSample(collection, wanted, source, answer, time.monotonic()))

    async def run(self) -> dict[str, str]:
        """Answer samples until it ends: the work of its long operation, whose result tells how."""
        # Nobody listens to it: its work is no part of the call that began it.
        self._working = asyncio.create_task(self._work_forever(), name="shadow", context=contextvars.Context())
        try:
            while self.running:
                await self._look()
        finally:
            self._working.cancel()
            await asyncio.wait((self._working,))
        told = self.told()
        await self._note(told)
        if told.state is ShadowState.STOPPED:
            raise JobCancelled
        return {"state": told.state.value, "model_id": told.model_id, "space_id": told.space_id}

    async def _note(self, ended: ShadowStatus | None = None) -> Operation:
        """Tell its operation the counts, and how it ended; returns that as it stands."""
        tally = self._tally
        counts = {"total": tally.sampled, "succeeded": tally.answered, "failed": tally.failed, "skipped": tally.dropped}
        if ended is None and counts == self._noted:
            return await self._tenant.operations.get(self.operation_id)
        self._noted, details = counts, None if ended is None else {"shadow": ended.noted()}
        return await self._tenant.operations.progress(self.operation_id, details=details, result=None, **counts)

    async def _look(self) -> None:
        """Wait a moment or until it ends, and see whether it should."""
        left_s = CHECK_EVERY_S if self.bounds.expire_us is None else (self.bounds.expire_us - now_us()) / 1e6
        try:
            await asyncio.wait_for(self._ended.wait(), max(0.0, min(CHECK_EVERY_S, left_s)))
            return
        except TimeoutError:
            pass
        if self.bounds.expire_us is not None and now_us() >= self.bounds.expire_us:
            self.end(ShadowState.EXPIRED)
        if (await self._note()).cancel_requested:
            self.end(ShadowState.STOPPED)
        try:
            self.fits(await self._tenant.store.read(reads.collection, self._begun.collection))
        except CollectionNotFoundError:
            self.end(ShadowState.SUPERSEDED)

    async def _work_forever(self) -> None:
        while True:
            sample = await self._samples.get()
            self._worked_s = 0.0
            try:
                await self._quiet(sample)
                await self._answer(sample)
            except (OverloadedError, DeadlineError, UnavailableError):
                self._tally.dropped += 1
            except ReIDError as error:
                self._tally.failed += 1
                log.warning("the shadow of %s cannot answer a search: %s", self._begun.collection, error)
            except Exception:
                self._tally.failed += 1
                log.exception("the shadow of %s failed", self._begun.collection)
            if 0 < self.bounds.max_searches <= self._tally.answered:
                self.end(ShadowState.DONE)
            await asyncio.sleep(self._worked_s * (1 / TIME_SHARE - 1))

    async def _quiet(self, sample: ShadowSample) -> None:
        """Return when the caller has the answer and few others wait; raises ExpiredInQueueError where that never is."""
        await asyncio.sleep(sample.answered_s + QUIET_S - time.monotonic())
        while self._under_way() + self._tenant.gallery.searcher.waiting > BUSY_CROPS:
            if time.monotonic() >= sample.answered_s + MAX_SAMPLE_AGE_S:
                raise ExpiredInQueueError("callers left no time for the shadow: it goes on with the next search")
            await asyncio.sleep(QUIET_S)

    async def _answer(self, sample: ShadowSample) -> None:
        """Let the candidate answer, and from time to time the active model too, in turn the first and the second."""
        tally = self._tally
        turns = [(tally.candidate, replace(sample.collection, space=self._space))]
        rounds, since = divmod(tally.answered, MEASURE_EVERY)
        if not since:
            turns.append((tally.active, sample.collection))
        found: dict[ModelSide, tuple[RankedAnswer, int]] = {}
        for side, collection in turns[:: -1 if rounds % 2 else 1]:
            found[side] = await self._searched(collection, sample)
        tally.compare(sample.answer, found[tally.candidate][0])
        for side, (answer, infer_ns) in found.items() if len(found) == 2 else ():
            side.measure(infer_ns, answer.search_ns)

    async def _searched(self, collection: Collection, sample: ShadowSample) -> tuple[RankedAnswer, int]:
        """The sample's search in a collection's space, and the inference of one of its crops in nanoseconds."""
        gallery, deadline = self._tenant.gallery, sample.answered_s + MAX_SAMPLE_AGE_S
        made = await gallery.feature(
            collection, sample.source, deadline, space=collection.space, priority=Priority.REEMBED
        )
        (answer,) = await run_search(gallery.searcher, collection, [sample.wanted.with_feature(made.feature)], deadline)
        self._worked_s += (made.timings.decode_ns + made.timings.infer_ns + answer.search_ns + answer.rerank_ns) / 1e9
        return answer, made.timings.infer_ns // len(sample.source.images)


SHADOW_KIND = "shadow"
MAX_LISTED = 1000  # operations, the newest first: as many finished ones as are remembered


class ShadowManager:
    """All of one server. Only the event loop's thread uses it.

    Args:
        models: has the candidates.
        waiting: crops that are under way, by priority.
        work: carries them out.
    """

    def __init__(self, models: ModelHost, waiting: Callable[[], dict[Priority, int]], work: JobRunner) -> None:
        self._models, self._waiting, self._work = models, waiting, work
        self._shadows: dict[tuple[str, int], ShadowRun] = {}  # by tenant and collection's key, until noted as ended
        self._turn = asyncio.Lock()

    def of(self, tenant: Tenant, collection: Collection) -> ShadowRun | None:
        """The one that runs over a collection, to be offered what was answered."""
        found = self._shadows.get((tenant.name, collection.key))
        return found if found is not None and found.running else None

    def running(self) -> list[tuple[str, ShadowStatus]]:
        """Tenants and shadows as they stand."""
        return [(tenant, shadow.told()) for (tenant, _), shadow in self._shadows.items() if shadow.running]

    async def start(self, tenant: Tenant, name: str, model_id: str, bounds: ShadowLimits) -> ShadowStatus:
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
        held = await tenant.store.read(spaces.collection_spaces, of.key)
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

    async def _begin(
        self, tenant: Tenant, of: Collection, model_id: str, space: Space, bounds: ShadowLimits
    ) -> ShadowStatus:
        active = self._models.model_of_space(of.space.space_id)
        names = (model_id, space.space_id, active.model_id if active else of.space.model_id, of.space.space_id)
        begun = ShadowStatus(of.name, *names, ShadowState.RUNNING, bounds, now_us())
        shadow = ShadowRun(tenant, begun, space, self._under_way)

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
            tenant.operations, SHADOW_KIND, work, key=of.key, collection=of.name, shadow=begun.noted()
        )
        shadow.operation_id = operation.operation_id  # before its work begins
        self._shadows[place] = shadow
        row = AuditEvent(current().name, "ModelService.StartShadow", of.name, reason=f"model {model_id}")
        tenant.audit.add(row)  # of a beginning; who asks again to look at it begins nothing
        tenant.gallery.searcher.follow(replace(of, space=space))  # its index, should the server have started since
        return shadow.told()

    def _under_way(self) -> int:
        waiting = self._waiting()
        return waiting[Priority.INTERACTIVE] + waiting[Priority.ENROL]

    async def get(self, tenant: Tenant, name: str) -> ShadowStatus:
        """The collection's shadow that runs, or ran last.

        Raises:
            CollectionNotFoundError: no such collection.
            ShadowNotFoundError: none was begun, as far as is remembered.
        """
        of = await tenant.store.read(reads.collection, name)
        if (held := self._shadows.get((tenant.name, of.key))) is not None:
            held.fits(of)
            return held.told()
        for old in await tenant.operations.list_operations(limit=MAX_LISTED, kind=SHADOW_KIND):
            if old.details["key"] == of.key:
                told = replace(ShadowStatus.of(old.details["shadow"]), operation_id=old.operation_id)
                if told.state is ShadowState.RUNNING:  # as it was noted when it began
                    told = replace(told, state=ShadowState.INTERRUPTED, end_us=old.end_us)
                return told
        raise ShadowNotFoundError(
            f"no model has shadowed collection {name}: begin with StartShadow", field="collection_id", shadow=name
        )

    async def stop(self, tenant: Tenant, name: str) -> ShadowStatus:
        """End the collection's shadow; raises what `get` does."""
        told = await self.get(tenant, name)
        of = await tenant.store.read(reads.collection, name)
        if (running := self.of(tenant, of)) is not None:
            running.end(ShadowState.STOPPED)
            told = running.told()
        return told
