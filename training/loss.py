"""The losses, each a function of a batch. Letters: B batch, D feature size, K clusters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from resight.training.memory import ClusterMemory


def cluster_contrast(features: Tensor, memory: ClusterMemory, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of <f, c_k> / tau against a crop's own cluster (Cluster Contrast, equation 3).

    Args:
        features: (B, D) unit rows.
        memory: K centroids.
        labels: int64 (B,), 0..K-1.
        temperature: tau, 0.05 in Cluster Contrast and LP.

    Returns:
        Scalar, mean over the batch.
    """
    return functional.cross_entropy(memory.similarity(features) / temperature, labels)


def distillation(features: Tensor, targets: Tensor) -> Tensor:
    """Batch mean of ||f - t||^2 of unit rows (B, D), that is 2 - 2 cos: LP's guidance by the frozen teacher."""
    return (features - targets).square().sum(1).mean()


def weigh_views(terms: Sequence[Tensor], local_weight: float) -> Tensor:
    """Sum one term per view with weights (1 - l, l, l).

    With LP's lambda_2 = 0.2 they are 0.8, 0.2 and 0.2. They sum to 1.2: that is what the released code does.
    """
    whole, *local = terms
    return (1 - local_weight) * whole + local_weight * sum(local, start=whole.new_zeros(()))
