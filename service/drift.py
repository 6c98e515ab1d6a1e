"""Whether scores still mean what they meant: the cosines of best hits in one time against those of another.

Both are histograms of `BINS` equal parts of -1..1. What is told is the population stability index over the reference's
own deciles, as near as the bins allow, ``sum((p - q) ln(p / q))``. By the index's common rule, below 0.1 is no drift,
above 0.25 is one to look into: another camera, other light, or a gallery that has grown.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
"""Best hits of each bin, int64 (BINS,)."""

BINS = 64
PARTS = 10
FLOOR = 0.5  # searches; an empty part counts half a one, or the index would have no end


def bin_of(cosine: float) -> int:
    """The bin of a cosine, -1..1."""
    return min(BINS - 1, max(0, int((cosine + 1.0) * (BINS / 2))))


def stability(reference: Counts, now: Counts) -> float:
    """The population stability index, 0 or more, of two histograms that hold something."""
    upto = np.cumsum(reference) / reference.sum()
    middle = upto - reference / (2.0 * reference.sum())  # of each bin, as a share of the reference
    parts = np.minimum(PARTS - 1, (PARTS * middle).astype(np.int64))
    shares = []
    for counts in (reference, now):
        of_part = np.bincount(parts, counts, PARTS)[np.unique(parts)]
        counted = np.maximum(of_part, FLOOR)
        shares.append(counted / counted.sum())
    before, after = shares
    return float(((after - before) * np.log(after / before)).sum())
