"""The losses, one value per sample, so that a batch may be split over devices and steps.

Each takes similarities or features and returns (B,); the training loop weights the samples (`sample_weights`).

Letters: B batch, D feature size, K clusters, P proxies, J candidates of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from resight.arrays import Floats, Ints


def sample_weights(cameras: Ints, aggregate: Literal["mean", "cameras"]) -> Floats:
    """Weight of each sample of a batch: the loss of the batch is sum_i w_i l_i.

    Args:
        cameras: int64 (B,) of the whole batch.
        aggregate: "mean" (1 / B each) or "cameras": the mean over each camera's samples, then the sum over the
            cameras of the batch (O2CAP's released code; it grows with their number).

    Returns:
        float32 (B,).
    """
    if aggregate == "mean":
        return np.full(len(cameras), 1 / len(cameras), np.float32)
    _, number, counts = np.unique(cameras, return_inverse=True, return_counts=True)
    return (1 / counts[number]).astype(np.float32)


def cluster_contrast(similarity: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of <f, c_k> / tau against a crop's own cluster (Cluster Contrast, equation 3).

    Args:
        similarity: (B, K), see `CentroidMemory.similarity`.
        labels: int64 (B,), 0..K-1.
        temperature: tau, 0.05 in Cluster Contrast and LP.

    Returns:
        (B,).
    """
    return functional.cross_entropy(similarity / temperature, labels, reduction="none")


def offline_association(
    similarity: Tensor, own_cluster: Tensor, clusters: Tensor, *, temperature: float, negatives: int
) -> Tensor:
    """Attract to all proxies of the own cluster, repel from the most similar others (O2CAP, offline association).

    L(i) = -(1/|P_i|) sum_{p in P_i} log [ exp z_p / (sum_{q in P_i} exp z_q + sum_{n in hardest} exp z_n) ],
    z = similarity / tau.

    Args:
        similarity: (B, P), <f, k_p>.
        own_cluster: int64 (B,), each sample's cluster.
        clusters: int64 (P,), each proxy's cluster.
        temperature: tau, 0.07 in O2CAP.
        negatives: number of proxies of other clusters used (50 in O2CAP); all if there are fewer.

    Returns:
        (B,).
    """
    logits = similarity / temperature
    positive = own_cluster[:, None] == clusters  # (B, P)
    hardest = logits.masked_fill(positive, -torch.inf).topk(min(negatives, len(clusters)), dim=1).values
    total = torch.logsumexp(torch.cat([logits.masked_fill(~positive, -torch.inf), hardest], 1), 1)  # (B,)
    return ((total[:, None] - logits) * positive).sum(1) / positive.sum(1)


def online_association(
    similarity: Tensor,
    scores: Tensor,
    cameras: Tensor,
    *,
    temperature: float,
    positives: int,
    negatives: int,
    excluded: Tensor | None = None,
) -> Tensor:
    """Attract to the currently best proxies across cameras, independent of the labels (O2CAP, online association).

    The most similar proxy of each camera is a candidate; the best candidates are the positives. The most
    similar of all other proxies are the negatives.

    Args:
        similarity: (B, P), <f, k_p>.
        scores: (B, P), selection scores without gradient, see `association_scores`.
        cameras: int64 (P,), 0..C-1, each present.
        temperature: tau, 0.07 in O2CAP.
        positives: number of positives (3 in O2CAP), at most one per camera.
        negatives: number of negatives (50 in O2CAP); all if there are fewer.
        excluded: bool (B, P), proxies known to be other persons, never positives (not in O2CAP; see `links`).

    Returns:
        (B,).
    """
    logits = similarity / temperature
    allowed = scores if excluded is None else scores.masked_fill(excluded, -torch.inf)
    best = [_best_of(allowed, cameras == camera) for camera in range(int(cameras.max()) + 1)]
    score, proxy = (torch.stack(side, 1) for side in zip(*best, strict=True))  # (B, C)
    top = score.topk(min(positives, score.shape[1]), dim=1)
    chosen = proxy.gather(1, top.indices)  # (B, positives)
    valid = top.values > -torch.inf  # all proxies of a camera may be excluded
    chosen = torch.where(valid, chosen, chosen[:, :1])  # the first is valid: a sample's own proxy is never excluded
    rest = scores.scatter(1, chosen, -torch.inf)
    hardest = rest.topk(min(negatives, scores.shape[1] - chosen.shape[1]), dim=1).indices
    attracted = logits.gather(1, chosen).masked_fill(~valid, -torch.inf)
    selected = torch.log_softmax(torch.cat([attracted, logits.gather(1, hardest)], 1), 1)[:, : chosen.shape[1]]
    return -selected.masked_fill(~valid, 0).sum(1) / valid.sum(1)


def _best_of(scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The best value of each row among some columns, and its index."""
    best = scores.masked_fill(~columns, -torch.inf).max(1)
    return best.values, best.indices


@torch.no_grad()
def association_scores(similarity: Tensor, between: Tensor, *, balance: float) -> Tensor:
    """s_q = w <f, k_q> + (1 - w) <k_y, k_q>: mostly the similarity of the sample's own proxy y (O2CAP; w = 0.15).

    Args:
        similarity: (B, P), <f, k_q>.
        between: (B, P), <k_y, k_q>.
        balance: w.
    """
    return balance * similarity.detach() + (1 - balance) * between


def selective_contrast(
    similarity: Tensor, *, positives: int, temperature: float, self_share: float, neighbour_gain: float
) -> Tensor:
    """Selective contrast (Pang et al., TOMM 2022): the own entry and its neighbours against adaptive negatives.

    CE_j = -log softmax(similarity / tau)[j] over all J candidates, other positives included;
    l = s CE_0 + sum_{j = 1..positives} (g (1 - s) / positives) CE_j.

    Args:
        similarity: (B, J): the own entry, then the positives, then the negatives.
        positives: number of neighbours; 0 during warm-up, when the loss is s CE_0.
        temperature: tau, 0.1 in the released code (it scales by 10).
        self_share: s, 0.5.
        neighbour_gain: g, 1.75; so the weights are 0.5 and 7 x 0.125, 1.375 in all.

    Returns:
        (B,).
    """
    entropy = -torch.log_softmax(similarity / temperature, 1)
    own = self_share * entropy[:, 0]
    if not positives:
        return own
    weight = neighbour_gain * (1 - self_share) / positives
    return own + weight * entropy[:, 1 : 1 + positives].sum(1)


def distillation(features: Tensor, targets: Tensor) -> Tensor:
    """||f - t||^2 of unit rows (B, D), that is 2 - 2 cos: (B,). LP's guidance by the frozen teacher."""
    return (features - targets).square().sum(1)


def relation(similarity: Tensor, target_similarity: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) of the similarities to the same K anchors; features may differ in length.

    Each model uses its own centroids of the same clusters (similarity-distribution distillation of SEED,
    Fang et al., ICLR 2021, equation 5, with centroids instead of its queue).

    Args:
        similarity: (B, K) of the student, with gradient.
        target_similarity: (B, K) of the teacher.
        temperature: tau of both.

    Returns:
        (B,).
    """
    target = torch.log_softmax(target_similarity / temperature, 1)
    predicted = torch.log_softmax(similarity / temperature, 1)
    return functional.kl_div(predicted, target, reduction="none", log_target=True).sum(1)


def weigh_views(terms: Sequence[Tensor], local_weight: float) -> Tensor:
    """Weighted sum of one term per view, with weights (1 - l, l, l).

    With LP's lambda_2 = 0.2 they are 0.8, 0.2 and 0.2. They sum to 1.2, as in the released code.
    """
    main, *local = terms
    return (1 - local_weight) * main + local_weight * sum(local, start=main.new_zeros(()))
