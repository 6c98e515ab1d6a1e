"""AUC and true positive rates against loops; confidence intervals over tracks."""

from __future__ import annotations

import numpy as np
import pytest
from references_judge import auc, repeat_pairs, tpr_at_fpr

from resight.arrays import Floats
from resight.training.judging import separation
from resight.training.judging.separation import FALSE_SHARES, pair_similarities, separate
from resight.training.store.track_pairs import TrackPairs


def made_pairs(tracks: int, per_track: int, negatives: int, seed: int) -> TrackPairs:
    """Random pairs of tracks."""
    rng = np.random.default_rng(seed)
    n = 2 * per_track * tracks
    number = np.repeat(np.arange(tracks), 2 * per_track)
    positives = np.arange(n).reshape(-1, 2)
    one = rng.integers(0, tracks, negatives)
    other = (one + rng.integers(1, tracks, negatives)) % tracks
    rows = np.stack([one, other], 1) * 2 * per_track + rng.integers(0, 2 * per_track, (negatives, 2))
    return TrackPairs(number, positives, number[::2], rows, np.stack([one, other], 1), negatives)


def people_of(pairs: TrackPairs, *, spread: float, seed: int, steps: int = 0) -> Floats:
    """One direction per track, and noise; coordinates in ``steps`` coarse steps, so that similarities tie."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(pairs.track_count, 6))[pairs.tracks] + spread * rng.normal(size=(len(pairs.tracks), 6))
    if steps:
        rows = np.sign(rows)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("tracks", "negatives", "steps"), [(10, 101, 0), (13, 130, 2), (40, 1003, 2), (11, 3000, 0)])
def test_metrics_equal_the_loops(tracks: int, negatives: int, steps: int) -> None:
    pairs = made_pairs(tracks, 1, negatives, seed=tracks)
    features = people_of(pairs, spread=0.7, seed=1, steps=steps)
    positive = pair_similarities(features, pairs.positives).tolist()
    negative = pair_similarities(features, pairs.negatives).tolist()
    found = separate(features, pairs)
    assert found.figures["auc"].value == pytest.approx(auc(positive, negative), abs=1e-12)
    for share, thousandths in ((0.1, 100), (0.01, 10)):
        name = f"tpr_at_fpr_{share:g}"
        if negatives >= 10 / share:
            assert found.figures[name].value == pytest.approx(tpr_at_fpr(positive, negative, thousandths), abs=1e-12)
        else:
            assert found.missing[name] == f"{negatives} certain negative pairs: expected {round(10 / share)} or more"


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_resample_equals_the_metric_of_repeated_pairs(steps: int, seed: int) -> None:
    pairs = made_pairs(12, 2, 150, seed=seed)
    features = people_of(pairs, spread=0.8, seed=seed, steps=steps)
    positive, negative = pair_similarities(features, pairs.positives), pair_similarities(features, pairs.negatives)
    rng = np.random.default_rng(seed)
    ranked = separation.rank_pairs(positive, negative)
    heavy, light = rng.integers(0, 3, len(positive)), rng.integers(0, 3, len(negative))
    found = ranked.figures(heavy.astype(float), light.astype(float), FALSE_SHARES)
    more, other = repeat_pairs(positive.tolist(), heavy.tolist()), repeat_pairs(negative.tolist(), light.tolist())
    expected = [auc(more, other), *(tpr_at_fpr(more, other, thousandths) for thousandths in (100, 10, 1))]
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.isnan(ranked.figures(np.zeros(len(positive)), light.astype(float), FALSE_SHARES)).all()


def test_resampling_draws_tracks_not_pairs() -> None:
    pairs = made_pairs(15, 3, 60, seed=2)
    weights = list(separation._resamples(pairs, seed=5))
    again = list(separation._resamples(pairs, seed=5))
    assert len(weights) == separation.RESAMPLES
    for (own, two), (same, too) in zip(weights, again, strict=True):
        assert np.array_equal(own, same) and np.array_equal(two, too)
        times = np.zeros(15)
        times[pairs.positive_tracks] = own  # all pairs of a track have the same weight
        assert np.array_equal(times[pairs.positive_tracks], own) and times.sum() == 15
        assert np.array_equal(times[pairs.negative_tracks].prod(1), two)


def test_random_features_score_half_and_perfect_ones_1() -> None:
    pairs = made_pairs(60, 2, 1500, seed=3)
    chance = separate(people_of(pairs, spread=1e6, seed=1), pairs).figures["auc"]
    assert abs(chance.value - 0.5) < 0.06 and chance.low < 0.5 < chance.high
    perfect = separate(people_of(pairs, spread=1e-4, seed=1), pairs)
    assert [(figure.value, figure.low) for figure in perfect.figures.values()] == [(1, 1)] * 3
    same = separate(np.ones((len(pairs.tracks), 1), np.float32), pairs).figures
    assert (same["auc"].value, same["auc"].low, same["auc"].high) == (0.5, 0.5, 0.5)
    assert same["tpr_at_fpr_0.1"].value == 0  # no pair is above a threshold that equals all pairs


def test_intervals_shrink_with_more_tracks_not_with_more_pairs() -> None:
    def width(pairs: TrackPairs) -> float:
        figure = separate(people_of(pairs, spread=0.9, seed=4), pairs).figures["auc"]
        assert figure.low <= figure.value <= figure.high
        return figure.high - figure.low

    few, many = width(made_pairs(20, 1, 200, seed=1)), width(made_pairs(320, 1, 3200, seed=1))
    assert many < few / 2
    rich, poor = made_pairs(20, 8, 200, seed=1), made_pairs(20, 1, 200, seed=1)
    rng = np.random.default_rng(6)
    sides = rng.normal(size=(20, 1, 1, 6)) + 0.9 * rng.normal(size=(20, 1, 2, 6))
    rows = np.tile(sides, (1, 8, 1, 1)).reshape(-1, 6)  # the 8 pairs of a track are not independent
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    eightfold, single = (
        separate(rows, rich).figures["auc"],
        separate(rows.reshape(20, 16, 6)[:, :2].reshape(-1, 6), poor),
    )
    assert eightfold.high - eightfold.low > 0.7 * (single.figures["auc"].high - single.figures["auc"].low)


def test_intervals_have_their_nominal_coverage() -> None:
    """Many similar sites: the interval of each against the AUC of all."""
    each = []
    for seed in range(40):
        pairs = made_pairs(40, 2, 400, seed=seed)
        each.append(separate(people_of(pairs, spread=1.0, seed=1000 + seed), pairs, seed=seed).figures["auc"])
    truth = np.mean([figure.value for figure in each])
    held = sum(figure.low <= truth <= figure.high for figure in each)
    assert held >= 33  # 38 of 40 on average; fewer than 33 in one of a thousand runs


@pytest.mark.parametrize(
    ("tracks", "negatives", "reason"),
    [(0, 0, "the store has no tracks"), (9, 500, "9 of 9 tracks have two crops: expected 10 or more")],
)
def test_unmeasurable_metrics_are_missing_with_a_reason(tracks: int, negatives: int, reason: str) -> None:
    if tracks:
        pairs = made_pairs(tracks, 1, negatives, seed=1)
    else:
        none = np.empty((0, 2), np.int64)
        pairs = TrackPairs(np.full(5, -1), none, none[:, 0], none, none, 0)
    found = separate(np.ones((len(pairs.tracks), 1), np.float32), pairs)
    assert not found.figures and not found.resampled
    assert set(found.missing.values()) == {reason} and len(found.missing) == 4


def test_tracks_without_overlap_give_no_metric() -> None:
    pairs = made_pairs(30, 1, 200, seed=1)
    kept = (pairs.negative_tracks < 9).all(1)
    few = TrackPairs(
        pairs.tracks, pairs.positives, pairs.positive_tracks, pairs.negatives[kept], pairs.negative_tracks[kept], 9
    )
    found = separate(people_of(pairs, spread=1, seed=1), few)
    assert not found.figures
    assert found.missing["auc"] == "9 of 30 tracks overlap another one of their camera in time: expected 10 or more"
