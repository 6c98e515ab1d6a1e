"""Priority queue of crops waiting for inference: one queue per priority and model, emptied in batches.

Interactive crops come before enrolments, and those before a migration's crops, without starvation: a lower priority
whose batch takes a time ``t`` waits for at most ``t x (1 / share - 1)``, however busy the higher ones are. So that
migrations do not delay single calls in sequence, their crops wait until `QUIET_S` after the last crop of a higher
priority, and run in small batches.
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
}  # minimum share of the model's time
QUIET_S = 0.05  # after the last urgent crop; a client that calls in a loop returns sooner
NO_CALLS_S = 1.0  # after the last urgent crop; then migrations may use all workers
REEMBED_S = 0.005  # target time of a migration's batch, for which a new call may have to wait


@dataclass(slots=True, eq=False)
class CropJob:
    """One crop from image file to feature.

    Attributes:
        crop: the image file.
        runtime: the model.
        deadline: in `time.monotonic` seconds.
        future: of its call; done if the caller was cancelled.
        pixels: uint8 (H, W, 3) once decoded and resized.
        quality: 0..1, once decoded.
        outcome: float32 (D,) or an error; None while in progress.
        queued_ns: when it was queued for inference.
    """

    crop: bytes
    runtime: Runtime
    priority: Priority
    deadline: float
    future: asyncio.Future[None]
    pixels: Pixels | None = None
    quality: float = 0.0
    outcome: Feature | ReIDError | None = None
    decode_ns: int = 0
    queued_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0


@dataclass
class _JobsByModel:
    """Jobs of one priority by model, in the order in which the models are served."""

    jobs: dict[int, deque[CropJob]] = field(default_factory=dict)
    next_at: float = 0.0  # when it is served although higher priorities wait
    took_s: float = 0.01  # duration of its last batch; initially a guess
    each_s: float = REEMBED_S / 4  # per crop of its last batch; initially a guess

    def take(self, runtime: Runtime, most: int, batch: list[CropJob]) -> None:
        """Move up to ``most`` jobs of one model to ``batch``; the model is then served last."""
        waiting = self.jobs.pop(id(runtime), None)
        while waiting and len(batch) < most:
            batch.append(waiting.popleft())
        if waiting:
            self.jobs[id(runtime)] = waiting


class CropQueue:
    """Jobs waiting for inference. Not thread-safe: callers hold a lock.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queues = {priority: _JobsByModel() for priority in Priority}
        self._count = dict.fromkeys(Priority, 0)
        self._busy_until = 0.0
        # Running batches of a migration: at most one, unless there were no calls for `NO_CALLS_S`.
        self._reembedding = 0

    def put(self, job: CropJob) -> None:
        """Add a job."""
        queue = self._queues[job.priority]
        if not queue.jobs:
            queue.next_at = max(queue.next_at, self._clock() + queue.took_s * (1 / PRIORITY_SHARES[job.priority] - 1))
        queue.jobs.setdefault(id(job.runtime), deque()).append(job)
        self._count[job.priority] += 1

    def defer_background(self, seconds: float = QUIET_S) -> None:
        """Delay a migration's crops, since there are urgent ones."""
        self._busy_until = self._clock() + seconds

    def wait_s(self) -> float | None:
        """Seconds until `take` returns a batch; 0 = now, None = the queue is empty."""
        if self.urgent_count():
            return 0.0
        queue = self._queues[Priority.REEMBED]
        if not queue.jobs:
            return None
        start_at = self._all_cores_at if self._reembedding else min(self._busy_until, queue.next_at)
        return max(0.0, start_at - self._clock())

    def take(self, most: int) -> list[CropJob]:
        """The next batch, of one model and priority; enrolments and interactive crops fill up each other's batches.

        Args:
            most: maximum number of urgent crops, also limited by the model.
        """
        if not (priorities := self._next_priorities()):
            return []
        first = next(iter(self._queues[priorities[0]].jobs.values()))[0].runtime
        size = min(first.max_batch, most)
        if priorities[0] is Priority.REEMBED:
            size = max(1, min(first.max_batch, int(REEMBED_S / self._queues[Priority.REEMBED].each_s)))
        batch: list[CropJob] = []
        for priority in priorities:
            self._queues[priority].take(first, size, batch)
        self._reembedding += priorities[0] is Priority.REEMBED
        for job in batch:
            self._count[job.priority] -= 1
        return batch

    def urgent_count(self) -> int:
        """Number of waiting jobs that are not a migration's."""
        return self._count[Priority.INTERACTIVE] + self._count[Priority.ENROL]

    def record_batch_time(self, priority: Priority, seconds: float, crops: int = 1) -> None:
        """Record the duration of a batch, which determines the time and size of the next one of its priority."""
        queue = self._queues[priority]
        queue.took_s, queue.each_s = seconds, max(1e-6, seconds / crops)
        queue.next_at = self._clock() + seconds * (1 / PRIORITY_SHARES[priority] - 1)
        if priority is not Priority.REEMBED:
            self.defer_background()

    def finish_batch(self, batch: Sequence[CropJob]) -> None:
        """Mark a batch from `take` as finished, whether or not it ran."""
        self._reembedding -= batch[0].priority is Priority.REEMBED

    def drain(self) -> list[CropJob]:
        """Remove and return all jobs."""
        jobs = [job for queue in self._queues.values() for waiting in queue.jobs.values() for job in waiting]
        for queue in self._queues.values():
            queue.jobs.clear()
        self._count = dict.fromkeys(Priority, 0)
        return jobs

    @property
    def _all_cores_at(self) -> float:
        """When a migration may use all workers; until then one is kept free for calls."""
        return self._busy_until - QUIET_S + NO_CALLS_S

    def _next_priorities(self) -> tuple[Priority, ...]:
        """The priority to serve next, followed by the one that may fill up its batch."""
        now = self._clock()
        waiting = {priority for priority, queue in self._queues.items() if queue.jobs}
        if self._reembedding and now < self._all_cores_at:
            waiting.discard(Priority.REEMBED)
        callers, enrolments, reembed = Priority.INTERACTIVE, Priority.ENROL, Priority.REEMBED
        if reembed in waiting and now >= self._queues[reembed].next_at:
            return (reembed,)
        if enrolments in waiting and (callers not in waiting or now >= self._queues[enrolments].next_at):
            return enrolments, callers
        if callers in waiting:
            return callers, enrolments
        return (reembed,) if reembed in waiting and now >= self._busy_until else ()
