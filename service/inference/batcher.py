"""Dynamic batching of crops for inference: bounded queue, deadlines, priorities, no fixed delay.

While a batch runs, the next one fills; an idle worker starts at once. On a device that is more efficient with larger
batches, a worker first waits for crops that are being decoded, but no longer than one batch takes. `admit` reserves
capacity before any work is done for a crop, so that rejecting a call is cheap and the bound includes decoding.

A GPU has one worker. A CPU has one per core, and each takes at most its share of all crops in progress, in small
batches. Batches then end at different times, and one core embeds while another decodes; with one batch at a time on all
cores, a fifth of the CPU was idle (OSNet x0.25, 32 calls in flight).

A batch that fails is rerun crop by crop, and the crops that fail are quarantined. Worker threads run with lower OS
priority than the rest of the process.
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
    DrainingError,
    ModelError,
    ReIDError,
    UnavailableError,
)
from resight.service.inference.admission import Admission, deadline_error
from resight.service.inference.priority_queue import CropJob, CropQueue, Priority

MAX_QUARANTINED = 1024  # digests of 16 bytes


class Quarantine:
    """Digests of the latest crops on which a model failed; thread-safe."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}  # as an ordered set

    def add(self, crop: bytes) -> None:
        """Add a crop, and drop the oldest beyond `MAX_QUARANTINED`."""
        self._held[_crop_digest(crop)] = None
        while len(self._held) > MAX_QUARANTINED:
            self._held.pop(next(iter(self._held)), None)

    def check(self, crop: bytes) -> None:
        """Reject a quarantined crop.

        Raises:
            ModelError: it is quarantined.
        """
        if self._held and _crop_digest(crop) in self._held:
            raise inference_error("the model failed on this crop before, so it is not retried")


def inference_error(what: str, cause: Exception | None = None) -> ModelError:
    """The error of a crop that cannot be embedded."""
    error = ModelError(f"{what}: this bundle cannot embed the crop; omit it and report it")
    error.__cause__ = cause
    return error


def _crop_digest(crop: bytes) -> bytes:
    return hashlib.blake2b(crop, digest_size=16).digest()


NICE_INCREMENT = 5  # a third of the scheduling weight of other threads, see sched(7)


