import numpy as np
import pytest
from reciprocal_encodings import camera_encoding_of, encoding_of
from references import dense_camera_jaccard, dense_jaccard
from sklearn.cluster import DBSCAN

from resight.neighbours.jaccard import jaccard_graph
from resight.neighbours.reciprocal import ReciprocalEncoding
from resight.neighbours.search import nearest_neighbours
from resight.training.clustering.dbscan import dbscan


def unit_rows(rng: np.random.Generator, people: int, each: int, dim: int, spread: float) -> np.ndarray:
    centres = rng.normal(size=(people, dim))
    rows = (centres[:, None] + spread * rng.normal(size=(people, each, dim))).reshape(-1, dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def assert_graph_is(graph, dense: np.ndarray, max_distance: float = 0.7) -> None:
    kept = dense <= max_distance - 1e-6
    np.fill_diagonal(kept, True)
    stored = np.full(dense.shape, np.inf)
    coo = graph.tocoo()
    stored[coo.row, coo.col] = coo.data
    expected = np.where(np.eye(len(dense), dtype=bool), 0, dense)
    assert np.abs(stored[kept] - expected[kept]).max() < 2e-6
    assert not (stored[dense > max_distance + 1e-6] < np.inf).any()
    assert np.array_equal(stored, stored.T) and (graph.diagonal() == 0).all()
    assert graph.dtype == np.float32 and graph.has_canonical_format


@pytest.mark.parametrize("k1, k2", [(30, 6), (20, 6), (15, 1), (6, 2), (200, 3)])
def test_sparse_jaccard_equals_the_dense_definition(k1: int, k2: int) -> None:
    rows = unit_rows(np.random.default_rng(k1 + k2), 11, 7, 12, 0.6)
    dense = dense_jaccard(rows, k1, k2)
    for chunk in (1, 5000, 1 << 22):
        graph = jaccard_graph([encoding_of(rows, k1=k1, k2=k2)], [1.0], max_distance=0.7, chunk=chunk)
        assert graph.nnz > len(rows)
        assert_graph_is(graph, dense)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_fewer_crops_than_neighbours_are_handled(count: int) -> None:
    rows = unit_rows(np.random.default_rng(count), count, 1, 4, 0.0)
    for k1, k2 in ((30, 6), (30, 1), (2, 6)):
        graph = jaccard_graph([encoding_of(rows, k1=k1, k2=k2)], [1.0], max_distance=0.7)
        assert_graph_is(graph, dense_jaccard(rows, k1, k2))


@pytest.mark.parametrize("copies", [2, 5, 35])
@pytest.mark.parametrize("k1, k2", [(30, 6), (6, 1)])
def test_duplicate_crops_are_clustered_like_in_the_dense_form(copies: int, k1: int, k2: int) -> None:
    rows = np.repeat(unit_rows(np.random.default_rng(0), 2, 2, 8, 0.5), copies, axis=0)
    dense = dense_jaccard(rows, k1, k2, ranks=nearest_neighbours(rows, k1))  # ties are ambiguous
    graph = jaccard_graph([encoding_of(rows, k1=k1, k2=k2)], [1.0], max_distance=0.7)
    assert_graph_is(graph, dense)
    for eps in (0.35, 0.5, 0.6):
        expected = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(dense)
        assert np.array_equal(dbscan(graph, eps, 4), expected)


@pytest.mark.parametrize("max_distance", [0.3, 0.6, 0.95])
def test_views_are_fused_before_pruning(max_distance: float) -> None:
    rng = np.random.default_rng(3)
    views = [unit_rows(rng, 9, 6, 8, 0.5) for _ in range(3)]
    weights = [0.7, 0.15, 0.15]
    dense = sum(w * dense_jaccard(view, 10, 3) for w, view in zip(weights, views, strict=True))
    encoded = [encoding_of(view, k1=10, k2=3) for view in views]
    graph = jaccard_graph(encoded, weights, max_distance=max_distance)
    assert graph.nnz > len(dense)
    assert_graph_is(graph, dense, max_distance)
    for eps in np.arange(0.25, max_distance, 0.05):
        expected = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(dense)
        assert np.array_equal(dbscan(graph, eps, 4), expected)


def test_an_overlap_of_one_half_gives_a_distance_of_two_thirds() -> None:
    from scipy import sparse

    weights = sparse.csr_matrix(
        np.array([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1], [0.5, 0.5, 0, 0]], np.float32)
    )
    graph = jaccard_graph([ReciprocalEncoding(weights)], [1.0], max_distance=0.7).toarray()
    assert graph[0, 1] == pytest.approx(1 - 0.5 / 1.5, abs=1e-6) and graph[0, 3] == 0
    assert jaccard_graph([ReciprocalEncoding(weights)], [1.0], max_distance=0.7).nnz == 4 + 2 * 3


