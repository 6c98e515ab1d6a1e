"""Image bytes to a unit feature: admitted, decoded and fitted in threads, embedded in batches.

One future stands for a call, however many crops it has: they come back to the event loop with their batch.

Image bytes to fitted pixels, in threads: what decides how much memory decoding may take.

A thread takes a crop, decodes it, fits it, judges it and hands it on without a way through the event loop. However
many crops come, no more than a budget of pixels is full-size at any time: a crop waits, after its header was read and
before a pixel is decoded, until there is room for it.
"""

from __future__ import annotations

import asyncio
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
from resight.service.inference.batcher import Batcher, deadline_error
from resight.service.inference.priority_queue import CropJob, Priority
from resight.service.settings import Settings

CALLER_LEFT = UnavailableError("the caller left")  # nobody reads it
_Entry = tuple[int, int, CropJob | None]
"""Place in the line, number of arrival, and the job; None = stop. Ordered by the first two, which no two share."""
PRIORITY_DELAY = {Priority.INTERACTIVE: 0, Priority.ENROL: 16, Priority.REEMBED: 128}
"""So many later callers' crops overtake one, and no more; how many of each are embedded is the lanes' business."""


class PixelBudget:
    """Pixels that may be full-size at once.

    Args:
        most: of all images together; a single image is let in alone however large.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._changed = most, 0, threading.Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels

    def release(self, pixels: int) -> None:
        """Make room again."""
        with self._changed:
            self._taken -= pixels
            self._changed.notify_all()


class Decoders:
    """Threads that decode, callers' crops before enrolments' before a migration's, none of which is starved.

    Args:
        decoded: is given each job that has pixels.
        failed: is given each job whose ``outcome`` is an error.
        check: raises for a crop that must not be embedded.
        settings: limits, number of threads and budget of pixels.
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
        self._jobs: queue.PriorityQueue[_Entry] = queue.PriorityQueue()
        self._number = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"decode_{number}", daemon=True)
            for number in range(settings.decode_threads)
        ]

    def start(self) -> None:
        """Begin to decode."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the crops that are being decoded; the others are told so."""
        self._closing = True
        for _ in self._threads:
            self._jobs.put((-1, self._next_number(), None))
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()[2]
            if job is not None:
                job.outcome = DrainingError("the server is going down: try again when it is back")
                self._failed(job)

    def put(self, job: CropJob) -> None:
        """Let a job wait for its decoding. Only the event loop's thread calls it."""
        number = self._next_number()
        self._jobs.put((number + PRIORITY_DELAY[job.priority], number, job))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _work(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            job.outcome = CALLER_LEFT if job.answer.done() else deadline_error(job.deadline)
            if job.outcome is None:
                self._prepare(job)
            (self._decoded if job.outcome is None else self._failed)(job)

    def _prepare(self, job: CropJob) -> None:
        started_ns, taken, limits = time.perf_counter_ns(), 0, self._settings

        def room(pixels: int) -> None:
            nonlocal taken
            self._budget.acquire(pixels)
            taken = pixels

        try:
            self._check(job.crop)
            image = decode(
                job.crop, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels, on_header=room
            )
            job.pixels = fit(image, job.runtime.image)
            job.quality = quality(job.pixels, image.shape[:2])
        except ReIDError as error:
            job.outcome = error
        except Exception as error:  # a decoder's own fault on hostile bytes, or no memory: this crop's alone
            job.outcome = ImageUndecodableError(
                f"the image could not be brought to the encoder's size ({type(error).__name__}): send the file again"
            )
        finally:
            if taken:
                self._budget.release(taken)
        job.decode_ns = time.perf_counter_ns() - started_ns


def _record_crop_stages(jobs: Sequence[CropJob]) -> None:
    """Tell where the time of crops that were embedded went, from the first one's begin to the last one's end.

    The stages of different crops overlap; of one crop they follow one another.
    """
    done = [job for job in jobs if job.queue_ns or job.infer_ns]
    if not done or not has_listeners():
        return
    ready = [job.queued_ns for job in done]
    begun = [job.queued_ns + job.queue_ns for job in done]
    record_stage("decode", min(job.queued_ns - job.decode_ns for job in done), max(ready))
    record_stage("queue", min(ready), max(begun))
    record_stage("infer", min(begun), time.perf_counter_ns())


@dataclass(frozen=True)
class Timings:
    """Where the time went, in nanoseconds. Sums over crops, but for the queue, which is the longest wait."""

    decode_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.decode_ns + other.decode_ns, max(self.queue_ns, other.queue_ns), self.infer_ns + other.infer_ns
        )


