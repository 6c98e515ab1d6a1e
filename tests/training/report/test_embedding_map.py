"""The map: selection of crops, projection, drawing, and contrast of the colours."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawings import marks, theme_colours, titled_groups
from tiny import without_persons

import resight.training.report.adaptation
from resight.training.report.embedding_map import (
    LABELLED_GROUPS,
    MIN_CROPS,
    EmbeddingMap,
    camera_affinity,
    choose_rows,
    map_features,
    map_panels,
    project,
)
from resight.training.store.datasets import Site


def groups(count: int, each: int, *, dim: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of well-separated groups, and the group of each."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), each)
    features = rng.normal(size=(count, dim))[owner] + 0.1 * rng.normal(size=(count * each, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), owner


def test_small_stores_are_shown_completely() -> None:
    assert choose_rows(np.array([0, -1, 1]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_selected_clusters_are_whole_and_of_all_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 60, 150)
    labels = np.concatenate([np.repeat(np.arange(150), sizes), np.full(900, -1)])
    rng.shuffle(labels)
    rows = choose_rows(labels, 500)
    assert len(rows) <= 500 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, choose_rows(labels, 500))
    shown, counts = np.unique(labels[rows], return_counts=True)
    assert counts[0] == round(500 * 900 / len(labels)) and shown[0] == -1
    assert np.array_equal(counts[1:], sizes[shown[1:]])  # whole
    assert {sizes.max(), sizes.min()} <= set(counts[1:].tolist())
    assert len(rows) > 400


def test_one_giant_cluster_is_subsampled() -> None:
    labels = np.zeros(5000, np.int64)
    labels[:1000] = -1
    rows = choose_rows(labels, 200)
    assert 190 <= len(rows) <= 200 and (labels[rows] == -1).sum() == 40
    assert len(choose_rows(np.full(5000, -1), 200)) == 200


def test_the_map_keeps_neighbours_and_is_deterministic() -> None:
    features, owner = groups(6, 20)
    places = project(features)
    assert places.dtype == np.float32 and places.shape == (120, 2)
    assert places.min() == 0 and places[:, 0].max() == 1 and places[:, 1].max() <= 1
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distance, 9)
    assert (owner[distance.argmin(1)] == owner).mean() > 0.95
    assert np.array_equal(places, project(features))


@pytest.mark.parametrize("count, dim", [(MIN_CROPS, 1), (MIN_CROPS, 3), (31, 2), (12, 200)])
def test_unusual_sizes_are_projected(count: int, dim: int) -> None:
    features, _ = groups(count, 1, dim=dim)
    if dim == 1:
        features = np.where(np.arange(count)[:, None] % 2, 1, -1).astype(np.float32)
    places = project(features)
    assert places.shape == (count, 2) and np.isfinite(places).all()


def test_too_few_or_equal_features_give_no_map(tiny_site: Site) -> None:
    store = without_persons(tiny_site.train)
    same = np.tile(np.eye(1, 8, dtype=np.float32), (len(store), 1))
    assert map_features(store, np.zeros(len(store), np.int64), same) is None
    few = store.subset(range(MIN_CROPS - 1))
    assert map_features(few, np.zeros(MIN_CROPS - 1, np.int64), groups(MIN_CROPS - 1, 1)[0]) is None


def test_camera_affinity_detects_bias() -> None:
    features, owner = groups(8, 30)
    rng = np.random.default_rng(2)
    biased = camera_affinity(features, owner % 4)  # each group is from one camera
    mixed = camera_affinity(features, rng.integers(0, 4, len(owner)))
    assert biased is not None and mixed is not None
    assert biased[0] > 0.99 and mixed[0] == pytest.approx(mixed[1], abs=0.05)
    assert camera_affinity(features, np.zeros(len(owner), np.int64)) is None


def shown(clusters: np.ndarray, cameras: np.ndarray, names: list[str]) -> EmbeddingMap:
    places = np.random.default_rng(0).random((len(clusters), 2)).astype(np.float32)
    return EmbeddingMap(places, clusters, cameras, names, len(clusters), 0.4, 0.2)


def test_every_crop_is_marked_once_in_each_panel() -> None:
    rng = np.random.default_rng(0)
    clusters, cameras = rng.integers(-1, 30, 700), rng.integers(0, 3, 700)
    by_cluster, by_camera = map_panels(shown(clusters, cameras, ["<a>", "b", "c"]))
    found = marks(by_cluster.svg)
    outliers, sizes = int((clusters == -1).sum()), np.bincount(clusters[clusters >= 0])
    assert found[f"outliers, {outliers} crops"] == outliers
    assert sum(found.values()) == 700
    looks = [(colour, shape) for colour, shape, _ in by_cluster.legend]
    assert len(set(looks)) == len(looks) == LABELLED_GROUPS + 2
    assert found[f"cluster {sizes.argmax()}, {sizes.max()} crops"] == sizes.max()
    counts = np.bincount(cameras)
    assert marks(by_camera.svg) == {
        f"{name}, {count} crops": count for name, count in zip(["<a>", "b", "c"], counts, strict=True)
    }
    assert [theme_colours(group) for group in titled_groups(by_camera.svg).values()] == [{"s0"}, {"s1"}, {"s2"}]
    assert by_camera.legend[0][2] == f"<a> ({counts[0]})" and "<a>" not in by_camera.svg
    assert "40%" in by_camera.hint


def test_a_map_of_one_camera_or_only_outliers_is_drawn() -> None:
    alone = shown(np.full(20, -1), np.zeros(20, np.int64), ["door"])
    [panel] = map_panels(replace(alone, own_camera=None, own_camera_chance=None))
    assert marks(panel.svg) == {"outliers, 20 crops": 20}


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in bytes_of(colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def bytes_of(colour: str) -> list[float]:
    return [value / 255 for value in bytes.fromhex(colour)]


def test_marks_have_enough_contrast_in_light_and_dark() -> None:
    style = Path(resight.training.report.adaptation.__file__).with_name("page.css.j2").read_text()
    blocks = re.findall(r":root \{(.*?)\n *\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): #(\w{6});", block))
        card = luminance(colours["card"])
        assert len([name for name in colours if re.fullmatch(r"s\d", name)]) == 8
        for name in (*(f"s{i}" for i in range(8)), "bar", "right", "wrong", "soft"):
            high, low = sorted((luminance(colours[name]), card), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, name  # WCAG 1.4.11, graphical objects
