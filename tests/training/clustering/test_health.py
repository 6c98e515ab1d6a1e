"""Label health against loops over crops, tracks and all orders of the cameras."""

from __future__ import annotations

import numpy as np
import pytest
from references_judge import camera_figures, chance_camera_figures, pair_counts, random_store, track_figures
from sklearn.metrics import normalized_mutual_info_score

from resight.training.clustering.health import camera_mix, epoch_health, stability, track_agreement
from resight.training.store.track_pairs import draw_track_pairs


@pytest.mark.parametrize("seed", range(10))
def test_cameras_per_cluster_and_chance_equal_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 3, 9)
    labels[:7] = rng.integers(0, 3, 7) * 5  # numbers with gaps
    cameras = rng.choice([-4, 0, 17], 9)
    found = camera_mix(labels, cameras)
    assert found is not None
    kept = np.flatnonzero(labels >= 0)[:7]  # all orders of 7 crops are 5,040
    assert (found.cameras_per_cluster, found.many_camera_share) == pytest.approx(camera_figures(labels, cameras))
    few = camera_mix(labels[kept], cameras[kept])
    assert few is not None
    expected = chance_camera_figures(labels[kept], cameras[kept])
    assert (few.chance_cameras_per_cluster, few.chance_many_camera_share) == pytest.approx(expected)


def test_one_camera_and_no_cluster() -> None:
    alone = camera_mix(np.array([0, 0, 1, 1, -1]), np.full(5, 3))
    assert alone is not None
    assert (alone.cameras_per_cluster, alone.chance_cameras_per_cluster) == (1, 1)
    assert (alone.many_camera_share, alone.chance_many_camera_share) == (0, pytest.approx(0, abs=1e-12))
    assert camera_mix(np.full(5, -1), np.zeros(5, np.int64)) is None


def test_chance_of_a_large_site_equals_shuffling() -> None:
    rng = np.random.default_rng(0)
    cameras = rng.choice(6, 3000, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    labels = rng.integers(-1, 400, 3000)
    found = camera_mix(labels, cameras)
    assert found is not None
    inliers = np.flatnonzero(labels >= 0)
    shuffled = [camera_figures(labels[inliers], rng.permutation(cameras[inliers])) for _ in range(30)]
    expected = np.mean(shuffled, axis=0)
    assert (found.chance_cameras_per_cluster, found.chance_many_camera_share) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 3, 50, 97])
def test_agreement_with_tracks_equals_the_loops(n: int, seed: int) -> None:
    store = random_store(n, seed)
    labels = np.random.default_rng(seed).integers(-1, 4, n) * 3
    labels[labels < 0] = -1
    found = track_agreement(labels, draw_track_pairs(store))
    expected = track_figures(store, labels)
    for name, value in expected.items():
        assert getattr(found, name) == (None if value is None else pytest.approx(value)), name


def test_one_cluster_keeps_tracks_and_confuses_pairs_and_outliers_do_the_reverse() -> None:
    store = random_store(90, 1)
    pairs = draw_track_pairs(store)
    one = track_agreement(np.zeros(90, np.int64), pairs)
    assert (one.majority_share, one.whole_share, one.confused_share) == (1, 1, 1)
    assert one.compared_pairs == pairs.overlaps > 0
    none = track_agreement(np.full(90, -1), pairs)
    assert (none.majority_share, none.whole_share, none.confused_share, none.compared_pairs) == (0, 0, None, 0)


@pytest.mark.parametrize("seed", range(8))
def test_stability_is_computed_on_crops_clustered_in_both(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, previous = rng.integers(-1, 5, 43), rng.integers(-1, 4, 43) * 7
    previous[previous < 0] = -1
    found = stability(labels, previous)
    assert found is not None
    assert found.ari == pytest.approx(pair_counts(labels, previous))
    both = (labels >= 0) & (previous >= 0)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(labels[both], previous[both]))
    moved = sum((one < 0) != (other < 0) for one, other in zip(labels, previous, strict=True))
    assert (found.moved_share, found.shared_crops) == (moved / 43, both.sum())


def test_equal_labels_are_stable_under_renumbering() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, -1])
    found = stability(labels, np.array([5, 5, 0, 0, 9, 9, -1]))
    assert found is not None and (found.ari, found.nmi, found.moved_share) == (1, pytest.approx(1), 0)
    assert stability(labels, np.full(7, -1)) is None
    assert stability(np.array([0, -1]), np.array([0, 0])) is None


def test_epoch_health_is_finite_and_omits_unavailable_metrics() -> None:
    rng = np.random.default_rng(0)
    labels, previous, cameras = rng.integers(-1, 9, 60), rng.integers(-1, 9, 60), rng.integers(0, 4, 60)
    first, later = epoch_health(labels, None, cameras), epoch_health(labels, previous, cameras)
    assert set(later) - set(first) == {"stability_ari", "stability_nmi", "moved_share"}
    assert {"cameras_per_cluster", "many_camera_share"} < set(first) < set(later)
    assert all(isinstance(value, float) and np.isfinite(value) for value in later.values())
    assert epoch_health(np.full(4, -1), np.full(4, -1), np.arange(4)) == {}
