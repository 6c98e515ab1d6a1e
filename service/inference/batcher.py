"""Many waiting callers and a device: dynamic batching with a bound, deadlines, priorities and no fixed delay.

While a batch runs, the next gathers; an idle worker starts at once. On a device that gains by batches it first waits
for the crops that are being decoded, but no longer than a batch takes.
A worker runs a batch and takes it itself, so a crop crosses into the event loop once, with its whole batch. A place is
taken by `admit` before any work is done for a crop, so a full queue costs nothing and the bound covers decoding too.

A GPU has one worker. A CPU has one for each core, which takes no more than its share of all crops that are under way,
and few at once: so batches end at different times, and one core embeds while the other decodes. One batch at a time on
all cores left a fifth of them idle (OSNet x0.25, 32 calls in flight).

Crops that made a batch fail are remembered, so that their neighbours do not pay twice.

Who of a process's own threads goes first where two want one core.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from resight.arrays import Feature
from resight.errors import (
    DeadlineError,
    DrainingError,
    ExpiredInQueueError,
    ModelError,
    OverloadedError,
    ReIDError,
    UnavailableError,
)
from resight.service.inference.priority_queue import CropJob, CropQueue, Priority

MAX_QUARANTINED = 1024  # crops remembered; 16 bytes each


class Quarantine:
    """Digests of the latest crops that a model failed on. Any thread may use it."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}  # as an ordered set

    def add(self, crop: bytes) -> None:
        """Remember a crop, and forget the oldest of too many."""
        self._held[_crop_digest(crop)] = None
        while len(self._held) > MAX_QUARANTINED:
            self._held.pop(next(iter(self._held)), None)

    def check(self, crop: bytes) -> None:
        """Refuse a crop that made a batch fail before.

        Raises:
            ModelError: it did.
        """
        if self._held and _crop_digest(crop) in self._held:
            raise inference_error("the model failed on this very crop before, and it is not tried again")


def inference_error(what: str, cause: Exception | None = None) -> ModelError:
    """The error of a crop that no inference has an answer for."""
    error = ModelError(f"{what}: the crop cannot be embedded by this bundle; leave it out and report it")
    error.__cause__ = cause
    return error


def _crop_digest(crop: bytes) -> bytes:
    return hashlib.blake2b(crop, digest_size=16).digest()


NICE_INCREMENT = 5  # a third of the weight of the other threads, see sched(7)


