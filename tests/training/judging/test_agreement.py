"""Agreement with pairs that operators confirmed or rejected, from the links file to the metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from references_judge import auc, people_features, people_store

from resight.training.judging.agreement import (
    LinkedCrops,
    link_agreement,
    linked_crops,
    wilson_interval,
    youden_threshold,
)
from resight.training.judging.separation import pair_similarities
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site
from resight.training.store.links import write_links
from resight.training.store.track_pairs import draw_track_pairs


def linked(store: CropStore, count: int, seed: int = 0) -> LinkedCrops:
    rng = np.random.default_rng(seed)
    rows = np.unique(np.sort(rng.integers(len(store), size=(4000, 2)), axis=1), axis=0)
    rows = rows[rows[:, 0] != rows[:, 1]]
    same = store.persons[rows[:, 0]] == store.persons[rows[:, 1]]
    kept = np.concatenate([np.flatnonzero(same)[:count], np.flatnonzero(~same)[: 2 * count]])
    return LinkedCrops(store, rows[kept], same[kept])


def test_metrics_equal_a_loop() -> None:
    store = people_store(persons=20, cameras=2, crops=4)
    features, links = people_features(store, spread=1.3), linked(store, 30)
    found = link_agreement(features, links, 0.4)
    values = [float(features[one] @ features[other]) for one, other in links.rows]
    positive = [value for value, same in zip(values, links.same, strict=True) if same]
    negative = [value for value, same in zip(values, links.same, strict=True) if not same]
    right = sum(value >= 0.4 for value in positive) + sum(value < 0.4 for value in negative)
    assert found.figures["auc"].value == pytest.approx(auc(positive, negative))
    assert found.figures["accuracy"].value == pytest.approx(right / 90)
    for estimate in found.figures.values():
        assert 0 < estimate.low < estimate.value < estimate.high < 1


def test_the_threshold_separates_certain_pairs_best() -> None:
    store = people_store(persons=20, cameras=2, crops=4)
    features, pairs = people_features(store, spread=1.3), draw_track_pairs(store)
    threshold = youden_threshold(features, pairs)
    positive, negative = (pair_similarities(features, rows) for rows in (pairs.positives, pairs.negatives))

    def even(at: float) -> float:
        return float((positive >= at).mean() + (negative < at).mean())

    assert threshold is not None
    assert even(threshold) == pytest.approx(max(even(at) for at in (*positive, *negative)))


def test_the_interval_does_not_vanish_at_a_share_of_1() -> None:
    sure = wilson_interval(20, 20)
    assert (
        sure.value == 1 and sure.low == pytest.approx(0.8389, abs=1e-4) and sure.high == 1
    )  # R: prop.test, no correction
    assert wilson_interval(0, 20).high == pytest.approx(1 - sure.low)


def test_missing_metrics_have_a_reason() -> None:
    store = people_store(persons=20, cameras=2, crops=4)
    features, links = people_features(store, spread=1.0), linked(store, 30)
    confirmed = LinkedCrops(store, links.rows[links.same], links.same[links.same])
    found = link_agreement(features, confirmed, 0.4)
    assert set(found.figures) == {"accuracy"} and found.missing["auc"].startswith("30 confirmed and 0 rejected")
    assert set(link_agreement(features, links, None).missing) == {"accuracy"}
    few = LinkedCrops(store, links.rows[:4], links.same[:4])
    assert not link_agreement(features, few, 0.4).figures


def test_links_are_read_from_any_split_without_damaged_crops(tiny_site: Site, tmp_path: Path) -> None:
    root = tmp_path / "site"
    store = tiny_site.train.subset(np.arange(40))
    for path in store.paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((tiny_site.root / path).read_bytes())
    here = CropStore(root, store.paths, store.cameras, store.camera_names, store.times_s, store.tracks, store.persons)
    assert linked_crops(here) is None
    (root / store.paths[9]).write_bytes(b"no image")
    write_links(root, [(store.paths[1], store.paths[5], True), (store.paths[5], store.paths[30], False),
                       (store.paths[9], store.paths[2], True), (store.paths[2], "gone.jpg", True)])  # fmt: skip
    found = linked_crops(here)
    assert found is not None and found.store.paths == tuple(store.paths[row] for row in (1, 5, 30))
    assert found.rows.tolist() == [[0, 1], [1, 2]] and found.same.tolist() == [True, False]