def lower_thread_priority() -> None:
    """Lower the OS priority of the calling thread.

    For inference threads: rejecting a call or decoding a crop then waits microseconds for a core instead of a time
    slice. No effect on systems without per-thread niceness.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE_INCREMENT)


log = logging.getLogger(__name__)

# Messages of onnxruntime, CUDA, TensorRT and Python, which have no common exception class.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "cudaerrormemoryallocation",
)


class Batcher:
    """Runs all models of a device in worker threads.

    Args:
        finished: called in a worker thread with the jobs of a batch, each with its outcome.
        max_queue: crops admitted and not yet finished, for each priority.
        max_batch: maximum batch size.
        delay_s: how long an idle worker waits for more crops.
        workers: number of batches in parallel.
        wait_for_decoding: wait for crops that are being decoded, as larger batches cost less per crop.
    """

    def __init__(
        self,
        finished: Callable[[Sequence[CropJob]], None],
        *,
        max_queue: int,
        max_batch: int,
        delay_s: float = 0.0,
        workers: int = 1,
        wait_for_decoding: bool = True,
    ) -> None:
        self._max_batch, self._wait_for_decoding = max_batch, wait_for_decoding
        self._finished, self._delay_s = finished, delay_s
        self._queue, self._changed = CropQueue(), threading.Condition()
        self._admission = Admission("crops", "max_queue", max_queue)
        self._decoding = 0
        self._gathering = self._stopping = False
        self._quarantine = Quarantine()
        self._sizes: dict[int, int] = {}
        self._running: list[int] = []  # crops of each batch that runs
        self._threads = [
            threading.Thread(target=self._work, name=f"inference_{number}", daemon=True) for number in range(workers)
        ]

    def start(self) -> None:
        """Start the worker threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the running batches; waiting jobs fail with DrainingError."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        closing = DrainingError("the server is shutting down: retry when it is back")
        left = self._queue.drain()
        for job in left:
            job.outcome = closing
        self._finished(left)

    @contextlib.contextmanager
    def admit(self, count: int, deadline: float, priority: Priority = Priority.INTERACTIVE) -> Iterator[None]:
        """Reserve capacity for ``count`` crops within the block; called from the event loop's thread only.

        Raises:
            DeadlineError: it has already passed.
            OverloadedError: the capacity is exhausted, or the expected wait is longer than the deadline.
        """
        with self._admission.admit(count, deadline, priority):
            if priority is not Priority.REEMBED:
                self._queue.defer_background()  # sets a single number, so no lock is needed
            yield

    def waiting(self) -> dict[Priority, int]:
        """Crops admitted and not yet finished, by priority."""
        return {priority: self._admission.waiting(priority) for priority in Priority}

    def sizes(self) -> dict[int, int]:
        """Number of batches run, by batch size."""
        return dict(self._sizes)

    def check(self, crop: bytes) -> None:
        """Reject a quarantined crop; see `Quarantine.check`."""
        self._quarantine.check(crop)

    def expect(self, jobs: Sequence[CropJob]) -> None:
        """Announce jobs that are about to be decoded; each one is then passed to `put` or `discard`."""
        with self._changed:
            self._decoding += _count_urgent(jobs)

    def put(self, job: CropJob) -> None:
        """Queue a decoded job for inference; thread-safe."""
        job.queued_ns = time.perf_counter_ns()
        with self._changed:
            self._decoding -= _count_urgent((job,))
            self._queue.put(job)
            self._wake()

    def discard(self, job: CropJob) -> None:
        """Drop an announced job whose decoding failed; thread-safe."""
        with self._changed:
            self._decoding -= _count_urgent((job,))
            self._wake()

    def _wake(self) -> None:
        """Wake one worker, unless one is already waiting for more crops; needless wake-ups contend for the GIL."""
        if not self._gathering or self._gathered():
            self._changed.notify()

    def _work(self) -> None:
        lower_thread_priority()
        while (batch := self._next()) is not None:
            live = [job for job in batch if not job.future.done()]  # the callers of the others were cancelled
            for job in live:
                job.outcome = deadline_error(job.deadline)
            good = [job for job in live if job.outcome is None]
            if good:
                self._run(good)
            with self._changed:
                self._running.remove(len(batch))
                self._queue.finish_batch(batch)
            self._finished(live)

    def _next(self) -> list[CropJob] | None:
        """Wait for the next batch; None = stop."""
        with self._changed:
            while not self._stopping:
                if (wait_s := self._queue.wait_s()) != 0.0:
                    self._changed.wait(wait_s)
                    continue
                wait_s = max(
                    self._delay_s, self._admission.batch_s if self._wait_for_decoding and self._decoding > 0 else 0.0
                )
                if wait_s and self._queue.urgent_count() and not self._gathering:
                    self._gathering = True
                    self._changed.wait_for(self._gathered, wait_s)
                    self._gathering = False
                if not self._stopping and (batch := self._queue.take(self._share())):
                    self._running.append(len(batch))
                    if self._queue.wait_s() == 0.0:
                        self._changed.notify()  # for the rest
                    return batch
        return None

    def _share(self) -> int:
        """One worker's share of all crops in progress."""
        under_way: int = self._queue.urgent_count() + self._decoding + sum(self._running)
        return min(self._max_batch, max(1, -(-under_way // len(self._threads))))

    def _gathered(self) -> bool:
        """Whether to stop waiting for more crops: the batch is full, no more are expected, or the queue is empty."""
        waiting = self._queue.urgent_count()
        full = waiting >= (self._max_batch if self._delay_s else self._share())
        return self._stopping or not waiting or full or (not self._delay_s and self._decoding <= 0)

    def _run(self, jobs: list[CropJob]) -> None:
        started_ns = time.perf_counter_ns()
        for job, outcome in zip(jobs, self._infer(jobs), strict=True):
            job.outcome = outcome
        taken_ns = time.perf_counter_ns() - started_ns
        for job in jobs:
            job.queue_ns, job.infer_ns = started_ns - job.queued_ns, taken_ns // len(jobs)
        with self._changed:
            self._sizes[len(jobs)] = self._sizes.get(len(jobs), 0) + 1
            self._admission.record_batch(taken_ns / 1e9, len(jobs), parallel=len(self._running))
            self._queue.record_batch_time(min(job.priority for job in jobs), taken_ns / 1e9, len(jobs))

    def _infer(self, jobs: Sequence[CropJob]) -> list[Feature | ReIDError]:
        """Run a batch; if it fails, rerun it crop by crop, so that only the faulty crops fail."""
        try:
            return self._features(jobs)
        except Exception as error:  # no exception of a runtime may end the thread
            if _is_out_of_memory(error):
                return self._halved(jobs, error)
            if len(jobs) == 1:
                log.exception("inference failed")
                return [inference_error(f"the model failed on it ({type(error).__name__})", error)]
            log.warning("a batch of %d failed, retrying crop by crop: %s", len(jobs), error)
        outcomes = [self._infer([job])[0] for job in jobs]
        culprits = [job for job, outcome in zip(jobs, outcomes, strict=True) if isinstance(outcome, ModelError)]
        if len(culprits) < len(jobs):  # otherwise the model fails, not a crop
            for job in culprits:
                self._quarantine.add(job.crop)
        return outcomes

    def _features(self, jobs: Sequence[CropJob]) -> list[Feature | ReIDError]:
        features = jobs[0].runtime.embed(np.stack([job.pixels for job in jobs if job.pixels is not None]))
        good = [bool(np.isfinite(feature).all()) for feature in features]
        return [
            feature if fine else inference_error("the model returned values that are not finite")
            for feature, fine in zip(features, good, strict=True)
        ]

    def _halved(self, jobs: Sequence[CropJob], error: Exception) -> list[Feature | ReIDError]:
        """Retry once as two batches of half the size; if those fail too, the device is out of memory."""
        log.error("out of memory for a batch of %d, retrying in halves: %s", len(jobs), error)
        outcomes: list[Feature | ReIDError] = []
        middle = (len(jobs) + 1) // 2
        for part in (jobs[:middle], jobs[middle:]):
            try:
                outcomes += self._features(part) if part else []
            except Exception as again:
                log.exception("out of memory for a batch of %d too", len(part))
                refusal = UnavailableError(
                    "the model's device is out of memory: retry, lower max_batch, or free memory on it"
                )
                refusal.__cause__ = again
                outcomes += [refusal] * len(part)
        return outcomes


def _count_urgent(jobs: Sequence[CropJob]) -> int:
    """Number of jobs that a caller waits for."""
    return sum(job.priority is not Priority.REEMBED for job in jobs)


def _is_out_of_memory(error: Exception) -> bool:
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in OUT_OF_MEMORY_MESSAGES)
