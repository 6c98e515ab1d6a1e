"""Clustering that scales: neighbours, k-reciprocal Jaccard and DBSCAN, sparse against dense, and how time grows.

The peer computes what the field's released codes compute, the way they do: faiss's flat index for neighbours, N x N
matrices, a Python loop over rows, scikit-learn's DBSCAN on the full matrix. Both must give the same labels. The limit
of the neighbour search is the machine's own speed at multiplying matrices, measured beside it.

    python benchmarks/bench_jaccard.py [--crops 12936] [--dim 2048] [--growth 10000 30000 100000] [--growth-dim 512]

Each measurement is a process of its own, which tells its peak memory over the features. Three to six minutes on two
cores, half of it the 100,000; `--crops 4000 --growth` takes some seconds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from resight.neighbours.jaccard import jaccard_graph
from resight.neighbours.reciprocal import Neighbours, encode_reciprocal
from resight.neighbours.search import search_neighbours
from resight.training.clustering.dbscan import dbscan

K1, K2, EPS, MIN_SAMPLES = 30, 6, 0.6, 4  # LP on Market-1501
EACH = 17  # crops a person, as Market-1501's 12,936 of 751
LOOKS = 32  # dimensions in which people differ: neighbours then overlap as on real crops (60 entries a row of V)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """Seconds of the neighbour search and of the rest, peak bytes over the features, labels, multiply-adds a second."""

    search: float
    rest: float
    peak: int
    labels: Ints
    speed: float

    @property
    def total(self) -> float:
        """Seconds from features to labels."""
        return self.search + self.rest


def people(crops: int, dim: int) -> Floats:
    """Unit rows around random people, spread so that neighbouring people touch."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((LOOKS, dim), np.float32) / np.sqrt(LOOKS)
    looks = np.repeat(rng.standard_normal((-(-crops // EACH), LOOKS), np.float32), EACH, axis=0)[:crops]
    rows: Floats = (looks + 0.8 * rng.standard_normal((crops, LOOKS), np.float32)) @ basis
    for row in rows:  # one by one: a second array of this size would count as peak memory
        row += 0.3 * rng.standard_normal(dim, np.float32)
        row /= np.linalg.norm(row)
    return rows


def sparse_rest(features: Floats, near: Neighbours) -> Ints:
    """What `resight adapt` does once neighbours are found."""
    graph = jaccard_graph([encode_reciprocal(features, near, k1=K1, k2=K2)], [1.0], max_distance=EPS)
    return dbscan(graph, EPS, MIN_SAMPLES)


def dense_search(features: Floats) -> Ints:
    """Neighbours as the released codes find them on a CPU."""
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(features)
    return np.asarray(index.search(features, K1)[1], np.int64)


def dense_rest(features: Floats, ranks: Ints) -> Ints:
    """The same steps with dense matrices, row by row."""
    n = len(features)
    weights = np.zeros((n, n), np.float32)
    full = [_reciprocal(ranks, i, K1) for i in range(n)]
    half = [_reciprocal(ranks, i, round(K1 / 2) + 1) for i in range(n)]
    for i in range(n):
        widened = full[i]
        for candidate in full[i]:
            if len(np.intersect1d(half[candidate], full[i])) > 2 / 3 * len(half[candidate]):
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


def _reciprocal(ranks: Ints, i: int, k: int) -> Ints:
    forward = ranks[i, :k]
    mutual: Ints = forward[(ranks[forward, :k] == i).any(1)]
    return mutual


WAYS: dict[str, tuple[Callable[[Floats], Any], Callable[[Floats, Any], Ints]]] = {
    "sparse": (lambda features: search_neighbours(features, K1), sparse_rest),
    "dense": (dense_search, dense_rest),
}


def measure(way: str, crops: int, dim: int) -> Measured:
    """One way on features of its own making; peak memory is that of the process, so call it in a fresh one."""
    features = people(crops, dim)
    speed = speed_of_products(dim)
    before = resident()
    started = time.perf_counter()
    find, rest = WAYS[way]
    near = find(features)
    found = time.perf_counter()
    labels = rest(features, near)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return Measured(found - started, ended - found, peak, labels, speed)


def resident() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def speed_of_products(dim: int, side: int = 2048) -> float:
    """Multiply-adds a second of the best of three large products of this width."""
    rows = torch.rand(side, dim)
    seconds = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        rows @ rows.T
        seconds.append(time.perf_counter() - started)
    return side * side * dim / min(seconds[1:])


def in_own_process(way: str, crops: int, dim: int) -> Measured:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, way, crops, dim).result()


def compare(crops: int, dim: int) -> None:
    """Sparse against dense."""
    ours, peer = (in_own_process(way, crops, dim) for way in WAYS)
    differing = int((ours.labels != peer.labels).sum())
    outliers = int((ours.labels < 0).sum())
    print(f"{crops:,} crops, D = {dim}, {torch.get_num_threads()} threads: {ours.labels.max() + 1} clusters, ", end="")
    print(f"{outliers} outliers, {differing} labels differ")
    print("          neighbours  Jaccard + DBSCAN    together   memory over the features")
    for name, run in (("sparse", ours), ("dense", peer)):
        print(f"  {name:<6} {run.search:9.2f} s {run.rest:14.2f} s {run.total:9.2f} s {run.peak / 2**30:10.2f} GiB")
    print(f"  ratio  {peer.search / ours.search:9.1f} x {peer.rest / ours.rest:14.1f} x ", end="")
    print(f"{peer.total / ours.total:9.1f} x {peer.peak / ours.peak:10.1f} x")
    if differing:
        raise SystemExit("the labels have to be equal")


def growth(sizes: list[int], dim: int) -> None:
    """Time and memory of the sparse way as crops grow."""
    print(f"growth at D = {dim}; limit: N^2 D / 2 multiply-adds at the speed of one large product")
    print("      crops  neighbours     limit   reached  Jaccard + DBSCAN   together      memory   clusters")
    runs = []
    for crops in sizes:
        run = in_own_process("sparse", crops, dim)
        limit = crops**2 * dim / 2 / run.speed
        print(f"  {crops:9,} {run.search:9.2f} s {limit:7.2f} s {limit / run.search:8.0%} {run.rest:15.2f} s", end="")
        print(f" {run.total:8.2f} s {run.peak / 2**30:7.2f} GiB {run.labels.max() + 1:10,}", flush=True)
        runs.append(run)
    if len(runs) > 1:
        factor = math.log(sizes[-1] / sizes[0])
        parts = {"neighbours": "search", "Jaccard + DBSCAN": "rest", "together": "total"}
        powers = {name: math.log(getattr(runs[-1], of) / getattr(runs[0], of)) / factor for name, of in parts.items()}
        print(
            "  time grows as N to the power of " + ", ".join(f"{power:.2f} ({name})" for name, power in powers.items())
        )


def main() -> None:
    """Compare, then grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=12_936, help="crops of the comparison; 0 leaves it out")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--growth", type=int, nargs="*", default=[10_000, 30_000, 100_000])
    parser.add_argument("--growth-dim", type=int, default=512)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: other programs use this machine (load {load:.1f} before the start)")
    if arguments.crops:
        compare(arguments.crops, arguments.dim)
    if arguments.growth:
        growth(arguments.growth, arguments.growth_dim)


if __name__ == "__main__":
    main()
