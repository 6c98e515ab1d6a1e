"""Searches among tracks against loops, and stores on which they cannot be measured."""

from __future__ import annotations

import numpy as np
import pytest
from references_judge import overlapping, people_features, people_store, tracks_of

from resight.arrays import Floats
from resight.metrics.open_set import OpenSetScore
from resight.training.judging.searches import search_tracks
from resight.training.store.crops import CropStore
from resight.training.store.track_pairs import draw_track_pairs


def looped(features: Floats, store: CropStore) -> OpenSetScore:
    """Search crops of each track's second half among the first halves of its own and of overlapping tracks."""
    tracks, rows = tracks_of(store), features.astype(np.float64)
    entry = {key: rows[crops[: len(crops) // 2]].sum(0) for key, crops in tracks.items() if len(crops) > 1}
    entry = {key: total / np.linalg.norm(total) for key, total in entry.items()}
    strangers = {
        key: [k for pair in overlapping(store) if key in pair for k in pair - {key} if k in entry] for key in entry
    }
    own, rank, best = [], [], []
    for key, others in strangers.items():
        crops = tracks[key]
        for crop in crops[len(crops) - len(crops) // 2 :] if others else ():
            met = [float(rows[crop] @ entry[other]) for other in others]
            own.append(float(rows[crop] @ entry[key]))
            rank.append(1 + sum(value >= own[-1] for value in met))
            best.append(max(met))
    return OpenSetScore(
        np.array(own, np.float32), np.array(rank), np.sort(np.array(best, np.float32))[::-1], (1, 1), (1, 1)
    )


@pytest.mark.parametrize("spread, crops", [(0.3, 5), (1.2, 4), (2.5, 7)])
def test_searches_follow_the_definition(spread: float, crops: int) -> None:
    store = people_store(persons=30, cameras=3, crops=crops)
    features = people_features(store, spread=spread)
    found, slow = search_tracks(features, draw_track_pairs(store)), looped(features, store)
    assert len(slow.own if hasattr(slow, "own") else slow.mated_similarity) >= 100
    for name, target in (("tpir_at_fpir_0.1", 0.1), ("tpir_at_fpir_0.01", 0.01)):
        if name in found.missing:
            assert "searches: expected" in found.missing[name]
            continue
        [expected] = slow.at_fpir(target, (1,)).tpir
        estimate = found.figures[name]
        assert estimate.value == pytest.approx(expected, abs=1e-6)
        assert estimate.low <= estimate.value <= estimate.high
        assert len(found.resampled[name]) == 1000


def test_equal_features_give_no_true_positive() -> None:
    store = people_store(persons=30, cameras=3, crops=4)
    same = np.tile(people_features(store, spread=1)[:1], (len(store), 1))
    assert search_tracks(same, draw_track_pairs(store)).figures["tpir_at_fpir_0.1"].value == 0


def test_too_few_tracks_give_a_reason_and_no_metric() -> None:
    store = people_store(persons=4, cameras=1, crops=4)
    found = search_tracks(people_features(store, spread=1), draw_track_pairs(store))
    assert not found.figures and set(found.missing) == {"tpir_at_fpir_0.1", "tpir_at_fpir_0.01"}
    assert "4 tracks with several crops overlap" in found.missing["tpir_at_fpir_0.1"]
