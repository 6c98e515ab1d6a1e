from dataclasses import replace

import numpy as np
import pytest
from reciprocal_encodings import camera_encoding_of, encoding_of
from references import dense_camera_jaccard, dense_jaccard, dense_silhouette
from scipy import sparse
from sklearn.cluster import DBSCAN

from resight.errors import TrainingError
from resight.neighbours.jaccard import jaccard_graph
from resight.training.clustering.cluster import (
    Clustering,
    ClusterSettings,
    centroids,
    choose_eps,
    cluster,
    silhouette,
)
from resight.training.clustering.dbscan import dbscan


def people(count: int, each: int, *, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.normal(size=(count, 16)), each, axis=0) + spread * rng.normal(size=(count * each, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), np.repeat(np.arange(count), each)


def graph_of(rows: np.ndarray, max_distance: float = 0.7):
    return jaccard_graph([encoding_of(rows, k1=12, k2=3)], [1.0], max_distance=max_distance)


@pytest.mark.parametrize("eps", [0.3, 0.4, 0.5, 0.6])
def test_sparse_labels_equal_those_of_the_dense_matrix(eps: float) -> None:
    rows, _ = people(15, 9, spread=0.45)
    dense = dense_jaccard(rows, 12, 3)
    expected = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(dense)
    assert np.array_equal(dbscan(graph_of(rows), eps, 4), expected)
    assert len(set(expected)) > 2


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_identical_to_scikit_learn_with_ties_and_border_crops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 90))
    distance = np.round(np.triu(rng.uniform(0, 1, (n, n)), 1) * 20).astype(np.float32) / np.float32(20)
    distance += distance.T
    i, j = np.nonzero((distance < 0.7) | np.eye(n, dtype=bool))
    graph = sparse.csr_matrix((distance[i, j], (i, j)), (n, n))
    for eps in (0.05, 0.1, 0.15, 0.3, 0.7):  # most are distances themselves
        for min_samples in (1, 2, 4, 8):
            expected = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(graph.copy())
            assert np.array_equal(dbscan(graph, eps, min_samples), expected)


def test_a_border_crop_joins_the_first_of_two_clusters_that_reach_it() -> None:
    # crops 1-4 and 5-8 are two cliques; crop 0 is near one crop of each, too few for a core
    distance = np.ones((9, 9), np.float32)
    distance[1:5, 1:5] = distance[5:9, 5:9] = 0.1
    distance[0, [5, 1]] = distance[[5, 1], 0] = 0.2
    np.fill_diagonal(distance, 0)
    labels = dbscan(sparse.csr_matrix(distance), 0.3, 4)
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("eps", [0.4, 0.5, 0.6])
def test_camera_aware_labels_equal_those_of_the_dense_matrix(eps: float) -> None:
    rows, _ = people(15, 9, spread=0.45)
    cameras = np.random.default_rng(3).integers(0, 3, len(rows))
    dense = dense_camera_jaccard(rows, cameras, (5, 20), (2, 4))
    expected = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(dense)
    encoded = camera_encoding_of(rows, cameras, k1_intra=5, k1_inter=20, k2_intra=2, k2_inter=4)
    assert np.array_equal(dbscan(jaccard_graph([encoded], [1.0], max_distance=0.7), eps, 4), expected)
    if eps == 0.5:
        found = cluster([rows], ClusterSettings(eps=eps, camera_aware=True), cameras=cameras)
        assert found.count > 2 and np.array_equal(found.labels, expected)


def test_camera_aware_neighbours_without_cameras_are_refused() -> None:
    with pytest.raises(TrainingError, match="need the camera of every crop"):
        cluster([people(5, 6, spread=0.2)[0]], ClusterSettings(camera_aware=True))


