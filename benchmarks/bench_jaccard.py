"""Sparse against dense: k-reciprocal Jaccard plus DBSCAN, in one run on the same features.

The peer is the algorithm as the field's released codes compute it, with N x N matrices, one row of the
Jaccard matrix at a time over inverted lists. Both must give the same labels.

    python benchmarks/bench_jaccard.py [--crops 4000] [--dim 512]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from resight.training.cluster import scan
from resight.training.jaccard import encode_reciprocal, jaccard_graph
from resight.training.neighbours import nearest

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4
EACH = 17  # crops a person, as Market-1501's 12,936 of 751


def people(crops: int, dim: int) -> NDArray[np.float32]:
    """Unit rows around random centres, spread so that neighbouring people touch."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((-(-crops // EACH), dim), np.float32)
    rows = np.repeat(centres, EACH, axis=0)[:crops] + 0.8 * rng.standard_normal((crops, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def dense_labels(features: NDArray[np.float32]) -> NDArray[np.int64]:
    """The same steps with dense matrices."""
    n = len(features)
    ranks = nearest(features, K1)
    weights = np.zeros((n, n), np.float32)
    half = [_reciprocal(ranks, i, round(K1 / 2) + 1) for i in range(n)]
    for i in range(n):
        base = _reciprocal(ranks, i, K1)
        widened = base
        for candidate in base:
            if len(np.intersect1d(half[candidate], base)) > 2 / 3 * len(half[candidate]):
                widened = np.append(widened, half[candidate])
        widened = np.unique(widened)
        near = np.exp(2 * features[widened] @ features[i] - 2)
        weights[i, widened] = near / near.sum()
    weights = np.stack([weights[ranks[i, :K2]].mean(0) for i in range(n)])
    inverted = [np.flatnonzero(weights[:, j]) for j in range(n)]
    distance = np.zeros((n, n), np.float32)
    for i in range(n):
        shared = np.zeros(n, np.float32)
        for j in np.flatnonzero(weights[i]):
            rows = inverted[j]
            shared[rows] += np.minimum(weights[i, j], weights[rows, j])
        distance[i] = 1 - shared / (2 - shared)
    labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(np.clip(distance, 0, None))
    return np.asarray(labels, np.int64)


def _reciprocal(ranks: NDArray[np.int64], i: int, k: int) -> NDArray[np.int64]:
    forward = ranks[i, :k]
    mutual: NDArray[np.int64] = forward[(ranks[forward, :k] == i).any(1)]
    return mutual


def sparse_labels(features: NDArray[np.float32]) -> NDArray[np.int64]:
    """What `resight adapt` does."""
    graph = jaccard_graph([encode_reciprocal(features, k1=K1, k2=K2)], [1.0], max_distance=EPS)
    return scan(graph, EPS, MIN_SAMPLES)


def main() -> None:
    """Time both and compare their labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=512)
    arguments = parser.parse_args()
    features = people(arguments.crops, arguments.dim)
    seconds, labels = {}, {}
    for name, run in (("sparse", sparse_labels), ("dense", dense_labels)):
        started = time.perf_counter()
        labels[name] = run(features)
        seconds[name] = time.perf_counter() - started
    differing = int((labels["sparse"] != labels["dense"]).sum())
    clusters, ratio = labels["sparse"].max() + 1, seconds["dense"] / seconds["sparse"]
    print(f"{arguments.crops} crops, D = {arguments.dim}: {clusters} clusters, {differing} labels differ")
    print(f"sparse {seconds['sparse']:.2f} s, dense {seconds['dense']:.2f} s: {ratio:.1f} x")


if __name__ == "__main__":
    main()
