"""Who must not meet: pairs known to be two persons, asked for batch by batch.

Letters: B batch, M numbered things (crops' groups, or clusters), P columns asked for, F things with a foe.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resight.training.dbscan import OUTLIER
from resight.training.links import Links
from resight.training.neighbours import Ints


class Apart:
    """Pairs of numbers that are two persons.

    Args:
        pairs: int64 (., 2), numbers 0..M-1.
        count: M.
        device: where answers are needed.
    """

    def __init__(self, pairs: Ints, count: int, *, device: str) -> None:
        involved = np.unique(pairs)
        place = np.zeros(count, np.int64)  # 0: nobody's foe
        place[involved] = np.arange(1, len(involved) + 1)
        foes = np.zeros((len(involved) + 1, len(involved) + 1), bool)
        one, other = place[pairs].T
        foes[one, other] = foes[other, one] = True
        self._place, self._foes = torch.from_numpy(place).to(device), torch.from_numpy(foes).to(device)

    def __call__(self, own: Tensor, others: Tensor) -> Tensor:
        """Whether each of `own` (B,) and each of `others` (P,) are two persons: bool (B, P)."""
        return self._foes[self._place[own]][:, self._place[others]]


def clusters_apart(links: Links | None, labels: Ints, *, device: str) -> Apart | None:
    """Clusters with a cannot-link between them; None where there are none.

    Args:
        links: between the crops.
        labels: int64 (N,), 0..K-1, -1 for outliers, which have no foes.
        device: where answers are needed.
    """
    if links is None:
        return None
    pairs = labels[links.rows[~links.same]]
    pairs = pairs[(pairs != OUTLIER).all(1)]
    return Apart(pairs, int(labels.max()) + 1, device=device) if len(pairs) else None
