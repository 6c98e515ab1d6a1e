"""Image bytes to a unit feature: admitted, decoded and fitted in threads, embedded in batches.

One future stands for a call, however many crops it has: they come back to the event loop with their batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.errors import ImageError, InputError, ReIDError
from resight.service import watch
from resight.service.batcher import Batcher
from resight.service.decode import Decoders
from resight.service.lanes import Job, Priority
from resight.service.runtime import Feature, Runtime
from resight.service.settings import Settings


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
        self._decoders = Decoders(self._batcher.put, self._missed, self._batcher.check, settings)
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
            jobs = [Job(crop, runtime, priority, deadline, answer) for crop in crops]
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
        watch.embedded(jobs)
        return [_outcome(job) for job in jobs]

    def _missed(self, job: Job) -> None:
        self._batcher.missed(job)
        self._finished((job,))

    def _finished(self, jobs: Sequence[Job]) -> None:
        """From any thread: hand jobs back to the event loop, all at once."""
        if jobs and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, jobs)

    def _deliver(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.answer not in self._left:  # its caller left
                continue
            self._left[job.answer] -= 1
            if not self._left[job.answer] and not job.answer.done():
                job.answer.set_result(None)


def _outcome(job: Job) -> Embedded | ReIDError:
    assert job.outcome is not None
    if isinstance(job.outcome, ReIDError):
        return job.outcome
    return Embedded(job.outcome, job.quality, Timings(job.decode_ns, job.queue_ns, job.infer_ns))


def combined(shots: Sequence[Embedded]) -> Embedded:
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


def all_embedded(outcomes: Sequence[Embedded | ReIDError], fields: Sequence[str]) -> list[Embedded]:
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
