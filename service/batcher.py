"""Many waiting callers, one model: dynamic batching with a bound, deadlines and no fixed delay.

While one batch runs, the next gathers; an idle model starts at once. A place is taken by `admit`
before any work is done for a crop, so a full queue costs nothing and the bound covers decoding too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from resight.errors import DeadlineError, ExpiredInQueueError, ModelError, OverloadedError, ReIDError
from resight.image import Pixels
from resight.service.runtime import Feature, Runtime

log = logging.getLogger(__name__)

MIN_RETRY_S = 0.05  # below this a retry arrives before the queue has moved
SMOOTHING = 0.2  # weight of the newest batch in the running mean of batch times


@dataclass(frozen=True)
class Inferred:
    """One crop's feature, float32 (D,) of unit length, and where its time went."""

    feature: Feature
    queue_ns: int
    infer_ns: int


@dataclass
class _Item:
    pixels: Pixels
    deadline: float
    result: asyncio.Future[Inferred]
    queued_ns: int = field(default_factory=time.perf_counter_ns)


def expired(deadline: float) -> DeadlineError | None:
    """The error of a deadline, in `time.monotonic` seconds, that has passed; else None."""
    if time.monotonic() < deadline:
        return None
    return ExpiredInQueueError("the deadline passed before the crop was embedded: allow more time or send less at once")


class Batcher:
    """One per runtime. `start` and `stop` it in the event loop that submits.

    Args:
        runtime: runs in a thread of its own, one batch at a time.
        max_queue: crops admitted and not yet answered.
        delay_s: wait for company when idle.
    """

    def __init__(self, runtime: Runtime, *, max_queue: int, delay_s: float = 0.0) -> None:
        self._runtime, self._max_queue, self._delay_s = runtime, max_queue, delay_s
        self._items: deque[_Item] = deque()
        self._waiting = asyncio.Event()
        self._admitted = 0
        self._batch_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve the queue."""
        self._worker = asyncio.create_task(self._work(), name="batcher")

    async def stop(self) -> None:
        """End after the running batch; who still waits is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        for item in self._items:
            item.result.cancel()
        self._thread.shutdown()

    @contextlib.contextmanager
    def admit(self, count: int, deadline: float) -> Iterator[None]:
        """Take ``count`` places until the block ends.

        Raises:
            DeadlineError: it has passed already.
            OverloadedError: not so many places are free, or the wait would outlast the deadline.
        """
        if error := expired(deadline):
            raise error
        wait_s = self._admitted / self._runtime.max_batch * (self._batch_s + self._delay_s)
        retry_s = max(MIN_RETRY_S, wait_s)
        if self._admitted + count > self._max_queue:
            raise OverloadedError(
                f"{self._admitted} crops are being embedded, at most {self._max_queue} are admitted and {count} more "
                f"came: try again in {retry_s:.2f} s",
                retry_after_s=retry_s,
                max_queue=self._max_queue,
            )
        if self._admitted and wait_s > deadline - time.monotonic():
            raise OverloadedError(
                f"the queue takes about {wait_s:.2f} s, longer than the deadline: try again in {retry_s:.2f} s or "
                "allow more time",
                retry_after_s=retry_s,
            )
        self._admitted += count
        try:
            yield
        finally:
            self._admitted -= count

    async def embed(self, pixels: Pixels, deadline: float) -> Inferred:
        """Embed one fitted crop, uint8 (H, W, 3), for which a place was taken.

        Raises:
            DeadlineError: the deadline passed while it waited.
            ModelError: the model failed on this crop alone, or answered numbers that are not finite.
        """
        item = _Item(pixels, deadline, asyncio.get_running_loop().create_future())
        self._items.append(item)
        self._waiting.set()
        return await item.result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._waiting.wait()
            if self._delay_s and len(self._items) < self._runtime.max_batch:
                await asyncio.sleep(self._delay_s)
            batch = self._take()
            if not self._items:
                self._waiting.clear()
            if not batch:
                continue
            started_ns = time.perf_counter_ns()
            features = await loop.run_in_executor(self._thread, self._infer, [item.pixels for item in batch])
            infer_ns = time.perf_counter_ns() - started_ns
            self._batch_s += SMOOTHING * (infer_ns / 1e9 - self._batch_s)
            for item, feature in zip(batch, features, strict=True):
                if item.result.done():  # cancelled by its caller
                    continue
                if isinstance(feature, ReIDError):
                    item.result.set_exception(feature)
                else:
                    item.result.set_result(Inferred(feature, started_ns - item.queued_ns, infer_ns // len(batch)))

    def _take(self) -> list[_Item]:
        """The next batch, less those whose callers left or whose deadlines passed."""
        batch: list[_Item] = []
        while self._items and len(batch) < self._runtime.max_batch:
            item = self._items.popleft()
            if item.result.done():
                continue
            if error := expired(item.deadline):
                item.result.set_exception(error)
            else:
                batch.append(item)
        return batch

    def _infer(self, images: Sequence[Pixels]) -> list[Feature | ReIDError]:
        """Run a batch; one that fails is run again crop by crop, so that only the culprit fails."""
        try:
            features = self._runtime.embed(np.stack(images))
        except Exception as error:  # whatever a runtime raises must not end the worker
            if len(images) == 1:
                log.exception("inference failed")
                return [_model_error(f"the model failed on it ({type(error).__name__})", error)]
            log.warning("a batch of %d failed, each crop is tried alone: %s", len(images), error)
            return [self._infer([image])[0] for image in images]
        return [
            feature
            if np.isfinite(feature).all()
            else _model_error("the model answered numbers that are not finite", None)
            for feature in features
        ]


def _model_error(what: str, cause: Exception | None) -> ModelError:
    error = ModelError(f"{what}: the crop cannot be embedded by this bundle; leave it out and report it")
    error.__cause__ = cause
    return error
