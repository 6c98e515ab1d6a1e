import numpy as np
import pytest

from resight.training.adaptation.objective import split_by_camera


@pytest.mark.parametrize("seed, cameras", [(0, [0, 1, 2]), (1, [7, 100, -3]), (2, [5])])
def test_a_proxy_is_a_cluster_seen_by_a_camera(seed: int, cameras: list[int]) -> None:
    rng = np.random.default_rng(seed)
    labels, seen = rng.integers(-1, 6, 80), rng.choice(cameras, 80)
    proxies = split_by_camera(labels, seen)
    pairs = sorted({(int(a), int(b)) for a, b in zip(labels, seen, strict=True) if a >= 0})
    numbered = {camera: i for i, camera in enumerate(sorted({camera for _, camera in pairs}))}
    assert len(proxies) == len(pairs)
    for row in range(80):
        if labels[row] < 0:
            assert proxies.labels[row] == -1
        else:
            assert pairs[proxies.labels[row]] == (labels[row], seen[row])
    assert proxies.clusters.tolist() == [cluster for cluster, _ in pairs]
    assert proxies.cameras.tolist() == [numbered[camera] for _, camera in pairs]


def test_a_camera_without_a_clustered_crop_has_no_number() -> None:
    proxies = split_by_camera(np.array([0, 0, -1, 1]), np.array([4, 9, 6, 9]))
    assert proxies.cameras.tolist() == [0, 1, 1] and proxies.labels.tolist() == [0, 1, -1, 2]


def test_only_outliers_have_no_proxy() -> None:
    assert len(split_by_camera(np.full(3, -1), np.zeros(3, np.int64))) == 0
