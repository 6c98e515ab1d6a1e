import itertools

import numpy as np
import pytest

from resight.errors import TrainingError
from resight.training.adaptation.batches import (
    balanced_batches,
    camera_batches,
    proxy_batches,
    shuffled_batches,
)


def draw(
    labels: np.ndarray, cameras: np.ndarray, *, batch: int, instances: int, count: int, seed: int = 0
) -> list[np.ndarray]:
    batches = camera_batches(labels, cameras, batch=batch, instances=instances, rng=np.random.default_rng(seed))
    return list(itertools.islice(batches, count))


def test_batches_hold_blocks_of_one_cluster_and_never_an_outlier() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 10, 200)
    cameras = rng.integers(0, 3, 200)
    for rows in draw(labels, cameras, batch=32, instances=8, count=20):
        blocks = labels[rows].reshape(4, 8)
        assert (blocks == blocks[:, :1]).all() and (blocks >= 0).all()


def test_partners_come_from_other_cameras_if_there_are_any() -> None:
    labels = np.repeat([0, 1], 12)
    cameras = np.concatenate([np.repeat([0, 1, 2], 4), np.full(12, 5)])
    for rows in draw(labels, cameras, batch=8, instances=4, count=30):
        for block in rows.reshape(2, 4):
            if labels[block[0]] == 0:
                assert (cameras[block[1:]] != cameras[block[0]]).all()
            else:  # one camera only: partners are other crops of it
                assert block[0] not in block[1:]


def test_partners_repeat_only_if_there_are_too_few() -> None:
    labels, cameras = np.zeros(6, np.int64), np.array([0, 0, 0, 1, 1, 1])
    for rows in draw(labels, cameras, batch=4, instances=4, count=20):
        assert len(set(rows[1:])) == 3
    for rows in draw(labels, cameras, batch=6, instances=6, count=20):
        assert set(rows[1:]) <= set(np.flatnonzero(cameras != cameras[rows[0]]))


def test_a_cluster_of_one_crop_yields_it_once_per_pass() -> None:
    labels, cameras = np.array([0, 0, 0, 1]), np.zeros(4, np.int64)
    rows = np.concatenate(draw(labels, cameras, batch=4, instances=3, count=30))
    single = rows == 3
    assert 0.2 < single.mean() < 0.3  # one in four drawn crops: 3 of cluster 0 and 1 of cluster 1 per pass
    assert not (single[1:] & single[:-1]).any() or len(set(labels)) == 2


def test_fewer_clusters_than_a_batch_holds_still_fill_it() -> None:
    labels, cameras = np.repeat([0, 1], 5), np.tile([0, 1], 5)
    for rows in draw(labels, cameras, batch=64, instances=8, count=3):
        assert len(rows) == 64 and set(labels[rows]) == {0, 1}


def test_every_pass_visits_every_cluster_once() -> None:
    labels, cameras = np.repeat(np.arange(8), 4), np.tile([0, 1, 2, 3], 8)
    for rows in draw(labels, cameras, batch=32, instances=4, count=5):
        assert sorted(labels[rows].reshape(8, 4)[:, 0]) == list(range(8))


def test_camera_ids_are_arbitrary_and_batches_depend_only_on_the_seed() -> None:
    labels, cameras = np.repeat(np.arange(4), 6), np.tile([7, 100, -3], 8)
    first = draw(labels, cameras, batch=16, instances=4, count=4, seed=5)
    again = draw(labels, cameras, batch=16, instances=4, count=4, seed=5)
    other = draw(labels, cameras, batch=16, instances=4, count=4, seed=6)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_only_outliers_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no crop has a label"):
        draw(np.full(5, -1), np.zeros(5, np.int64), batch=4, instances=2, count=1)


def test_balanced_batches_are_spread_evenly_over_a_clusters_cameras() -> None:
    rng = np.random.default_rng(3)
    labels, cameras = rng.integers(-1, 6, 150), 10 * rng.integers(0, 4, 150)
    batches = balanced_batches(labels, cameras, batch=16, instances=8, rng=np.random.default_rng(1))
    for rows in itertools.islice(batches, 20):
        for block in rows.reshape(2, 8):
            (label,) = set(labels[block])
            members = np.flatnonzero(labels == label)
            assert len(set(block)) == min(8, len(members))
            held = {camera: int((cameras[members] == camera).sum()) for camera in set(cameras[members])}
            drawn = {camera: int((cameras[block] == camera).sum()) for camera in held}
            most = max(drawn.values())
            assert all(count >= min(most - 1, held[camera]) for camera, count in drawn.items())


def test_a_small_cluster_repeats_in_a_balanced_batch_and_a_singleton_fills_its_block() -> None:
    labels, cameras = np.array([0, 0, 0, 1]), np.array([5, 5, 9, 9])
    rows = next(balanced_batches(labels, cameras, batch=16, instances=8, rng=np.random.default_rng(0)))
    blocks = {int(labels[block[0]]): np.bincount(block, minlength=4) for block in rows.reshape(2, 8)}
    assert sorted(blocks[0][:3]) == [2, 3, 3] and blocks[1].tolist() == [0, 0, 0, 8]


def test_proxy_batches_visit_every_proxy_with_equal_shares() -> None:
    labels = np.repeat(np.arange(6), [1, 2, 3, 4, 9, 30])
    drawn = list(itertools.islice(proxy_batches(labels, batch=24, instances=4, rng=np.random.default_rng(0)), 30))
    for rows in drawn:  # 24 = 6 proxies x 4: a batch is a pass
        assert np.bincount(labels[rows]).tolist() == [4] * 6
        for label in (3, 4, 5):
            assert len(set(rows[labels[rows] == label])) == 4  # enough crops: no repeats
    pairs = np.concatenate([rows[labels[rows] == 1] for rows in drawn]).reshape(30, 4)
    assert len({tuple(sorted(block)) for block in pairs.tolist()}) > 1  # a shuffled list cut short may miss one


def test_shuffled_batches_are_passes_without_repeats() -> None:
    batches = list(itertools.islice(shuffled_batches(23, batch=5, rng=np.random.default_rng(0)), 8))
    for start in (0, 4):
        rows = np.concatenate(batches[start : start + 4])
        assert len(set(rows)) == 20 and rows.max() < 23
    with pytest.raises(TrainingError, match="3 crops do not fill a batch of 5"):
        next(shuffled_batches(3, batch=5, rng=np.random.default_rng(0)))