def lower_thread_priority() -> None:
    """Let the calling thread wait where another one wants its core.

    For threads that embed: a caller who is refused, or whose crop is decoded, then waits for microseconds and not for
    the end of a time slice. Where threads have no niceness of their own nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE_INCREMENT)


log = logging.getLogger(__name__)

MIN_RETRY_S = 0.05  # below this a retry arrives before the queue has moved
SMOOTHING = 0.2  # weight of the newest batch in the running mean of seconds a crop
# What onnxruntime, CUDA, TensorRT and Python call it; none has a class of its own for it.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "cudaerrormemoryallocation",
)


def deadline_error(deadline: float) -> DeadlineError | None:
    """The error of a deadline, in `time.monotonic` seconds, that has passed; else None."""
    if time.monotonic() < deadline:
        return None
    return ExpiredInQueueError("the deadline passed before the crop was embedded: allow more time or send less at once")


class Batcher:
    """Runs all models of a device in threads of its own.

    Args:
        finished: is told the jobs of a batch, each with its outcome; called in those threads.
        max_queue: crops admitted and not yet answered, of each priority.
        most: crops of the largest batch.
        delay_s: wait for company when idle.
        workers: batches at once.
        gains: whether a crop costs less in a larger batch, so that it should wait for those that are being decoded.
    """

    def __init__(
        self,
        finished: Callable[[Sequence[CropJob]], None],
        *,
        max_queue: int,
        most: int,
        delay_s: float = 0.0,
        workers: int = 1,
        gains: bool = True,
    ) -> None:
        self._most, self._gains = most, gains
        self._finished, self._max_queue, self._delay_s = finished, max_queue, delay_s
        self._lanes, self._changed = CropQueue(), threading.Condition()
        self._admitted = dict.fromkeys(Priority, 0)
        self._each_s = self._batch_s = 0.0
        self._coming = 0
        self._gathering = self._stopping = False
        self._quarantine = Quarantine()
        self._sizes: dict[int, int] = {}
        self._running: list[int] = []  # crops of each batch that runs
        self._threads = [
            threading.Thread(target=self._work, name=f"inference_{number}", daemon=True) for number in range(workers)
        ]

    def start(self) -> None:
        """Begin to serve the queue."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the running batches; whoever still waits is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        closing = DrainingError("the server is going down: try again when it is back")
        left = self._lanes.drain()
        for job in left:
            job.outcome = closing
        self._finished(left)

    @contextlib.contextmanager
    def admit(self, count: int, deadline: float, priority: Priority = Priority.INTERACTIVE) -> Iterator[None]:
        """Take ``count`` places until the block ends. Only the event loop's thread calls it.

        Raises:
            DeadlineError: it has passed already.
            OverloadedError: not so many places are free, or the wait would outlast the deadline.
        """
        if error := deadline_error(deadline):
            raise error
        ahead = sum(taken for other, taken in self._admitted.items() if other <= priority)
        # Nobody is answered before the whole batch is: at ten times its peak a server that left that out embedded
        # five sixths of what it did for callers who had gone (ResNet-50, 2 s of patience).
        wait_s = ahead * self._each_s + (self._batch_s if ahead else 0.0)
        retry_s = max(MIN_RETRY_S, wait_s)
        if self._admitted[priority] + count > self._max_queue:
            raise OverloadedError(
                f"{self._admitted[priority]} crops are being embedded, at most {self._max_queue} are admitted and "
                f"{count} more came: try again in {retry_s:.2f} s",
                retry_after_s=retry_s,
                max_queue=self._max_queue,
            )
        if ahead and wait_s > deadline - time.monotonic():
            raise OverloadedError(
                f"the queue takes about {wait_s:.2f} s, longer than the deadline: try again in {retry_s:.2f} s or "
                "allow more time",
                retry_after_s=retry_s,
            )
        self._admitted[priority] += count
        if priority is not Priority.REEMBED:
            self._lanes.defer_background()  # a number is set; no lock is worth it
        try:
            yield
        finally:
            self._admitted[priority] -= count

    def waiting(self) -> dict[Priority, int]:
        """Crops admitted and not yet answered."""
        return dict(self._admitted)

    def sizes(self) -> dict[int, int]:
        """How many batches ran, by their number of crops."""
        return dict(self._sizes)

    def check(self, crop: bytes) -> None:
        """Refuse a crop that made a batch fail before, as `Quarantine.check`."""
        self._quarantine.check(crop)

    def expect(self, jobs: Sequence[CropJob]) -> None:
        """Note jobs that begin to be decoded: each will be `put`, or `discard`."""
        with self._changed:
            self._coming += _count_urgent(jobs)

    def put(self, job: CropJob) -> None:
        """Let a decoded job wait for its model. Any thread may."""
        job.queued_ns = time.perf_counter_ns()
        with self._changed:
            self._coming -= _count_urgent((job,))
            self._lanes.put(job)
            self._wake()

    def discard(self, job: CropJob) -> None:
        """Note that an expected job has no pixels. Any thread may."""
        with self._changed:
            self._coming -= _count_urgent((job,))
            self._wake()

    def _wake(self) -> None:
        """Wake one worker, unless one gathers already and has too few: every waking takes the interpreter from all."""
        if not self._gathering or self._gathered():
            self._changed.notify()

    def _work(self) -> None:
        lower_thread_priority()
        while (batch := self._next()) is not None:
            live = [job for job in batch if not job.answer.done()]  # the others' callers left
            for job in live:
                job.outcome = deadline_error(job.deadline)
            good = [job for job in live if job.outcome is None]
            if good:
                self._run(good)
            with self._changed:
                self._running.remove(len(batch))
                self._lanes.finish_batch(batch)
            self._finished(live)

    def _next(self) -> list[CropJob] | None:
        """The next batch, when there is one; None = stop."""
        with self._changed:
            while not self._stopping:
                if (wait_s := self._lanes.wait_s()) != 0.0:
                    self._changed.wait(wait_s)
                    continue
                wait_s = max(self._delay_s, self._batch_s if self._gains and self._coming > 0 else 0.0)
                if wait_s and self._lanes.urgent_count() and not self._gathering:
                    self._gathering = True
                    self._changed.wait_for(self._gathered, wait_s)
                    self._gathering = False
                if not self._stopping and (batch := self._lanes.take(self._share())):
                    self._running.append(len(batch))
                    if self._lanes.wait_s() == 0.0:
                        self._changed.notify()  # for the rest
                    return batch
        return None

    def _share(self) -> int:
        """Crops that are one worker's, of all those under way."""
        under_way: int = self._lanes.urgent_count() + self._coming + sum(self._running)
        return min(self._most, max(1, -(-under_way // len(self._threads))))

    def _gathered(self) -> bool:
        """Whether it makes no sense to wait for more crops of callers; not when another worker took them meanwhile."""
        waiting = self._lanes.urgent_count()
        full = waiting >= (self._most if self._delay_s else self._share())
        return self._stopping or not waiting or full or (not self._delay_s and self._coming <= 0)

    def _run(self, jobs: list[CropJob]) -> None:
        started_ns = time.perf_counter_ns()
        for job, outcome in zip(jobs, self._infer(jobs), strict=True):
            job.outcome = outcome
        taken_ns = time.perf_counter_ns() - started_ns
        for job in jobs:
            job.queue_ns, job.infer_ns = started_ns - job.queued_ns, taken_ns // len(jobs)
        with self._changed:
            self._sizes[len(jobs)] = self._sizes.get(len(jobs), 0) + 1
            self._batch_s += SMOOTHING * (taken_ns / 1e9 - self._batch_s)
            # What runs beside it takes the same time once, not twice.
            self._each_s += SMOOTHING * (taken_ns / 1e9 / len(jobs) / len(self._running) - self._each_s)
            self._lanes.record_batch_time(min(job.priority for job in jobs), taken_ns / 1e9, len(jobs))

    def _infer(self, jobs: Sequence[CropJob]) -> list[Feature | ReIDError]:
        """Run a batch; one that fails is run again crop by crop, so that only the culprit fails."""
        try:
            return self._features(jobs)
        except Exception as error:  # whatever a runtime raises must not end the thread
            if _is_out_of_memory(error):
                return self._halved(jobs, error)
            if len(jobs) == 1:
                log.exception("inference failed")
                return [inference_error(f"the model failed on it ({type(error).__name__})", error)]
            log.warning("a batch of %d failed, each crop is tried alone: %s", len(jobs), error)
        outcomes = [self._infer([job])[0] for job in jobs]
        culprits = [job for job, outcome in zip(jobs, outcomes, strict=True) if isinstance(outcome, ModelError)]
        if len(culprits) < len(jobs):  # else it is the model that fails, not a crop
            for job in culprits:
                self._quarantine.add(job.crop)
        return outcomes

    def _features(self, jobs: Sequence[CropJob]) -> list[Feature | ReIDError]:
        features = jobs[0].runtime.embed(np.stack([job.pixels for job in jobs if job.pixels is not None]))
        good = [bool(np.isfinite(feature).all()) for feature in features]
        return [
            feature if fine else inference_error("the model answered numbers that are not finite")
            for feature, fine in zip(features, good, strict=True)
        ]

    def _halved(self, jobs: Sequence[CropJob], error: Exception) -> list[Feature | ReIDError]:
        """Two batches of half the size, once; a device that has no memory for those has none for anybody."""
        log.error("no memory for a batch of %d, halves are tried: %s", len(jobs), error)
        outcomes: list[Feature | ReIDError] = []
        middle = (len(jobs) + 1) // 2
        for part in (jobs[:middle], jobs[middle:]):
            try:
                outcomes += self._features(part) if part else []
            except Exception as again:
                log.exception("no memory for a batch of %d either", len(part))
                refusal = UnavailableError(
                    "the model's device has no memory left: try again, lower max_batch, or free its memory"
                )
                refusal.__cause__ = again
                outcomes += [refusal] * len(part)
        return outcomes


def _count_urgent(jobs: Sequence[CropJob]) -> int:
    """How many of them a caller waits for."""
    return sum(job.priority is not Priority.REEMBED for job in jobs)


def _is_out_of_memory(error: Exception) -> bool:
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(words in told for words in OUT_OF_MEMORY_MESSAGES)
