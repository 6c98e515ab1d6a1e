"""Reference implementations of the fast routines with loops, as in the papers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def dense_jaccard(features: Floats, k1: int, k2: int, ranks: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """k-reciprocal Jaccard distance, dense (N, N), steps 1-6 of the k-reciprocal encoding one crop at a time.

    Neighbours (N, k1) are given where ties leave a choice.
    """
    x = features.astype(np.float64)
    n = len(x)
    similarity = x @ x.T
    np.fill_diagonal(similarity, 2.0)
    if ranks is None:
        ranks = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k1, n)]
    lists = [list(row) for row in ranks]

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in lists[i][: k + 1] if i in lists[j][: k + 1]}

    weights = np.zeros((n, n))
    for i in range(n):
        base = reciprocal(i, k1)
        widened = set(base)
        for candidate in base:
            half = reciprocal(candidate, round(k1 / 2))
            if len(half & base) > 2 / 3 * len(half):
                widened |= half
        members = sorted(widened)
        raw = np.exp([-(2 - 2 * float(x[i] @ x[j])) for j in members])
        weights[i, members] = raw / raw.sum()
    if k2 > 1:
        weights = np.stack([weights[lists[i][:k2]].mean(0) for i in range(n)])
    return _jaccard_of(weights)


def dense_camera_jaccard(
    features: Floats, cameras: NDArray[np.int64], k1: tuple[int, int], k2: tuple[int, int]
) -> NDArray[np.float64]:
    """Camera-aware Jaccard distance, dense (N, N), one crop at a time; k1 and k2 within and across cameras."""
    x = features.astype(np.float64)
    n = len(x)
    ranked = [sorted(range(n), key=lambda j, i=i: (j != i, -float(x[i] @ x[j]))) for i in range(n)]
    same = [[j for j in ranked[i] if cameras[j] == cameras[i]] for i in range(n)]
    other = [[j for j in ranked[i] if cameras[j] != cameras[i]] for i in range(n)]
    weights = np.zeros((n, n))
    for i in range(n):
        members = {j for j in same[i][: k1[0] + 1] if i in same[j][: k1[0] + 1]}
        members |= {j for j in other[i][: k1[1] + 1] if i in other[j][: k1[1] + 1]}
        for j in members:
            weights[i, j] = np.exp(-(2 - 2 * float(x[i] @ x[j])))
        weights[i] /= weights[i].sum()
    return _jaccard_of(np.stack([weights[same[i][: k2[0]] + other[i][: k2[1]]].mean(0) for i in range(n)]))


def _jaccard_of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(weights)
    distance = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            shared = np.minimum(weights[i], weights[j]).sum()
            distance[i, j] = max(0.0, 1 - shared / (2 - shared))
    return distance


def sequential_update(centroids: Floats, features: Floats, labels: NDArray[np.int64], momentum: float) -> Floats:
    """The memory update one sample after the other."""
    out = centroids.astype(np.float64).copy()
    for feature, label in zip(features.astype(np.float64), labels, strict=True):
        mixed = momentum * out[label] + (1 - momentum) * feature
        out[label] = mixed / np.linalg.norm(mixed)
    return out


def contrast(features: Floats, centroids: Floats, labels: NDArray[np.int64], temperature: float) -> float:
    """Mean of -log softmax over clusters, sample by sample."""
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        logits = [float(feature @ centroid) / temperature for centroid in centroids]
        peak = max(logits)
        total += peak + float(np.log(sum(np.exp(value - peak) for value in logits))) - logits[label]
    return total / len(features)


def dense_silhouette(distance: Floats, labels: NDArray[np.int64]) -> float:
    """Mean silhouette over all crops; outliers (-1) are clusters of one and score 0."""
    n = len(labels)
    names = [f"out{i}" if label < 0 else f"c{label}" for i, label in enumerate(labels)]
    clusters = {name: [j for j in range(n) if names[j] == name] for name in names}
    scores = []
    for i in range(n):
        mates = [j for j in clusters[names[i]] if j != i]
        if not mates:
            scores.append(0.0)
            continue
        a = float(np.mean([distance[i, j] for j in mates]))
        b = min(float(np.mean([distance[i, j] for j in rows])) for name, rows in clusters.items() if name != names[i])
        scores.append((b - a) / max(a, b))
    return float(np.mean(scores))
