"""Embedding of image files: admission, decoding and resizing in threads, inference in batches.

A call waits on one future for all its crops; finished crops return to the event loop batch by batch.

A decoder thread decodes a crop, resizes it, scores its quality and passes it to the batcher without going through the
event loop. A budget limits the pixels of full-size images in memory: after reading its header and before decoding, a
crop waits until its pixels fit into the budget.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from resight.arrays import Feature
from resight.errors import (
    DrainingError,
    ImageError,
    ImageUndecodableError,
    InputError,
    ReIDError,
    UnavailableError,
)
from resight.image import decode, fit, quality
from resight.runtime.base import Runtime
from resight.service.call_events import has_listeners, record_stage
from resight.service.inference.admission import deadline_error
from resight.service.inference.batcher import Batcher
from resight.service.inference.priority_queue import CropJob, Priority
from resight.service.settings import Settings

log = logging.getLogger(__name__)

STOP_S = 5.0  # many times what the costliest image that is accepted takes
CALLER_LEFT = UnavailableError("the caller left")  # never delivered
_QueueEntry = tuple[int, int, CropJob | None]
"""Position, arrival number and job (None = stop). Sorted by the first two, as arrival numbers are unique."""
PRIORITY_DELAY = {Priority.INTERACTIVE: 0, Priority.ENROL: 16, Priority.REEMBED: 128}
"""How many later interactive crops may overtake a crop of each priority; `CropQueue` shares the model's time."""


class PixelBudget:
    """Limit on the pixels of full-size images in memory.

    Args:
        max_pixels: of all images together; a larger image is admitted when no other one is in memory.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels, self._used, self._changed = max_pixels, 0, threading.Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until the pixels fit into the budget, and reserve them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._max_pixels)
            self._used += pixels

    def release(self, pixels: int) -> None:
        """Return reserved pixels to the budget."""
        with self._changed:
            self._used -= pixels
            self._changed.notify_all()


class Decoders:
    """Decoder threads: interactive crops first, then enrolments, then migrations, without starvation.

    Args:
        decoded: called with each job that has pixels.
        failed: called with each job whose ``outcome`` is an error.
        check: raises ReIDError for a crop that must not be embedded.
        settings: limits, number of threads and pixel budget.
    """

    def __init__(
        self,
        decoded: Callable[[CropJob], None],
        failed: Callable[[CropJob], None],
        check: Callable[[bytes], None],
        settings: Settings,
    ) -> None:
        self._decoded, self._failed, self._check, self._settings = decoded, failed, check, settings
        self._budget = PixelBudget(settings.decode_pixels)
        self._jobs: queue.PriorityQueue[_QueueEntry] = queue.PriorityQueue()
        self._number = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"decode_{number}", daemon=True)
            for number in range(settings.decode_threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the crops being decoded, but wait at most `STOP_S`; waiting ones fail with DrainingError."""
        self._closing = True
        for _ in self._threads:
            self._jobs.put((-1, self._next_number(), None))
        deadline = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if busy := sum(thread.is_alive() for thread in self._threads):
            log.warning("%d decoder threads are still busy after %g s: stopping without them", busy, STOP_S)
        while not self._jobs.empty():
            job = self._jobs.get()[2]
            if job is not None:
                job.outcome = DrainingError("the server is shutting down: retry when it is back")
                self._failed(job)

    def put(self, job: CropJob) -> None:
        """Queue a job for decoding; called from the event loop's thread only."""
        number = self._next_number()
        self._jobs.put((number + PRIORITY_DELAY[job.priority], number, job))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _work(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            job.outcome = CALLER_LEFT if job.future.done() else deadline_error(job.deadline)
            if job.outcome is None:
                self._prepare(job)
            (self._decoded if job.outcome is None else self._failed)(job)

    def _prepare(self, job: CropJob) -> None:
        started_ns, acquired, limits = time.perf_counter_ns(), 0, self._settings

        def acquire(pixels: int) -> None:
            nonlocal acquired
            self._budget.acquire(pixels)
            acquired = pixels

        try:
            self._check(job.crop)
            image = decode(
                job.crop, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels, on_header=acquire
            )
            job.pixels = fit(image, job.runtime.image)
            job.quality = quality(job.pixels, image.shape[:2])
        except ReIDError as error:
            job.outcome = error
        except Exception as error:  # decoder bug on malformed bytes, or out of memory: only this crop fails
            job.outcome = ImageUndecodableError(
                f"the image could not be decoded and resized ({type(error).__name__}): send the file again"
            )
        finally:
            if acquired:
                self._budget.release(acquired)
        job.decode_ns = time.perf_counter_ns() - started_ns


def _record_crop_stages(jobs: Sequence[CropJob]) -> None:
    """Report the stages of a call's embedded crops, each from the first crop's start to the last crop's end.

    The stages of one crop are sequential; those of different crops overlap.
    """
    done = [job for job in jobs if job.queue_ns or job.infer_ns]
    if not done or not has_listeners():
        return
    ready = [job.queued_ns for job in done]
    started = [job.queued_ns + job.queue_ns for job in done]
    record_stage("decode", min(job.queued_ns - job.decode_ns for job in done), max(ready))
    record_stage("queue", min(ready), max(started))
    record_stage("infer", min(started), time.perf_counter_ns())


@dataclass(frozen=True)
class Timings:
    """Time per stage in nanoseconds: sums over crops, except ``queue_ns``, which is the longest wait."""

    decode_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.decode_ns + other.decode_ns, max(self.queue_ns, other.queue_ns), self.infer_ns + other.infer_ns
        )


