"""Sample clusters: tightness against a loop, their selection, and crops that cannot be read."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import without_persons

from resight.training.report.montage import (
    ALL_CLUSTERS,
    CLUSTERS_SHOWN,
    CROPS_SHOWN,
    LOOSEST,
    MOST_CAMERAS,
    TIGHTEST,
    camera_counts,
    cluster_groups,
    tightness,
)
from resight.training.report.page import SHRINK_ABOVE_BYTES, THUMBNAIL_HEIGHT, Thumbnails
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def silhouette_by_loops(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    found = np.zeros(len(labels))
    for i, own in enumerate(labels):
        mates = [j for j in range(len(labels)) if labels[j] == own and j != i]
        others = sorted({int(label) for label in labels if label not in (-1, own)})
        if own < 0 or not mates or not others:
            continue
        x = features[i].astype(np.float64)
        a = 1 - x @ unit(features[mates].sum(0))
        b = min(1 - x @ unit(features[labels == other].sum(0)) for other in others)
        found[i] = (b - a) / max(a, b)
    return found


@pytest.mark.parametrize("seed, clusters", [(0, 7), (1, 2), (2, 1), (3, 40)])
def test_tightness_equals_loops(seed: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, clusters, 83)
    labels[labels == 3] = 4  # an unused label, if there are so many
    features = unit(rng.normal(size=(clusters, 19))[labels] + rng.normal(size=(83, 19)))
    held = tightness(features, labels)
    expected = silhouette_by_loops(features, labels)
    np.testing.assert_allclose(held.crops, expected, atol=1e-5)
    for label, mean in enumerate(held.clusters):
        members = expected[labels == label]
        assert np.isnan(mean) if not len(members) else mean == pytest.approx(members.mean(), abs=1e-5)


def test_without_clusters_tightness_is_zero() -> None:
    held = tightness(unit(np.ones((5, 3))), np.full(5, -1))
    assert held.crops.tolist() == [0] * 5 and len(held.clusters) == 0


def test_cameras_are_counted_and_weighted() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, -1, 2])
    cameras = np.array([5, 5, 9, 9, 5, 5, 9, 7])
    np.testing.assert_allclose(camera_counts(labels, cameras), [[2, 2], [1, 1], [1, 1]])


def site_features(store: CropStore, noise: float) -> np.ndarray:
    """Features of a good model, with more noise for persons of higher number."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(store.persons.max() + 1, 32))
    spread = noise * (1 + store.persons)[:, None]
    return unit(centres[store.persons] + spread * rng.normal(size=(len(store), 32)))


def test_groups_contain_the_tightest_loosest_and_most_seen_clusters(tiny_site: Site) -> None:
    store = tiny_site.train
    labels, features = store.persons - 1, site_features(store, 0.1)
    labels = np.where((labels == 5) & (store.cameras == 2), -1, labels)  # all but this one are seen by 3 cameras
    thumbnails = Thumbnails()
    best, worst, diverse = cluster_groups(store, labels, features, thumbnails)
    assert [group.title for group in (best, worst, diverse)] == [TIGHTEST.title, LOOSEST.title, MOST_CAMERAS.title]
    scores = tightness(features, labels).clusters
    assert [cluster.label for cluster in best.clusters] == np.argsort(-scores)[:CLUSTERS_SHOWN].tolist()
    assert [cluster.label for cluster in worst.clusters] == np.argsort(scores)[:CLUSTERS_SHOWN].tolist()
    assert all(cluster.cameras == 3 and cluster.label != 5 for cluster in diverse.clusters)
    for cluster in (*best.clusters, *worst.clusters, *diverse.clusters):
        rows = np.flatnonzero(labels == cluster.label)
        assert cluster.size == len(rows) and cluster.purity == 1.0 and len(cluster.crops) == CROPS_SHOWN
        assert {crop.image for crop in cluster.crops} <= {store.read(int(row)) for row in rows}
    shown = [crop.camera for crop in diverse.clusters[0].crops]
    assert shown == sorted(shown) and set(shown) == set(store.camera_names)
    assert thumbnails.notes == []


def test_few_or_no_clusters_are_handled(tiny_site: Site) -> None:
    store = without_persons(tiny_site.train)
    features = site_features(tiny_site.train, 0.1)
    few = np.where(tiny_site.train.persons <= 3, tiny_site.train.persons - 1, -1)
    [group] = cluster_groups(store, few, features, Thumbnails())
    assert group.title == ALL_CLUSTERS.title and len(group.clusters) == 3
    assert all(cluster.purity is None for cluster in group.clusters)
    assert cluster_groups(store, np.full(len(store), -1), features, Thumbnails()) == []


def test_one_camera_omits_the_camera_group(tiny_site: Site) -> None:
    store = tiny_site.train.subset(np.flatnonzero(tiny_site.train.cameras == 1))
    groups = cluster_groups(store, store.persons - 1, site_features(store, 0.1), Thumbnails())
    assert [group.title for group in groups] == [TIGHTEST.title, LOOSEST.title]


def test_damaged_crops_are_omitted_and_noted(tiny_site: Site, tmp_path: Path) -> None:
    shutil.copytree(tiny_site.root, tmp_path / "site")
    source = tiny_site.train
    store = CropStore(
        tmp_path / "site",
        source.paths,
        source.cameras,
        source.camera_names,
        source.times_s,
        source.tracks,
        source.persons,
    )
    (store.root / store.paths[0]).unlink()
    (store.root / store.paths[1]).write_bytes(b"no image")
    thumbnails = Thumbnails()
    found = thumbnails.crops(store, [0, 1, 2, 0])
    assert [crop.image for crop in found] == [store.read(2)]
    [note] = thumbnails.notes
    assert note.startswith("2 selected crops") and store.paths[0] in note


def test_large_crops_are_shrunk_and_keep_their_aspect_ratio(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1200, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    one = np.zeros(1, np.int64)
    store = CropStore(tmp_path, ("large.png",), one, ("door",), np.zeros(1), one - 1, one - 1)
    crop = Thumbnails().crop(store, 0)
    assert crop is not None and crop.camera == "door"
    assert len(crop.image) < 4 * SHRINK_ABOVE_BYTES < len(store.read(0))
    with Image.open(io.BytesIO(crop.image)) as image:
        assert image.format == "JPEG" and image.size == (round(500 * THUMBNAIL_HEIGHT / 1200), THUMBNAIL_HEIGHT)