@pytest.mark.parametrize("k1, k2", [((5, 20), (2, 4)), ((5, 20), (3, 3)), ((1, 2), (1, 0)), ((3, 200), (2, 1))])
def test_camera_aware_jaccard_equals_the_dense_definition(k1: tuple[int, int], k2: tuple[int, int]) -> None:
    rng = np.random.default_rng(11)
    rows = unit_rows(rng, 17, 7, 12, 0.6)
    # a camera with one crop, one with three, numbers other than 0..C-1
    cameras = rng.choice([4, -1, 90], len(rows))
    cameras[3], cameras[[9, 30, 31]] = 7, 12
    encoded = camera_encoding_of(rows, cameras, k1_intra=k1[0], k1_inter=k1[1], k2_intra=k2[0], k2_inter=k2[1])
    graph = jaccard_graph([encoded], [1.0], max_distance=0.7)
    assert graph.nnz > len(rows)
    assert_graph_is(graph, dense_camera_jaccard(rows, cameras, k1, k2))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_camera_aware_jaccard_of_a_single_camera(count: int) -> None:
    rows = unit_rows(np.random.default_rng(1), count, 1, 6, 0.0)
    cameras = np.full(count, 5)
    encoded = camera_encoding_of(rows, cameras, k1_intra=5, k1_inter=20, k2_intra=2, k2_inter=4)
    graph = jaccard_graph([encoded], [1.0], max_distance=0.7)
    assert_graph_is(graph, dense_camera_jaccard(rows, cameras, (5, 20), (2, 4)))


def test_neighbours_of_other_cameras_have_the_same_weight() -> None:
    """Crops with a common camera tint displace the others in plain lists, but not in camera-aware ones."""
    rng = np.random.default_rng(2)
    persons, cameras = np.repeat(np.arange(12), 24), np.tile(np.repeat([0, 1, 2], 8), 12)
    rows = rng.normal(size=(12, 24))[persons] + 1.2 * rng.normal(size=(3, 24))[cameras]
    rows = rows + 0.5 * rng.normal(size=rows.shape)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def across(encoded: ReciprocalEncoding) -> float:
        pairs = encoded.weights.tocoo()
        true = persons[pairs.row] == persons[pairs.col]
        return float(pairs.data[true & (cameras[pairs.row] != cameras[pairs.col])].sum() / len(rows))

    plain = across(encoding_of(rows, k1=30, k2=6))
    assert across(camera_encoding_of(rows, cameras, k1_intra=5, k1_inter=20, k2_intra=2, k2_inter=4)) > 1.3 * plain


def test_encodings_are_distributions() -> None:
    rows = unit_rows(np.random.default_rng(5), 20, 5, 16, 0.4)
    cameras = np.arange(100) % 3
    aware = camera_encoding_of(rows, cameras, k1_intra=5, k1_inter=20, k2_intra=2, k2_inter=4)
    for weights in (encoding_of(rows, k1=12, k2=4).weights, aware.weights):
        assert np.abs(np.asarray(weights.sum(1)).ravel() - 1).max() < 1e-5
        assert (weights.data > 0).all()
