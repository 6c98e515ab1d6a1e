"""Sparse re-ranking against the paper's steps on dense matrices, one crop at a time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import environment

from resight.neighbours.dense_rerank import k_reciprocal_scores
from resight.neighbours.rerank import Reranking, rerank
from resight.neighbours.search import farthest_distances, search_neighbours
from resight.training.evaluation.evaluate import rerank_features

Floats = NDArray[np.float32]


def reranked(query: Floats, gallery: Floats, *, k1: int = 20, k2: int = 6, balance: float = 0.3) -> Reranking:
    rows = np.concatenate([query, gallery])
    near, farthest = search_neighbours(rows, k1 + 1), farthest_distances(rows)
    return rerank(query, gallery, near, farthest, k1=k1, k2=k2, balance=balance)


def crops(seed: int, n: int, people: int, size: int) -> Floats:
    """Unit rows in loose groups, so that some neighbours are mutual and some are not."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((people, size))[rng.integers(0, people, n)] + 0.7 * rng.standard_normal((n, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_distance(query: Floats, gallery: Floats, k1: int, k2: int, balance: float) -> NDArray[np.float64]:
    """d* of equation 12, dense, as the authors' code computes it."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    n = len(x)
    distance = np.array([[2 - 2 * float(a @ b) for b in x] for a in x])
    np.fill_diagonal(distance, 0)
    distance = distance / distance.max(axis=1, keepdims=True)
    lists = [sorted(range(n), key=lambda j: (j != i, distance[i, j])) for i in range(n)]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in lists[i][: k + 1] if i in lists[j][: k + 1]}

    encoding = np.zeros((n, n))
    for i in range(n):
        base = mutual(i, k1)
        widened = set(base)
        for candidate in base:
            half = mutual(candidate, int(np.around(k1 / 2)))
            if len(half & base) > 2 / 3 * len(half):
                widened |= half
        for j in widened:
            encoding[i, j] = np.exp(-distance[i, j])
        encoding[i] /= encoding[i].sum()
    if k2 > 1:
        encoding = np.array([np.mean([encoding[j] for j in lists[i][:k2]], axis=0) for i in range(n)])
    final = np.zeros((len(query), len(gallery)))
    for q in range(len(query)):
        for g in range(len(gallery)):
            shared = sum(min(a, b) for a, b in zip(encoding[q], encoding[len(query) + g], strict=True))
            final[q, g] = (1 - balance) * (1 - shared / (2 - shared)) + balance * distance[q, len(query) + g]
    return final


@pytest.mark.parametrize(
    ("seed", "queries", "gallery", "k1", "k2", "balance"),
    [(0, 17, 66, 20, 6, 0.3), (1, 5, 8, 20, 6, 0.3), (2, 1, 31, 7, 3, 0.5), (3, 30, 41, 10, 1, 0.0)],
)
def test_re_ranking_equals_the_dense_steps(
    seed: int, queries: int, gallery: int, k1: int, k2: int, balance: float
) -> None:
    x = crops(seed, queries + gallery, 6, 9)
    found = reranked(x[:queries], x[queries:], k1=k1, k2=k2, balance=balance)
    slow = slow_distance(x[:queries], x[queries:], k1, k2, balance)
    whole = found.rows(slice(0, queries))
    np.testing.assert_allclose(1 - whole, slow, atol=2e-6)
    for chunk in (1, 4):
        parts = [found.rows(slice(start, start + chunk)) for start in range(0, queries, chunk)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


@pytest.mark.parametrize(("gallery", "k1", "k2", "balance"), [(66, 20, 6, 0.3), (8, 20, 6, 0.3), (200, 7, 3, 0.5)])
def test_the_dense_form_of_the_service_equals_the_sparse_one(gallery: int, k1: int, k2: int, balance: float) -> None:
    x = crops(7, 1 + gallery, 6, 9)
    sparse = reranked(x[:1], x[1:], k1=k1, k2=k2, balance=balance).rows(slice(0, 1))[0]
    np.testing.assert_allclose(k_reciprocal_scores(x, k1=k1, k2=k2, weight=balance), sparse, atol=2e-6)


def test_balance_one_keeps_the_order_by_similarity() -> None:
    x = crops(4, 60, 6, 9)
    found = reranked(x[:10], x[10:], balance=1.0).rows(slice(None))
    assert (np.argsort(-found, axis=1) == np.argsort(-(x[:10] @ x[10:].T), axis=1)).all()


def test_mutual_neighbours_are_ranked_higher() -> None:
    """In loose groups, re-ranking moves a query's own group before the others."""
    rng = np.random.default_rng(5)
    centres, group = rng.standard_normal((20, 16)), np.repeat(np.arange(20), 15)
    x = centres[group] + 1.6 * rng.standard_normal((300, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    rows = rng.permutation(300)
    query, gallery = rows[:60], rows[60:]

    def right(similarity: Floats) -> float:
        nearest = np.argsort(-similarity, axis=1)[:, :10]
        return float((group[gallery][nearest] == group[query][:, None]).mean())

    assert right(rerank_features(x[query], x[gallery]).rows(slice(None))) > right(x[query] @ x[gallery].T) + 0.03


def test_equal_crops_are_equally_near() -> None:
    x = np.tile(np.float32([[1, 0, 0]]), (12, 1))
    assert np.ptp(reranked(x[:2], x[2:]).rows(slice(None))) < 0.7
    assert np.isfinite(reranked(x[:2], x[2:]).rows(slice(None))).all()


def test_memory_does_not_grow_quadratically() -> None:
    """One dense float32 matrix of 9,000 crops has 324 MB; a process that re-ranks them grows by much less."""
    code = """
import resource
import numpy as np
from resight.training.evaluation.evaluate import rerank_features
rng = np.random.default_rng(6)
x = rng.standard_normal((9000, 16), np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
rerank_features(x[:5], x[5:500]).rows(slice(None))  # what the libraries need once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rerank_features(x[:500], x[500:]).rows(slice(0, 10))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert int(done.stdout) / 1024 < 250  # MB
