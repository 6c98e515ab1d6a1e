"""Image bytes to a unit feature: decode and fit in threads, then the batcher.

Decoding and fitting are one job, so at most ``decode_threads`` full-size images are in memory at a
time; what waits for the model is already of the encoder's size, and its number is bounded by `Batcher`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from resight.errors import ImageError, InputError, ReIDError
from resight.image import Pixels, decode, fit
from resight.service.batcher import Batcher, expired
from resight.service.quality import quality
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
    """Embeds crops with one runtime. `start` and `stop` it in the event loop."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime = runtime
        self._settings = settings
        self._batcher = Batcher(runtime, max_queue=settings.max_queue, delay_s=settings.batch_delay_s)
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")

    def start(self) -> None:
        """Begin to serve."""
        self._batcher.start()

    async def stop(self) -> None:
        """End after the running batch."""
        await self._batcher.stop()
        self._threads.shutdown()

    async def embed(self, crops: Sequence[bytes], deadline: float) -> list[Embedded | ReIDError]:
        """Embed crops; what is wrong with one is that one's outcome.

        Args:
            crops: JPEG, PNG or WebP files.
            deadline: in `time.monotonic` seconds.

        Raises:
            OverloadedError: the queue has no room for all of them; none was decoded.
            DeadlineError: it has passed already.
        """
        with self._batcher.admit(len(crops), deadline):
            return list(await asyncio.gather(*(self._one(crop, deadline) for crop in crops)))

    async def _one(self, crop: bytes, deadline: float) -> Embedded | ReIDError:
        try:
            fitted, figure, decode_ns = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, crop, deadline
            )
            inferred = await self._batcher.embed(fitted, deadline)
        except ReIDError as error:
            return error
        return Embedded(inferred.feature, figure, Timings(decode_ns, inferred.queue_ns, inferred.infer_ns))

    def _decode(self, crop: bytes, deadline: float) -> tuple[Pixels, float, int]:
        if error := expired(deadline):
            raise error
        started_ns = time.perf_counter_ns()
        limits = self._settings
        image = decode(crop, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        fitted = fit(image, self.runtime.image)
        figure = quality(fitted, image.shape[:2])
        return fitted, figure, time.perf_counter_ns() - started_ns


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
