"""Calibration without labels: clusters assigned by tracks, the fitted line, thresholds, and rejected inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from drawings import titled_groups

from resight.arrays import Doubles, Floats
from resight.calibration import Calibration
from resight.encoder.weights import load_weights
from resight.training.calibration.fit import (
    FALSE_REJECT_SHARE,
    FOLDS,
    MIN_CERTAIN,
    MIN_CLUSTERS,
    LogisticFit,
    SearchPairs,
    _accept_threshold,
    _cross_validated,
    _reject_threshold,
    calibrate,
    draw_search_pairs,
    fit_line,
    label_by_track,
)
from resight.training.calibration.reliability import BINS, Reliability, ReliabilityCurve, measure_reliability
from resight.training.features.extract import embed_store, encoder_embedding
from resight.training.report.export import draw_reliability
from resight.training.store.crops import CropStore
from resight.training.store.datasets import open_site
from resight.training.store.track_pairs import draw_track_pairs

pytestmark = pytest.mark.long

CAMERAS, CROPS = 3, 4


def made_site(persons: int, *, noise: float, seed: int, cameras: int = CAMERAS) -> tuple[Floats, CropStore]:
    """Each person has one track per camera with several crops; camera, track and crop each add noise."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(1, persons + 1), cameras * CROPS)
    camera = np.tile(np.repeat(np.arange(cameras), CROPS), persons)
    track = np.repeat(np.arange(persons * cameras), CROPS)
    size = 64
    rows = rng.normal(size=(persons + 1, size))[who]
    rows = (
        rows + 0.5 * rng.normal(size=(cameras, size))[camera] + noise * rng.normal(size=(track.max() + 1, size))[track]
    )
    rows = rows + noise * rng.normal(size=rows.shape)
    features = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    times = rng.uniform(0, 500, track.max() + 1)[track] + np.tile(np.arange(CROPS), persons * cameras)
    names = tuple(f"{row}.jpg" for row in range(len(who)))
    return features, CropStore(Path(), names, camera, tuple(f"c{c}" for c in range(cameras)), times, track, who)


def truth(features: Floats, store: CropStore) -> tuple[Floats, Floats]:
    """Similarities of all pairs across cameras: of one person, and of two."""
    one, other = np.triu_indices(len(store), 1)
    across = store.cameras[one] != store.cameras[other]
    same = store.persons[one] == store.persons[other]
    found = np.einsum("pd,pd->p", features[one], features[other])
    return found[across & same], found[across & ~same]


