"""Re-ranking equals the reference implementations of the papers, and improves an order."""

import numpy as np
import pytest
from references_rerank import expanded as slow_expanded
from references_rerank import k_reciprocal as slow_k_reciprocal

from resight.neighbours.dense_rerank import k_reciprocal_scores
from resight.service.search.ranking import RerankOptions, query_expansion_scores, rerank_scores


def people(count: int, persons: int, *, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(persons, 16))[rng.integers(0, persons, count)] + noise * rng.normal(size=(count, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 3, 7, 22, 60])
@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (5, 1, 0.0), (1, 3, 1.0), (7, 2, 0.5)])
def test_k_reciprocal_equals_the_reference(count, k1, k2, weight):
    features = people(count, 1 + count // 6, noise=0.6, seed=count)
    found = k_reciprocal_scores(features, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(found, slow_k_reciprocal(features, k1=k1, k2=k2, weight=weight), atol=2e-6)
    assert ((found >= -1e-6) & (found <= 1 + 1e-6)).all()


def test_copies_of_one_crop_score_like_in_the_reference():
    features = np.repeat(np.eye(4, dtype=np.float32), [9, 1, 5, 5], axis=0)
    found = k_reciprocal_scores(features, k1=4, k2=2, weight=0.3)
    np.testing.assert_allclose(found, slow_k_reciprocal(features, k1=4, k2=2, weight=0.3), atol=1e-6)


@pytest.mark.parametrize("joined", [1, 5, 100])
def test_query_expansion_equals_the_reference(joined):
    features = people(40, 5, noise=0.8)
    found = query_expansion_scores(features[0], features[1:], neighbours=joined)
    np.testing.assert_allclose(found, slow_expanded(features[0], features[1:], joined=joined, alpha=3.0), atol=1e-6)


@pytest.mark.parametrize("method", ["k_reciprocal", "query_expansion"])
def test_mutual_neighbours_rank_before_a_chance_neighbour(method):
    """A crop of another person that is nearer to the query than the person's last crop, but not to the others."""
    angles = np.radians([0, 10, 15, 20, 25, 30, 35, 40])
    person = np.stack([np.cos(angles), np.sin(angles), np.zeros(8)], axis=1).astype(np.float32)
    stranger = np.array([[np.cos(np.radians(38)), 0, np.sin(np.radians(38))]], np.float32)
    candidates = np.concatenate((person[1:7], stranger, person[7:]))
    assert list(np.argsort(-(candidates @ person[0]))) == list(range(8))
    found = rerank_scores(person[0], candidates, RerankOptions(method, k1=7, k2=3))
    assert np.argmin(found) == 6


def test_no_candidates_give_no_scores():
    assert rerank_scores(
        np.ones(4, np.float32) / 2, np.empty((0, 4), np.float32), RerankOptions("k_reciprocal")
    ).shape == (0,)
