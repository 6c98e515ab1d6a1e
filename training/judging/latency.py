"""Latency of two models on the same batch, measured alternately, so that other load affects both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from resight.arrays import Floats, Pixels
from resight.image import ImageSpec, fit

LATENCY_BATCH = 16  # crops: a typical batch of a service in moderate traffic
ROUNDS = 15  # pairs of runs; their median is robust against a few disturbed ones
WARM_UP = 2  # runs not counted: the first ones allocate memory and choose kernels

EmbeddingModel = tuple[ImageSpec, Callable[[Pixels], Floats]]
"""Image size and embedding, uint8 (B, H, W, 3) -> float32 (B, D)."""


@dataclass(frozen=True)
class Latency:
    """The time of a batch.

    Attributes:
        before_s: median of the active model, in seconds.
        after_s: median of the candidate.
        ratio: median over rounds of the candidate's time divided by the active model's.
        low, high: quartiles of that ratio.
        limit: the largest allowed ratio; None = no limit.
    """

    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    limit: float | None = None

    @property
    def exceeded(self) -> bool:
        """Whether most rounds were slower than allowed: the lower quartile is above the limit."""
        return self.limit is not None and self.low > self.limit


def measure_latency(
    before: EmbeddingModel, after: EmbeddingModel, crops: list[Pixels], *, limit: float | None = None
) -> Latency:
    """Time both models on the same crops, one after the other, `ROUNDS` times.

    Args:
        before: the active model.
        after: the candidate.
        crops: one or more uint8 (H, W, 3); repeated up to `LATENCY_BATCH`.
        limit: allowed ratio of the candidate's time.
    """
    chosen = [crops[number % len(crops)] for number in range(LATENCY_BATCH)]
    sides = [(embed, np.stack([fit(crop, spec) for crop in chosen])) for spec, embed in (before, after)]
    taken = np.array([[_time_batch(embed, pixels) for embed, pixels in sides] for _ in range(WARM_UP + ROUNDS)])[
        WARM_UP:
    ]
    ratios = taken[:, 1] / taken[:, 0]
    low, ratio, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    before_s, after_s = (float(value) for value in np.median(taken, axis=0))
    return Latency(before_s, after_s, ratio, low, high, limit)


def _time_batch(embed: Callable[[Pixels], Floats], pixels: Pixels) -> float:
    start = time.perf_counter()
    embed(pixels)
    return time.perf_counter() - start
