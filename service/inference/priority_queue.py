"""Who goes first: crops wait in lanes, one for each priority and model, and leave them in batches.

A caller who waits goes before an enrolment, that before a migration's crops, and none is starved: a lower priority
whose batch takes a time ``t`` waits for at most ``t x (1 / share - 1)``, however busy the higher ones are. So that
a lone caller after caller is not held up by what fills the gaps between them, crops of a migration also wait
`QUIET_S` after the last higher one, and go in small batches meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resight.arrays import Feature, Pixels
from resight.errors import ReIDError
from resight.runtime.base import Runtime


class Priority(enum.IntEnum):
    """Lower numbers go first."""

    INTERACTIVE = 0
    ENROL = 1
    REEMBED = 2


PRIORITY_SHARES = {
    Priority.INTERACTIVE: 1.0,
    Priority.ENROL: 0.25,
    Priority.REEMBED: 1 / 16,
}  # of the model's time, at least
QUIET_S = 0.05  # after a caller's crop; one who calls in a loop is back in less
CALLERS_GONE_S = 1.0  # after the last caller's crop; one who comes later waits for a batch once
REEMBED_S = 0.005  # a caller who comes waits for the batch that runs: a migration's may take so long, by the last one


@dataclass(slots=True, eq=False)
class CropJob:
    """One crop on its way from bytes to a feature.

    Attributes:
        crop: the image file.
        runtime: embeds it.
        deadline: in `time.monotonic` seconds.
        answer: of the call it belongs to; done when the caller left.
        pixels: uint8 (H, W, 3) once decoded and fitted.
        quality: 0..1, once decoded.
        outcome: float32 (D,), or what went wrong; None while under way.
        queued_ns: when it began to wait for the model.
    """

    crop: bytes
    runtime: Runtime
    priority: Priority
    deadline: float
    answer: asyncio.Future[None]
    pixels: Pixels | None = None
    quality: float = 0.0
    outcome: Feature | ReIDError | None = None
    decode_ns: int = 0
    queued_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0


@dataclass
class _PriorityLine:
    """Jobs of one priority, by model in the order in which the models came to wait."""

    of: dict[int, deque[CropJob]] = field(default_factory=dict)
    next_at: float = 0.0  # when it has its turn although others wait
    took_s: float = 0.01  # its last batch; before the first, a guess
    each_s: float = REEMBED_S / 4  # of its crops, likewise

    def take(self, runtime: Runtime, most: int, batch: list[CropJob]) -> None:
        """Move jobs of one model to ``batch``; the model goes to the end of the line."""
        waiting = self.of.pop(id(runtime), None)
        while waiting and len(batch) < most:
            batch.append(waiting.popleft())
        if waiting:
            self.of[id(runtime)] = waiting


class CropQueue:
    """What waits for the model. One lock's owner uses it at a time.

    Args:
        clock: `time.monotonic` seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes = {priority: _PriorityLine() for priority in Priority}
        self._count = dict.fromkeys(Priority, 0)
        self._busy_until = 0.0
        self._reembedding = 0  # batches of a migration that run: one, unless callers are long gone

    def put(self, job: CropJob) -> None:
        """Let a job wait."""
        lane = self._lanes[job.priority]
        if not lane.of:
            lane.next_at = max(lane.next_at, self._clock() + lane.took_s * (1 / PRIORITY_SHARES[job.priority] - 1))
        lane.of.setdefault(id(job.runtime), deque()).append(job)
        self._count[job.priority] += 1

    def defer_background(self, seconds: float = QUIET_S) -> None:
        """Note that a caller is here: crops of a migration wait a moment longer."""
        self._busy_until = self._clock() + seconds

    def wait_s(self) -> float | None:
        """Seconds until `take` has something; 0 = now, None = nothing waits."""
        if self.urgent_count():
            return 0.0
        lane = self._lanes[Priority.REEMBED]
        if not lane.of:
            return None
        begins = self._all_cores_at if self._reembedding else min(self._busy_until, lane.next_at)
        return max(0.0, begins - self._clock())

    def take(self, most: int) -> list[CropJob]:
        """The next batch: of one model, of the priority whose turn it is; an enrolment fills up callers' batches.

        Args:
            most: crops of callers and enrolments, if the model takes as many.
        """
        if not (priority := self._turn()):
            return []
        first = next(iter(self._lanes[priority[0]].of.values()))[0].runtime
        size = min(first.max_batch, most)
        if priority[0] is Priority.REEMBED:
            size = max(1, min(first.max_batch, int(REEMBED_S / self._lanes[Priority.REEMBED].each_s)))
        batch: list[CropJob] = []
        for lane in priority:
            self._lanes[lane].take(first, size, batch)
        self._reembedding += priority[0] is Priority.REEMBED
        for job in batch:
            self._count[job.priority] -= 1
        return batch

    def urgent_count(self) -> int:
        """Jobs that wait, but for a migration's."""
        return self._count[Priority.INTERACTIVE] + self._count[Priority.ENROL]

    def record_batch_time(self, priority: Priority, seconds: float, crops: int = 1) -> None:
        """Note how long a batch of a priority took, which decides when its next turn is and how large it may be."""
        lane = self._lanes[priority]
        lane.took_s, lane.each_s = seconds, max(1e-6, seconds / crops)
        lane.next_at = self._clock() + seconds * (1 / PRIORITY_SHARES[priority] - 1)
        if priority is not Priority.REEMBED:
            self.defer_background()

    def finish_batch(self, batch: Sequence[CropJob]) -> None:
        """Note that a batch is done with, whether or not it ran."""
        self._reembedding -= batch[0].priority is Priority.REEMBED

    def drain(self) -> list[CropJob]:
        """Take everything."""
        jobs = [job for lane in self._lanes.values() for waiting in lane.of.values() for job in waiting]
        for lane in self._lanes.values():
            lane.of.clear()
        self._count = dict.fromkeys(Priority, 0)
        return jobs

    @property
    def _all_cores_at(self) -> float:
        """When a migration may have every core: until then one is free for a caller who comes."""
        return self._busy_until - QUIET_S + CALLERS_GONE_S

    def _turn(self) -> tuple[Priority, ...]:
        """Whose turn it is, and who may fill up the batch."""
        now = self._clock()
        waiting = {priority for priority, lane in self._lanes.items() if lane.of}
        if self._reembedding and now < self._all_cores_at:
            waiting.discard(Priority.REEMBED)
        callers, enrolments, reembed = Priority.INTERACTIVE, Priority.ENROL, Priority.REEMBED
        if reembed in waiting and now >= self._lanes[reembed].next_at:
            return (reembed,)
        if enrolments in waiting and (callers not in waiting or now >= self._lanes[enrolments].next_at):
            return enrolments, callers
        if callers in waiting:
            return callers, enrolments
        return (reembed,) if reembed in waiting and now >= self._busy_until else ()
