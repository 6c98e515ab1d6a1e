"""K-reciprocal encoding and query expansion, one pair and one set at a time, in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def k_reciprocal(features: NDArray[np.float32], *, k1: int, k2: int, weight: float) -> NDArray[np.float64]:
    rows = range(len(features))
    distance = [[0.0] * len(features) for _ in rows]
    for i in rows:
        for j in rows:
            if i != j:
                distance[i][j] = max(0.0, 2.0 - 2.0 * float(features[i].astype(np.float64) @ features[j]))
    ranked = [sorted(rows, key=lambda j, i=i: (j != i, distance[i][j], j)) for i in rows]
    distance = [[value / max(max(row), 1e-12) for value in row] for row in distance]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in ranked[i][: k + 1] if i in ranked[j][: k + 1]}

    encoded = []
    for i in rows:
        chosen = set(own := mutual(i, k1))
        for j in own:
            theirs = mutual(j, round(k1 / 2))
            if 3 * len(theirs & own) > 2 * len(theirs):
                chosen |= theirs
        weights = [math.exp(-distance[i][j]) if j in chosen else 0.0 for j in rows]
        encoded.append([value / sum(weights) for value in weights])
    averaged = [[sum(encoded[j][g] for j in ranked[i][:k2]) / len(ranked[i][:k2]) for g in rows] for i in rows]
    out = []
    for j in rows[1:]:
        least = sum(min(averaged[0][g], averaged[j][g]) for g in rows)
        most = sum(max(averaged[0][g], averaged[j][g]) for g in rows)
        out.append(1.0 - (1.0 - weight) * (1.0 - least / most) - weight * distance[0][j])
    return np.array(out)


def expanded(
    query: NDArray[np.float32], candidates: NDArray[np.float32], *, joined: int, alpha: float
) -> NDArray[np.float64]:
    total = query.astype(np.float64)
    nearest = sorted(range(len(candidates)), key=lambda n: -float(query.astype(np.float64) @ candidates[n]))
    for number in nearest[:joined]:
        similarity = max(0.0, float(query.astype(np.float64) @ candidates[number]))
        total = total + similarity**alpha * candidates[number]
    total /= math.sqrt(sum(value * value for value in total))
    return np.array([float(total @ candidate) for candidate in candidates])
