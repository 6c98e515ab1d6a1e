"""A candidate model answers a sample of live searches beside the active one: for figures, never for callers.

It begins when the caller has the answer, waits behind everybody else, embeds with the priority of a migration, one
search at a time and no more than `SHARE` of the time, and what there is no time for is dropped and counted. A few
crops wait in memory for some seconds; nothing of a query is kept but what `resight.service.shadow_figures` counts. A
shadow ends with the process; as a long operation it is known afterwards.
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
    DeadlineError,
    ExpiredInQueueError,
    OverloadedError,
    ReIDError,
    UnavailableError,
)
from resight.service import reads
from resight.service.entries import Collection, Space, now_us
from resight.service.features import Crops
from resight.service.lanes import QUIET_S, Priority
from resight.service.long_work import CancelledWork
from resight.service.operations import Operation
from resight.service.ranked import RankedAnswer, Wanted, ranked
from resight.service.shadow_figures import ShadowFigures, Side, SideFigures, Tally
from resight.service.tenants import Tenant

log = logging.getLogger(__name__)

WAITING = 16  # samples of one shadow: crops in memory
PATIENCE_S = 5.0  # of a sample, from the caller's answer on: what is not begun by then is dropped
BUSY = 4  # callers' crops and queries under way; above it a shadow begins nothing
SHARE = 1 / 32  # of a core's time, at most: callers' slowest twentieth must not be those that meet a shadow's batch
LOOK_S = 1.0  # between two looks at whether it is to end
MEASURED_EVERY = 4  # searches of which one is done again with both models, to be timed


class ShadowState(StrEnum):
    """As ``ShadowState`` in model.proto."""

    RUNNING = "running"
    DONE = "done"
    EXPIRED = "expired"
    STOPPED = "stopped"
    SUPERSEDED = "superseded"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Bounds:
    """How much is sampled: a share, 0..1; answered searches, 0 = any number; until an instant, None = any."""

    sample: float = 1.0
    max_searches: int = 0
    expire_us: int | None = None


@dataclass(frozen=True)
class Told:
    """A shadow as it stands; the fields are those of ``Shadow`` in model.proto."""

    collection: str
    model_id: str
    space_id: str
    active_model_id: str
    active_space_id: str
    state: ShadowState
    bounds: Bounds
    start_us: int
    end_us: int | None = None
    operation_id: str = ""
    figures: ShadowFigures = field(default_factory=ShadowFigures)

    def noted(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> Told:
        """From what `noted` and JSON made of one."""
        figures = noted["figures"]
        sides = {side: SideFigures(**figures[side]) for side in ("active", "candidate")}
        told = {**noted, "state": ShadowState(noted["state"]), "bounds": Bounds(**noted["bounds"])}
        return cls(**{**told, "figures": ShadowFigures(**{**figures, **sides})})


@dataclass(frozen=True)
class Sample:
    """One search that was answered: what was asked, of which crops, and the answer; from when on it may be redone."""

    collection: Collection
    wanted: Wanted
    source: Crops
    answer: RankedAnswer
    answered_s: float


class Shadow:
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

    def __init__(self, tenant: Tenant, told: Told, space: Space, under_way: Callable[[], int]) -> None:
        self._tenant, self._begun, self._space, self._under_way = tenant, told, space, under_way
        self._tally, self._samples = Tally(), asyncio.Queue[Sample](WAITING)
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

    def told(self) -> Told:
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

    def offer(self, collection: Collection, wanted: Wanted, source: Crops, answer: RankedAnswer) -> None:
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
            self._samples.put_nowait(Sample(collection, wanted, source, answer, time.monotonic()))

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
            raise CancelledWork
        return {"state": told.state.value, "model_id": told.model_id, "space_id": told.space_id}

    async def _note(self, ended: Told | None = None) -> Operation:
        """Tell its operation the counts, and how it ended; returns that as it stands."""
        tally = self._tally
        counts = {"total": tally.sampled, "succeeded": tally.answered, "failed": tally.failed, "skipped": tally.dropped}
        if ended is None and counts == self._noted:
            return await self._tenant.operations.get(self.operation_id)
        self._noted, details = counts, None if ended is None else {"shadow": ended.noted()}
        return await self._tenant.operations.progress(self.operation_id, details=details, result=None, **counts)

    async def _look(self) -> None:
        """Wait a moment or until it ends, and see whether it should."""
        left_s = LOOK_S if self.bounds.expire_us is None else (self.bounds.expire_us - now_us()) / 1e6
        try:
            await asyncio.wait_for(self._ended.wait(), max(0.0, min(LOOK_S, left_s)))
            return
        except TimeoutError:
            pass
        if self.bounds.expire_us is not None and now_us() >= self.bounds.expire_us:
            self.end(ShadowState.EXPIRED)
        if (await self._note()).cancel_asked:
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
            await asyncio.sleep(self._worked_s * (1 / SHARE - 1))

    async def _quiet(self, sample: Sample) -> None:
        """Return when the caller has the answer and few others wait; raises ExpiredInQueueError where that never is."""
        await asyncio.sleep(sample.answered_s + QUIET_S - time.monotonic())
        while self._under_way() + self._tenant.gallery.searcher.waiting > BUSY:
            if time.monotonic() >= sample.answered_s + PATIENCE_S:
                raise ExpiredInQueueError("callers left no time for the shadow: it goes on with the next search")
            await asyncio.sleep(QUIET_S)

    async def _answer(self, sample: Sample) -> None:
        """Let the candidate answer, and from time to time the active model too, in turn the first and the second."""
        tally = self._tally
        turns = [(tally.candidate, replace(sample.collection, space=self._space))]
        rounds, since = divmod(tally.answered, MEASURED_EVERY)
        if not since:
            turns.append((tally.active, sample.collection))
        found: dict[Side, tuple[RankedAnswer, int]] = {}
        for side, collection in turns[:: -1 if rounds % 2 else 1]:
            found[side] = await self._searched(collection, sample)
        tally.compare(sample.answer, found[tally.candidate][0])
        for side, (answer, infer_ns) in found.items() if len(found) == 2 else ():
            side.measure(infer_ns, answer.search_ns)

    async def _searched(self, collection: Collection, sample: Sample) -> tuple[RankedAnswer, int]:
        """The sample's search in a collection's space, and the inference of one of its crops in nanoseconds."""
        gallery, deadline = self._tenant.gallery, sample.answered_s + PATIENCE_S
        made = await gallery.feature(
            collection, sample.source, deadline, space=collection.space, priority=Priority.REEMBED
        )
        (answer,) = await ranked(gallery.searcher, collection, [sample.wanted.of(made.feature)], deadline)
        self._worked_s += (made.timings.decode_ns + made.timings.infer_ns + answer.search_ns + answer.rerank_ns) / 1e9
        return answer, made.timings.infer_ns // len(sample.source.images)