@dataclass(frozen=True)
class Embedded:
    """A feature, float32 (D,) of unit length, and the quality, 0..1, of its crop or crops."""

    feature: Feature
    quality: float
    timings: Timings


class Embedder:
    """Embeds crops with the model of each call; all models share the threads and the queue.

    `start` and `stop` it in the event loop that calls it.
    """

    def __init__(self, settings: Settings) -> None:
        self._batcher = Batcher(
            self._finished,
            max_queue=settings.max_queue,
            max_batch=settings.batch,
            delay_s=settings.batch_delay_s,
            workers=settings.batches_at_once,
            wait_for_decoding=settings.provider != "cpu",
        )
        self._decoders = Decoders(self._batcher.put, self._discard, self._batcher.check, settings)
        self._remaining: dict[asyncio.Future[None], int] = {}

    def start(self) -> None:
        """Start the threads."""
        self._loop = asyncio.get_running_loop()
        self._batcher.start()
        self._decoders.start()

    async def stop(self) -> None:
        """Stop after the running batches."""
        await asyncio.to_thread(self._decoders.stop)
        await asyncio.to_thread(self._batcher.stop)

    def waiting(self) -> dict[Priority, int]:
        """Crops admitted and not yet finished, by priority."""
        return self._batcher.waiting()

    def batch_sizes(self) -> dict[int, int]:
        """Number of batches run, by batch size."""
        return self._batcher.sizes()

    async def embed(
        self,
        runtime: Runtime,
        crops: Sequence[bytes],
        deadline: float,
        *,
        priority: Priority = Priority.INTERACTIVE,
    ) -> list[Embedded | ReIDError]:
        """Embed crops; an error of one crop is its outcome.

        Args:
            runtime: the model.
            crops: JPEG, PNG or WebP files.
            deadline: in `time.monotonic` seconds.
            priority: of the call.

        Raises:
            OverloadedError: the queue has no room for all crops; none was decoded.
            DeadlineError: it has already passed.
        """
        with self._batcher.admit(len(crops), deadline, priority):
            done = self._loop.create_future()
            jobs = [CropJob(crop, runtime, priority, deadline, done) for crop in crops]
            if not jobs:
                return []
            self._remaining[done] = len(jobs)
            try:
                self._batcher.expect(jobs)
                for job in jobs:
                    self._decoders.put(job)
                await done
            finally:
                del self._remaining[done]
        _record_crop_stages(jobs)
        return [_outcome(job) for job in jobs]

    def _discard(self, job: CropJob) -> None:
        self._batcher.discard(job)
        self._finished((job,))

    def _finished(self, jobs: Sequence[CropJob]) -> None:
        """Pass finished jobs to the event loop in one callback; called from any thread."""
        if jobs and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, jobs)

    def _deliver(self, jobs: Sequence[CropJob]) -> None:
        for job in jobs:
            if job.future not in self._remaining:  # the caller was cancelled
                continue
            self._remaining[job.future] -= 1
            if not self._remaining[job.future] and not job.future.done():
                job.future.set_result(None)


def _outcome(job: CropJob) -> Embedded | ReIDError:
    assert job.outcome is not None
    if isinstance(job.outcome, ReIDError):
        return job.outcome
    return Embedded(job.outcome, job.quality, Timings(job.decode_ns, job.queue_ns, job.infer_ns))


def combine_crops(shots: Sequence[Embedded]) -> Embedded:
    """Combine several crops of one person: the quality-weighted mean feature, scaled to unit length.

    The quality is the mean quality. If all qualities are 0, the weights are equal.

    Raises:
        InputError: the features cancel out, which does not happen for crops of one person.
    """
    weights = np.array([shot.quality for shot in shots], np.float32)
    if not weights.any():
        weights[:] = 1.0
    total = (weights[:, None] * np.stack([shot.feature for shot in shots])).sum(axis=0)  # (D,)
    length = float(np.linalg.norm(total))
    if length < 1e-6 * float(weights.sum()):
        raise InputError("the shots' features cancel out: send crops of one person")
    timings = sum((shot.timings for shot in shots), Timings())
    return Embedded(total / np.float32(length), float(np.mean([shot.quality for shot in shots])), timings)


def require_embedded(outcomes: Sequence[Embedded | ReIDError], fields: Sequence[str]) -> list[Embedded]:
    """The outcomes if all crops were embedded.

    Raises:
        ReIDError: the first error, with the field of its crop.
    """
    good: list[Embedded] = []
    for outcome, field in zip(outcomes, fields, strict=True):
        if isinstance(outcome, ReIDError):
            if isinstance(outcome, ImageError):
                outcome.field = field
            raise outcome
        good.append(outcome)
    return good
