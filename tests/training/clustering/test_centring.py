import numpy as np
import pytest

from resight.training.clustering.cluster import centre_cameras


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def site(counts: list[int], *, cast: float, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of unrelated people with a colour cast per camera."""
    rng = np.random.default_rng(seed)
    cameras = np.repeat(np.arange(len(counts)), counts)
    return unit(rng.normal(size=(len(cameras), dim)) + cast * rng.normal(size=(len(counts), dim))[cameras]), cameras


def test_the_mean_of_cameras_with_many_crops_is_subtracted() -> None:
    rows, cameras = site([700, 500, 900], cast=0.7)
    shuffled = np.random.default_rng(1).permutation(len(rows))
    rows, cameras = rows[shuffled], np.array([7, -2, 40])[cameras[shuffled]]
    found = centre_cameras(rows, cameras)
    for camera in (7, -2, 40):
        left = rows[cameras == camera] - rows[cameras == camera].mean(0)
        assert found[cameras == camera] == pytest.approx(unit(left), abs=0.01)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-6)


def test_shrinkage_equals_the_analysis_of_variance_estimate() -> None:
    rows, cameras = site([40, 11, 3, 1], cast=0.5)
    n, groups = np.bincount(cameras), 4
    mean = rows.astype(float).mean(0)
    means = [rows[cameras == c].astype(float).mean(0) for c in range(groups)]
    within = sum(float(((row - means[camera]) ** 2).sum()) for row, camera in zip(rows, cameras, strict=True))
    between = sum(count * float(((of - mean) ** 2).sum()) for count, of in zip(n, means, strict=True))
    noise = within / (len(rows) - groups)
    spread = (between - (groups - 1) * noise) / (len(rows) - (n**2).sum() / len(rows))
    found = centre_cameras(rows, cameras)
    for i, camera in enumerate(cameras):
        shrink = n[camera] / (n[camera] + noise / spread)
        assert found[i] == pytest.approx(unit(rows[i] - mean - shrink * (means[camera] - mean)), abs=1e-5)


def test_a_camera_with_few_crops_keeps_the_features_of_its_people() -> None:
    """A camera with three crops of one person: subtracting its mean would remove the person's features."""
    rng = np.random.default_rng(2)
    rows, cameras = site([300, 300], cast=0.5)
    person = rng.normal(size=32)
    near = unit(person + 0.2 * rng.normal(size=(6, 32)))
    rows, cameras = np.vstack([rows, near]), np.concatenate([cameras, [0, 0, 0, 2, 2, 2]])
    found = centre_cameras(rows, cameras)
    kept = (found[-3:] @ found[-6:-3].T).mean()
    bare = unit(near[3:] - near[3:].mean(0)) @ found[-6:-3].T
    assert kept > 0.85 > 0.3 > abs(bare.mean())


def test_cameras_without_differences_lose_only_the_global_mean() -> None:
    rows = unit(np.random.default_rng(5).normal(size=(64, 8)) + 1)
    rows = np.vstack([rows, rows])
    found = centre_cameras(rows, np.repeat([0, 1], 64))
    assert found == pytest.approx(unit(rows - rows.mean(0)), abs=1e-5)


@pytest.mark.parametrize("cameras", [[3], [0, 1], [0, 1, 2, 3], [5, 5, 5, 5]])
def test_few_crops_and_few_cameras_give_unit_rows(cameras: list[int]) -> None:
    rows = site([len(cameras)], cast=0)[0]
    found = centre_cameras(rows, np.array(cameras))
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-5)
    assert len(rows) > 1 or np.array_equal(found, rows)  # a single crop equals its mean and is unchanged
    same = np.repeat(rows[:1], 4, axis=0)
    assert np.array_equal(centre_cameras(same, np.array([0, 0, 1, 1])), same)
