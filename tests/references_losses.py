"""Loop implementations of losses and memories, one sample at a time, following the papers' code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def log_softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    total = peak + float(np.log(sum(np.exp(value - peak) for value in logits)))
    return [value - total for value in logits]


def offline(feature: Floats, memory: Floats, own: int, clusters: Ints, temperature: float, negatives: int) -> float:
    """O2CAP's offline loss of one sample of proxy `own`."""
    z = [float(feature @ entry) / temperature for entry in memory]
    positives = [p for p in range(len(z)) if clusters[p] == clusters[own]]
    others = sorted((p for p in range(len(z)) if clusters[p] != clusters[own]), key=lambda p: -z[p])[:negatives]
    candidates = positives + others
    values = log_softmax([z[p] for p in candidates])
    return -sum(values[: len(positives)]) / len(positives)


def online(
    feature: Floats,
    memory: Floats,
    own: int,
    cameras: Ints,
    temperature: float,
    balance: float,
    positives: int,
    negatives: int,
    excluded: frozenset[int] = frozenset(),
) -> float:
    """O2CAP's online loss of one sample of proxy `own`; excluded proxies are never positives."""
    score = [balance * float(feature @ entry) + (1 - balance) * float(memory[own] @ entry) for entry in memory]
    best = []
    for camera in sorted(set(cameras.tolist())):
        rows = [p for p in range(len(score)) if cameras[p] == camera and p not in excluded]
        if rows:
            best.append(max(rows, key=lambda p: score[p]))
    chosen = sorted(best, key=lambda p: -score[p])[:positives]
    rest = sorted((p for p in range(len(score)) if p not in chosen), key=lambda p: -score[p])
    rest = rest[: min(negatives, len(score) - min(positives, len(set(cameras.tolist()))))]
    values = log_softmax([float(feature @ memory[p]) / temperature for p in chosen + rest])
    return -sum(values[: len(chosen)]) / len(chosen)


def selective(
    x: Floats, mixture: Floats, candidates: list[int], positives: int, self_share: float, gain: float
) -> float:
    """Selective contrast of one sample: itself first, then positives, then negatives; scale 10."""
    values = log_softmax([10 * float(x @ mixture[c]) for c in candidates])
    loss = -self_share * values[0]
    for j in range(1, positives + 1):
        loss -= gain * (1 - self_share) / positives * values[j]
    return loss
