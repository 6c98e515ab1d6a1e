"""Whether scores still mean what they meant: best-hit cosines of late against those after the start.

A calibration keeps no sample of best hits to compare with, so the first `REFERENCE` searches in a space since the
server started are the reference. What is told is the population stability index over the reference's own deciles,
``sum((p - q) ln(p / q))``, and the shift of the mean. By the index's common rule, below 0.1 is no drift, above 0.25
is one to look into: another camera, other light, or a gallery that has grown.
"""

from __future__ import annotations

from collections import deque

import numpy as np

REFERENCE = 1000  # searches; 100 in each decile, so that chance alone gives an index of some 0.02
LATE = 1000  # searches that are compared with them
BINS = 10
FLOOR = 0.5  # searches; an empty bin counts half a one, or the index would have no end


class Drift:
    """Best-hit cosines of one space, in one thread."""

    def __init__(self, *, reference: int = REFERENCE, late: int = LATE) -> None:
        self._wanted = reference
        self._reference: list[float] = []
        self._late: deque[float] = deque(maxlen=late)

    def add(self, cosine: float) -> None:
        """Count one search's best hit."""
        if len(self._reference) < self._wanted:
            self._reference.append(cosine)
        else:
            self._late.append(cosine)

    @property
    def ready(self) -> bool:
        """Whether there is enough to compare: a tenth of the late window."""
        return len(self._late) >= max(1, (self._late.maxlen or LATE) // BINS)

    def index(self) -> float:
        """The population stability index, 0 or more; NaN before there is enough."""
        if not self.ready:
            return float("nan")
        edges = np.unique(np.quantile(self._reference, np.arange(1, BINS) / BINS))
        shares = []
        for sample in (self._reference, self._late):
            counts = np.bincount(np.searchsorted(edges, np.asarray(sample)), minlength=len(edges) + 1)
            counted = np.maximum(counts, FLOOR)
            shares.append(counted / counted.sum())
        before, now = shares
        return float(((now - before) * np.log(now / before)).sum())

    def shift(self) -> float:
        """Mean of late less mean of the reference, in cosine; NaN before there is enough."""
        return float(np.mean(self._late) - np.mean(self._reference)) if self.ready else float("nan")
