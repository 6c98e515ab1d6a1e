"""Memories: what a batch is contrasted with. Reading is pure, updating is an explicit call.

Letters: B batch, D feature size, K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class CentroidMemory:
    """One unit vector per cluster (Cluster Contrast, Dai et al., ACCV 2022) or per camera proxy (O2CAP).

    Attributes:
        centroids: float32 (K, D), unit rows. Never half precision: a running mean would drift.
        momentum: m, the share of the old value an update keeps; 1 freezes the memory.
    """

    def __init__(self, centroids: Tensor, *, momentum: float) -> None:
        self.centroids = centroids.float()
        self.momentum = momentum

    def similarity(self, features: Tensor) -> Tensor:
        """Cosines of unit features (B, D) with every entry: (B, K). Gradients reach the features only."""
        return features.float() @ self.centroids.T

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """c_y <- normalise(m c_y + (1 - m) f), one sample after the other in batch order.

        The order is part of the method: with m = 0.1 and 16 crops of a cluster the last one makes up 90 % of
        the result. Entries do not touch each other, so the i-th samples of all entries are taken at once.

        Args:
            features: (B, D) unit rows.
            labels: int64 (B,), 0..K-1.
        """
        if self.momentum == 1.0:
            return
        blend(self.centroids, features, labels, momentum=self.momentum)


@torch.no_grad()
def blend(memory: Tensor, features: Tensor, labels: Tensor, *, momentum: float) -> None:
    """memory[y] <- normalise(m memory[y] + (1 - m) f) in place, as if one sample after the other.

    Args:
        memory: float32 (K, D).
        features: (B, D).
        labels: int64 (B,), 0..K-1.
        momentum: m.
    """
    features = features.float()
    turn = _occurrence(labels)
    for i in range(int(turn.max()) + 1):
        now = turn == i
        rows = labels[now]
        memory[rows] = functional.normalize(momentum * memory[rows] + (1 - momentum) * features[now], dim=1)


def _occurrence(labels: Tensor) -> Tensor:
    """How many equal labels stand before each position: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    position = torch.arange(len(labels), device=labels.device)
    first = torch.searchsorted(ordered, ordered, side="left")
    turn = torch.empty_like(position)
    turn[order] = position - first
    return turn