def even_error(calibration: Calibration, positive: Floats, negative: Floats) -> float:
    """Expected calibration error with equal weight on both kinds, by a loop over bins."""
    probabilities = [calibration.probability(part) for part in (positive, negative)]
    error = 0.0
    for b in range(BINS):
        inside = [(p >= b / BINS) & ((p < (b + 1) / BINS) | (b == BINS - 1)) for p in probabilities]
        found = inside[0].sum() / len(positive) / 2
        promised = sum(p[i].sum() / len(p) / 2 for p, i in zip(probabilities, inside, strict=True))
        error += abs(found - promised)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_a_crop_gets_the_cluster_of_the_other_crops_of_its_track(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tracks, labels = rng.integers(-1, 12, 80), rng.integers(-1, 4, 80)
    found = label_by_track(labels, tracks)
    for row in range(80):
        others = [int(labels[o]) for o in range(80) if o != row and tracks[o] == tracks[row] >= 0 and labels[o] >= 0]
        counts = Counter(others)
        expected = min(counts, key=lambda label: (-counts[label], label)) if counts else -1
        assert found[row] == expected, row


def test_no_crop_gets_a_cluster_without_clusters_or_tracks() -> None:
    nothing, some = np.full(6, -1), np.arange(6) % 2
    assert (label_by_track(nothing, some) == -1).all() and (label_by_track(some, nothing) == -1).all()


@pytest.mark.parametrize("tracked", [True, False])
def test_pairs_are_across_cameras_and_respect_clusters(tracked: bool) -> None:
    _, store = made_site(9, noise=0.1, seed=0)
    if not tracked:
        store = replace(store, tracks=np.full(len(store), -1))
    labels = np.where(np.random.default_rng(1).random(len(store)) < 0.3, -1, store.persons // 2)
    drawn = draw_search_pairs(store, labels, seed=3)
    assigned = label_by_track(labels, store.tracks) if tracked else labels
    assert drawn.by_track == tracked and drawn.clusters == len(set(assigned[assigned >= 0].tolist()))
    expected = {
        (i, j)
        for i in range(len(store))
        for j in range(i + 1, len(store))
        if assigned[i] == assigned[j] >= 0 and store.cameras[i] != store.cameras[j]
    }
    found = [tuple(sorted(map(int, pair))) for pair in drawn.positives]
    assert len(found) == len(set(found)) and set(found) == expected  # few enough for all to be drawn
    strangers = {
        (i, j)
        for i in range(len(store))
        for j in range(i + 1, len(store))
        if store.cameras[i] != store.cameras[j]
        and not labels[i] == labels[j] >= 0
        and not assigned[i] == assigned[j] >= 0
    }
    assert {tuple(map(int, pair)) for pair in drawn.negatives} == strangers
    assert np.array_equal(drawn.positives, draw_search_pairs(store, labels, seed=3).positives)


def test_units_keep_crops_of_one_person_together() -> None:
    _, store = made_site(3, noise=0.1, seed=0)
    labels = np.where(store.tracks % 3 == 2, -1, store.persons)  # one track of each person is in no cluster
    units = draw_search_pairs(replace(store, tracks=np.where(store.cameras == 1, -1, store.tracks)), labels).units
    clustered = labels >= 0
    for row in range(len(store)):
        same = (labels == labels[row]) if clustered[row] else (~clustered & (store.tracks == store.tracks[row]))
        assert (units == units[row]).tolist() == same.tolist()


@pytest.mark.parametrize(
    ("counts", "flatter"), [((20_000, 20_000), 0.15), ((20_000, 3000), 0.15), ((300, 20_000), 0.4)]
)
def test_the_logistic_line_of_two_gaussians_is_recovered(counts: tuple[int, int], flatter: float) -> None:
    """Its midpoint is between the means, for any number of each kind; few pairs do not make it steeper."""
    rng = np.random.default_rng(0)
    line = fit_line(rng.normal(0.7, 0.1, counts[0]), rng.normal(0.2, 0.1, counts[1]))
    assert line is not None
    assert line.midpoint == pytest.approx(0.45, abs=0.02)
    truth = 0.5 / 0.1**2
    assert (1 - flatter) * truth < line.slope < 1.1 * truth


def loss(line: LogisticFit, positive: list[float], negative: list[float]) -> float:
    """Cross entropy with Platt's targets, by a loop."""
    total = 0.0
    for part, target in ((positive, (len(positive) + 1) / (len(positive) + 2)), (negative, 1 / (len(negative) + 2))):
        for similarity in part:
            p = float(line.probability(np.array(similarity)))
            total -= (target * np.log(p) + (1 - target) * np.log(1 - p)) / len(part) / 2
    return total


@pytest.mark.parametrize("apart", [0.1, 0.6, 1.6])  # overlapping, and fully separated
def test_the_fit_is_a_minimum_of_the_loss(apart: float) -> None:
    rng = np.random.default_rng(1)
    positive, negative = apart / 2 + 0.05 * rng.normal(size=60), -apart / 2 + 0.05 * rng.normal(size=90)
    line = fit_line(positive, negative)
    assert line is not None
    best = loss(line, positive.tolist(), negative.tolist())
    for shift, factor in ((0.01, 1.0), (-0.01, 1.0), (0.0, 1.05), (0.0, 0.95)):
        other = LogisticFit(line.midpoint + shift, line.slope * factor)
        assert loss(other, positive.tolist(), negative.tolist()) > best


def test_there_is_no_fit_if_similarity_is_uninformative() -> None:
    same = np.full(50, 0.97)
    assert fit_line(same, same) is None
    rng = np.random.default_rng(0)
    assert fit_line(rng.normal(0.2, 0.1, 99), rng.normal(0.7, 0.1, 99)) is None  # the wrong way round


@pytest.mark.parametrize("count", [1000, 9999, 10_000, 12_345])
def test_thresholds_are_quantiles(count: int) -> None:
    rng = np.random.default_rng(count)
    similarity = np.round(rng.normal(0.3, 0.1, count), 3).astype(np.float32).astype(np.float64)  # many ties
    accept, share = _accept_threshold(similarity)
    assert share == (0.001 if count >= 10_000 else 0.01)
    assert sum(s >= accept for s in similarity) <= share * count
    lower = max(s for s in similarity if s < accept)
    assert sum(s >= lower for s in similarity) > share * count  # a lower one accepts too many
    reject = _reject_threshold(similarity)
    assert sum(s < reject for s in similarity) <= FALSE_REJECT_SHARE * count
    higher = min(s for s in similarity if s > reject)
    assert sum(s < higher for s in similarity) > FALSE_REJECT_SHARE * count


def test_cross_validation_excludes_the_persons_of_a_pair() -> None:
    rng = np.random.default_rng(0)
    units = np.arange(40) // 2
    positives = np.arange(40).reshape(-1, 2)
    negatives = np.array([(i, j) for i in range(40) for j in range(i + 1, 40) if units[i] != units[j]])
    drawn = SearchPairs(positives, negatives, units, 20, True)
    positive, negative = rng.normal(0.6, 0.2, len(positives)), rng.normal(0.2, 0.2, len(negatives))
    found = _cross_validated(positive, negative, drawn, seed=4)
    fold = np.random.default_rng(4).permutation(20) % FOLDS
    for kind, (rows, similarity) in enumerate(((positives, positive), (negatives, negative))):
        for number in range(0, len(rows), 7):
            held = fold[units[rows[number, 0]]]
            line = fit_line(
                np.array([s for s, (i, j) in zip(positive, positives, strict=True) if held not in fold[units[[i, j]]]]),
                np.array([s for s, (i, j) in zip(negative, negatives, strict=True) if held not in fold[units[[i, j]]]]),
            )
            assert line is not None
            assert found[kind][number] == pytest.approx(float(line.probability(similarity[number])), rel=1e-9)


def reliability_of(seed: int) -> tuple[tuple[Doubles, Doubles], ReliabilityCurve]:
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(4, 1.5, 400), rng.beta(1, 4, 900) * 0.7
    units = np.repeat(np.arange(40), 10)[:, None].repeat(2, 1).astype(np.int64), rng.integers(0, 40, (900, 2))
    curve = measure_reliability(probabilities, probabilities, units, seed=1).curve
    assert curve is not None
    return probabilities, curve


def test_reliability_equals_the_loops() -> None:
    probabilities, curve = reliability_of(0)
    error = brier = 0.0
    for b in range(BINS):
        one = [p for p in probabilities[0] if int(p * BINS) == b]
        two = [p for p in probabilities[1] if int(p * BINS) == b]
        weight = len(one) / 400 + len(two) / 900
        assert (curve.positives[b], curve.negatives[b]) == (len(one), len(two))
        if not weight:
            assert np.isnan(curve.predicted[b]) and np.isnan(curve.observed[b])
            continue
        promised, found = (sum(one) / 400 + sum(two) / 900) / weight, len(one) / 400 / weight
        assert (curve.predicted[b], curve.observed[b]) == pytest.approx((promised, found))
        assert curve.low[b] <= curve.observed[b] <= curve.high[b]
        error += abs(promised - found) * weight / 2
    for p in probabilities[0]:
        brier += (1 - p) ** 2 / 800
    for p in probabilities[1]:
        brier += p**2 / 1800
    assert (curve.error, curve.brier) == pytest.approx((error, brier))
    assert curve.positive_shares.sum() == pytest.approx(1) and curve.negative_shares.sum() == pytest.approx(1)


def test_intervals_are_wider_with_fewer_people() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.4, 0.6, 600), rng.uniform(0.4, 0.6, 600)
    widths = []
    for people in (6, 300):
        unit = (np.arange(600) % people)[:, None].repeat(2, 1)
        probabilities[0][:] = 0.4 + 0.2 * ((np.arange(600) % people) % 2)  # each person is in one bin
        curve = measure_reliability(probabilities, probabilities, (unit, unit), seed=0).curve
        assert curve is not None
        widths.append(float(np.nanmax(curve.high - curve.low)))
    assert widths[0] > 2 * widths[1]


@pytest.mark.parametrize("noise", [0.35, 0.6, 0.8])
@pytest.mark.parametrize("tracked", [True, False])
def test_probabilities_hold_for_other_people(noise: float, tracked: bool) -> None:
    """Fitted on eighty people, measured on eighty others of the same cameras."""
    features, store = made_site(160, noise=noise, seed=5)
    half = np.flatnonzero(store.persons <= 80)
    known = store.subset(half)
    if not tracked:
        known = replace(known, tracks=np.full(len(known), -1))
    calibration, reliability = calibrate(features[half], known)
    assert calibration is not None and not reliability.problem
    rest = np.flatnonzero(store.persons > 80)
    positive, negative = truth(features[rest], store.subset(rest))
    assert even_error(calibration, positive, negative) < 0.03
    assert (calibration.probability(negative) >= calibration.accept).mean() < 0.003
    assert (calibration.probability(positive) < calibration.reject).mean() < 0.1
    assert calibration.reject <= calibration.accept and calibration.false_accept_share == 0.001
    assert any(note.startswith("Without tracks") for note in reliability.notes) != tracked
    passed = [note for note in reliability.notes if "in one camera's image at the same time" in note]
    pairs = draw_track_pairs(known).negatives
    assert len(passed) == (len(pairs) >= MIN_CERTAIN)
    if passed:
        alike = np.einsum("pd,pd->p", features[half][pairs[:, 0]], features[half][pairs[:, 1]])
        share = sum(calibration.decide(float(a)) == "match" for a in alike) / len(alike)
        assert f"Of {len(pairs)} pairs" in passed[0] and f"{share:.1%} are decided as a match" in passed[0]


def test_labels_are_not_used_and_the_fit_is_deterministic_per_seed() -> None:
    features, store = made_site(40, noise=0.5, seed=2)
    first = calibrate(features, store, seed=7)[0]
    hidden = replace(store, persons=np.full(len(store), -1))
    assert first is not None and calibrate(features, hidden, seed=7)[0] == first
    assert calibrate(features, hidden, seed=8)[0] != first


def test_a_perfect_model_has_equal_thresholds() -> None:
    calibration, _ = calibrate(*made_site(60, noise=0.05, seed=3))
    assert calibration is not None and calibration.reject == calibration.accept


def test_a_narrow_spread_of_similarities_is_noted() -> None:
    """Like issue 167 of deep_sort_pytorch: every score about .97."""
    features, store = made_site(60, noise=0.4, seed=3)
    crowded = features + np.float32(6) / np.sqrt(np.float32(features.shape[1]))
    crowded /= np.linalg.norm(crowded, axis=1, keepdims=True)
    calibration, reliability = calibrate(crowded, store)
    assert calibration is not None
    assert "90 % of pairs of two persons have similarities of 0.9" in reliability.notes[0]
    assert not any("90 % of pairs" in note for note in calibrate(features, store)[1].notes)


def test_a_missing_calibration_has_a_reason() -> None:
    features, store = made_site(60, noise=0.3, seed=0)
    one = np.flatnonzero(store.cameras == 0)
    few = np.flatnonzero(store.persons <= MIN_CLUSTERS - 3)
    noise = np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    broken = features.copy()
    broken[3] = np.nan
    cases = {
        "crops of 1 camera: expected two cameras or more": (features[one], store.subset(one)),
        "clusters: expected 100 pairs in 20 clusters or more": (features[few], store.subset(few)),
        "in no cluster: expected|no cluster among": (noise, store),
        "1 of 720 features are not finite": (broken, store),
        "crops of 0 camera": (features[:0], store.subset([])),
        "one cluster|no cluster": (np.ones_like(features) / np.sqrt(np.float32(64)), store),
    }
    for words, (rows, crops) in cases.items():
        calibration, reliability = calibrate(rows, crops)
        assert calibration is None and reliability.curve is None
        assert any(part in reliability.problem for part in words.split("|")), reliability.problem


def test_the_drawing_is_well_formed_and_labelled() -> None:
    features, store = made_site(60, noise=0.6, seed=1)
    calibration, reliability = calibrate(features, store)
    assert calibration is not None and reliability.curve is not None
    drawing = draw_reliability(reliability, calibration)
    shown = np.isfinite(reliability.curve.observed).sum()
    titles = list(titled_groups(drawing))
    assert sum(title.startswith("predicted ") for title in titles) == shown
    assert {"pairs of one person", "pairs of two persons"} <= set(titles)
    root = ElementTree.fromstring(drawing)
    words = " ".join(element.text or "" for element in root.iter("text"))
    for probability, name in ((calibration.accept, "match from"), (calibration.reject, "unknown below")):
        assert f"{name} {float(calibration.similarity(probability)):.3f}" in words
    assert "one person" in words and "two persons" in words


def test_without_a_curve_nothing_is_drawn() -> None:
    features, store = made_site(60, noise=0.6, seed=1)
    calibration, _ = calibrate(features, store)
    assert calibration is not None
    with pytest.raises(AssertionError, match="one camera"):
        draw_reliability(Reliability("one camera"), calibration)


@pytest.mark.slow
@pytest.mark.real
def test_probabilities_hold_for_other_people_of_a_real_site(shared_data: Path, shared_weights: Path) -> None:
    """MSMT17 weights, fitted on 70 people and measured on 40 others; errors were 0.01-0.03."""
    site = open_site(shared_data)
    assert site.query is not None and site.gallery is not None
    train = site.train.subset(np.flatnonzero(np.isin(site.train.persons, np.unique(site.train.persons)[:70])))
    order = np.lexsort((train.times_s, train.cameras, train.persons))  # perfect tracks
    new = np.diff(train.persons[order]) | np.diff(train.cameras[order]) | (np.diff(train.times_s[order]) > 10)
    tracks = np.empty(len(train), np.int64)
    tracks[order] = np.concatenate([[0], np.cumsum(new != 0)])
    fitted = replace(train, tracks=tracks, persons=np.full(len(train), -1))
    others = np.unique(site.query.persons)[:40]
    query, gallery = (s.subset(np.flatnonzero(np.isin(s.persons, others))) for s in (site.query, site.gallery))
    encoder = load_weights(str(shared_weights / "osnet_x0_25_msmt17.pth")).encoder
    embed = encoder_embedding(encoder, "cpu")
    rows, query_rows, gallery_rows = (embed_store(s, encoder.config.image, embed) for s in (fitted, query, gallery))
    calibration, reliability = calibrate(rows, fitted)
    assert calibration is not None, reliability.problem
    similarity = query_rows @ gallery_rows.T
    across = query.cameras[:, None] != gallery.cameras
    same = query.persons[:, None] == gallery.persons
    positive, negative = similarity[across & same], similarity[across & ~same]
    assert even_error(calibration, positive, negative) < 0.06
    assert (calibration.probability(negative) >= calibration.accept).mean() < 0.008
    assert (calibration.probability(positive) < calibration.reject).mean() < 0.15