def test_dbscan_does_not_modify_the_graph() -> None:
    graph = graph_of(people(6, 8, spread=0.4)[0])
    before = (graph.data.copy(), graph.indices.copy())
    dbscan(graph, 0.5, 4)
    assert np.array_equal(graph.data, before[0]) and np.array_equal(graph.indices, before[1])


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.65])
def test_sparse_silhouette_equals_the_dense_definition(eps: float) -> None:
    rows, _ = people(12, 7, spread=0.5, seed=2)
    labels = dbscan(graph_of(rows), eps, 4)
    # Pairs that are not stored have distance 1, so the reference gets the same matrix.
    dense = np.ones((len(rows), len(rows)))
    coo = graph_of(rows).tocoo()
    dense[coo.row, coo.col] = coo.data
    assert silhouette(graph_of(rows), labels) == pytest.approx(dense_silhouette(dense, labels), abs=1e-6)


def test_the_chosen_eps_is_near_the_best_one_for_the_true_persons() -> None:
    from sklearn.metrics import adjusted_rand_score

    rows, persons = people(40, 10, spread=0.55, seed=4)
    graph = graph_of(rows)

    def agreement(labels: np.ndarray) -> float:
        outlier = labels < 0
        return float(adjusted_rand_score(persons, np.where(outlier, 10_000 + np.arange(len(labels)), labels)))

    best = max(agreement(dbscan(graph, eps, 4)) for eps in np.arange(0.3, 0.71, 0.05).round(2))
    assert agreement(choose_eps(graph, 4).labels) > best - 0.1


def test_weighted_views_give_the_true_persons() -> None:
    views = [people(20, 8, spread=spread, seed=seed)[0] for seed, spread in ((1, 0.2), (1, 0.3), (1, 0.3))]
    found = cluster(views, ClusterSettings(k1=12, k2=3))
    health = found.health(np.repeat(np.arange(20), 8))
    assert found.count == 20 and health["nmi"] == pytest.approx(1) and health["ari"] == pytest.approx(1)
    assert health["largest_share"] == pytest.approx(1 / 20) and health["outlier_share"] == 0


def test_no_cluster_is_refused() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with pytest.raises(TrainingError, match="no cluster among 30 crops"):
        cluster([rows], ClusterSettings(k1=4, k2=1, eps=0.05))


def test_one_giant_cluster_is_refused() -> None:
    rows, _ = people(1, 60, spread=0.05)
    with pytest.raises(TrainingError, match="fell into one cluster"):
        cluster([rows], ClusterSettings(k1=12, k2=3, eps=0.6))


def test_centroids_are_the_unit_means_of_their_members() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(11, 5)).astype(np.float32)
    labels = np.array([2, -1, 0, 1, 1, 0, -1, 2, 2, 0, 1])
    found = centroids(features, labels)
    for label in range(3):
        mean = features[labels == label].mean(0)
        assert found[label] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_health_without_persons_has_no_agreement_metrics() -> None:
    metrics = Clustering(np.array([0, 0, 1, -1]), 0.5, 0.2).health()
    assert metrics["clusters"] == 2 and metrics["outlier_share"] == 0.25 and "nmi" not in metrics


def test_a_collapsed_clustering_is_not_chosen_if_another_exists() -> None:
    near = people(30, 6, spread=0.9, seed=7)[0]
    chosen = choose_eps(graph_of(near), 4)
    valid = [eps for eps in (0.3, 0.4, 0.5, 0.6, 0.7) if not Clustering(dbscan(graph_of(near), eps, 4), eps).collapsed]
    assert valid and not chosen.collapsed
    assert Clustering(np.zeros(10, np.int64)).collapsed and Clustering(np.full(10, -1)).collapsed
    assert not Clustering(np.array([0, 0, 1, 1])).collapsed


def test_people_are_found_across_cameras_with_colour_casts() -> None:
    rows, persons = people(20, 12, spread=0.3, seed=9)
    cameras = np.tile(np.repeat([0, 1, 2], 4), 20)
    cast = 1.2 * np.random.default_rng(1).normal(size=(3, rows.shape[1])) / np.sqrt(rows.shape[1]) * 2
    seen = rows + cast[cameras]
    seen = (seen / np.linalg.norm(seen, axis=1, keepdims=True)).astype(np.float32)
    settings = ClusterSettings(k1=12, k2=3)
    plain = cluster([seen], settings, cameras=cameras).health(persons)
    centred = cluster([seen], replace(settings, centre_cameras=True), cameras=cameras).health(persons)
    assert centred["ari"] > plain["ari"] + 0.2 and centred["clusters"] == 20
