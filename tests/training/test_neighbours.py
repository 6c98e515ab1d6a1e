import numpy as np
import pytest
from references import dense_jaccard

from resight.training.neighbours import encode_reciprocal, jaccard_graph, nearest


def unit_rows(rng: np.random.Generator, people: int, each: int, dim: int, spread: float) -> np.ndarray:
    centres = rng.normal(size=(people, dim))
    rows = (centres[:, None] + spread * rng.normal(size=(people, each, dim))).reshape(-1, dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count, k, chunk", [(1, 3, 4), (7, 3, 2), (65, 10, 16), (65, 100, 64)])
def test_nearest_equals_a_full_sort_with_each_row_first(count: int, k: int, chunk: int) -> None:
    rows = unit_rows(np.random.default_rng(count), count, 1, 5, 0.0)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, 2)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert np.array_equal(nearest(rows, k, chunk=chunk), expected)


def test_a_duplicate_crop_never_takes_a_rows_own_first_place() -> None:
    rows = np.repeat(unit_rows(np.random.default_rng(0), 3, 1, 4, 0.0), 2, axis=0)
    assert np.array_equal(nearest(rows, 2)[:, 0], np.arange(6))


@pytest.mark.parametrize("k1, k2", [(30, 6), (20, 6), (15, 1), (6, 2), (200, 3)])
@pytest.mark.parametrize("chunk", [7, 256])
def test_sparse_jaccard_equals_the_dense_definition(k1: int, k2: int, chunk: int) -> None:
    rows = unit_rows(np.random.default_rng(k1 + k2), 17, 7, 12, 0.6)
    dense = dense_jaccard(rows, k1, k2)
    graph = jaccard_graph([encode_reciprocal(rows, k1=k1, k2=k2)], [1.0], max_distance=0.7, chunk=chunk)
    kept = dense <= 0.7 - 1e-6
    np.fill_diagonal(kept, True)
    stored = np.full(dense.shape, np.inf)
    coo = graph.tocoo()
    stored[coo.row, coo.col] = coo.data
    assert np.abs(stored[kept] - np.where(np.eye(len(dense), dtype=bool), 0, dense)[kept]).max() < 2e-6
    assert not (stored[dense > 0.7 + 1e-6] < np.inf).any()
    assert (graph.diagonal() == 0).all() and graph.nnz >= len(rows)


def test_views_are_fused_before_pruning() -> None:
    rng = np.random.default_rng(3)
    views = [unit_rows(rng, 9, 6, 8, 0.5) for _ in range(3)]
    weights = [0.7, 0.15, 0.15]
    dense = sum(w * dense_jaccard(view, 10, 3) for w, view in zip(weights, views, strict=True))
    graph = jaccard_graph([encode_reciprocal(view, k1=10, k2=3) for view in views], weights, max_distance=0.6)
    coo = graph.tocoo()
    off = coo.row != coo.col
    assert off.any()
    assert np.abs(coo.data[off] - dense[coo.row[off], coo.col[off]]).max() < 2e-6
    assert off.sum() == (dense <= 0.6).sum() - np.diag(dense <= 0.6).sum()


def test_encodings_are_distributions() -> None:
    rows = unit_rows(np.random.default_rng(5), 20, 5, 16, 0.4)
    weights = encode_reciprocal(rows, k1=12, k2=4).weights
    assert np.abs(np.asarray(weights.sum(1)).ravel() - 1).max() < 1e-5
    assert (weights.data > 0).all()