@dataclass(frozen=True)
class Embedded:
    """A feature, float32 (D,) of unit length, and the quality, 0..1, of what it was made from."""

    feature: Feature
    quality: float
    timings: Timings


class Embedder:
    """Embeds crops with whatever model a call names; all share the threads and the queue.

    `start` and `stop` it in the event loop that calls it.
    """

    def __init__(self, settings: Settings) -> None:
        self._batcher = Batcher(
            self._finished,
            max_queue=settings.max_queue,
            most=settings.batch,
            delay_s=settings.batch_delay_s,
            workers=settings.batches_at_once,
            gains=settings.provider != "cpu",
        )
        self._decoders = Decoders(self._batcher.put, self._discard, self._batcher.check, settings)
        self._left: dict[asyncio.Future[None], int] = {}

    def start(self) -> None:
        """Begin to serve."""
        self._loop = asyncio.get_running_loop()
        self._batcher.start()
        self._decoders.start()

    async def stop(self) -> None:
        """End after the running batch."""
        await asyncio.to_thread(self._decoders.stop)
        await asyncio.to_thread(self._batcher.stop)

    def waiting(self) -> dict[Priority, int]:
        """Crops admitted and not yet answered, of each priority."""
        return self._batcher.waiting()

    def batch_sizes(self) -> dict[int, int]:
        """How many batches ran, by their number of crops."""
        return self._batcher.sizes()

    async def embed(
        self,
        runtime: Runtime,
        crops: Sequence[bytes],
        deadline: float,
        *,
        priority: Priority = Priority.INTERACTIVE,
    ) -> list[Embedded | ReIDError]:
        """Embed crops; what is wrong with one is that one's outcome.

        Args:
            runtime: the model.
            crops: JPEG, PNG or WebP files.
            deadline: in `time.monotonic` seconds.
            priority: who waits for it.

        Raises:
            OverloadedError: the queue has no room for all of them; none was decoded.
            DeadlineError: it has passed already.
        """
        with self._batcher.admit(len(crops), deadline, priority):
            answer = self._loop.create_future()
            jobs = [CropJob(crop, runtime, priority, deadline, answer) for crop in crops]
            if not jobs:
                return []
            self._left[answer] = len(jobs)
            try:
                self._batcher.expect(jobs)
                for job in jobs:
                    self._decoders.put(job)
                await answer
            finally:
                del self._left[answer]
        _record_crop_stages(jobs)
        return [_outcome(job) for job in jobs]

    def _discard(self, job: CropJob) -> None:
        self._batcher.discard(job)
        self._finished((job,))

    def _finished(self, jobs: Sequence[CropJob]) -> None:
        """From any thread: hand jobs back to the event loop, all at once."""
        if jobs and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, jobs)

    def _deliver(self, jobs: Sequence[CropJob]) -> None:
        for job in jobs:
            if job.answer not in self._left:  # its caller left
                continue
            self._left[job.answer] -= 1
            if not self._left[job.answer] and not job.answer.done():
                job.answer.set_result(None)


def _outcome(job: CropJob) -> Embedded | ReIDError:
    assert job.outcome is not None
    if isinstance(job.outcome, ReIDError):
        return job.outcome
    return Embedded(job.outcome, job.quality, Timings(job.decode_ns, job.queue_ns, job.infer_ns))


def combine_crops(shots: Sequence[Embedded]) -> Embedded:
    """One feature of several crops of one person: the mean weighted by quality, of unit length.

    Its quality is the mean of theirs. Crops that are all of quality 0 weigh the same.

    Raises:
        InputError: the features cancel out, which crops of one person never do.
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
    """The outcomes, when all went well.

    Raises:
        ReIDError: the first that did not, with its field.
    """
    good: list[Embedded] = []
    for outcome, field in zip(outcomes, fields, strict=True):
        if isinstance(outcome, ReIDError):
            if isinstance(outcome, ImageError):
                outcome.field = field
            raise outcome
        good.append(outcome)
    return good
