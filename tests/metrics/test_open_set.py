"""Open-set metrics against searches run one at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from resight.errors import InputError
from resight.metrics.open_set import OpenSetScore, evaluate_open_set
from resight.metrics.ranking import GroundTruth, cosine_rows

Floats = NDArray[np.float32]


def slow_searches(similarity: Floats, truth: GroundTruth) -> tuple[list[tuple[float, int]], list[float]]:
    """(best mate's similarity, rank) of each mated search, and the best entry of each non-mated one."""
    everybody = {int(p) for p in truth.query_persons} | {int(p) for p in truth.gallery_persons}
    half = {person: place % 2 for place, person in enumerate(sorted(p for p in everybody if p > 0))} | {0: 0}
    mated, strangers = [], []
    for q, (person, camera) in enumerate(zip(truth.query_persons, truth.query_cameras, strict=True)):
        if person < 0:
            continue
        for watch_list in (0, 1):
            entries = []
            for g, (other, seen) in enumerate(zip(truth.gallery_persons, truth.gallery_cameras, strict=True)):
                if other == 0 or (other > 0 and half[int(other)] == watch_list):
                    junk = person > 0 and other == person and seen == camera
                    if not junk:
                        entries.append((-float(similarity[q, g]), g))
            entries.sort()
            mates = [place for place, (_, g) in enumerate(entries) if person > 0 and truth.gallery_persons[g] == person]
            if mates:
                mated.append((-entries[mates[0]][0], mates[0] + 1))
            if half[int(person)] != watch_list:
                strangers.append(-entries[0][0])
    return mated, strangers


def random_truth(seed: int, queries: int, gallery: int, people: int, cameras: int) -> GroundTruth:
    rng = np.random.default_rng(seed)
    sides = [rng.integers(-1, people, queries), rng.integers(-1, people, gallery)]
    return GroundTruth(*sides, rng.integers(0, cameras, queries), rng.integers(0, cameras, gallery))


@pytest.mark.parametrize(
    ("seed", "queries", "gallery", "people", "cameras"), [(0, 37, 101, 9, 3), (1, 5, 23, 5, 2), (2, 130, 230, 40, 6)]
)
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])
def test_equals_one_search_at_a_time(
    seed: int, queries: int, gallery: int, people: int, cameras: int, tied: bool
) -> None:
    truth = random_truth(seed, queries, gallery, people, cameras)
    rng = np.random.default_rng(seed + 50)
    similarity = rng.standard_normal((queries, gallery)).astype(np.float32)
    if tied:
        similarity = similarity.round(1)
    mated, strangers = slow_searches(similarity, truth)
    for chunk in (1, 7, 1000):
        score = evaluate_open_set(lambda part: similarity[part], truth, chunk=chunk)
        found = list(zip(score.mated_similarity.tolist(), score.mated_rank.tolist(), strict=True))
        assert found == mated
        assert score.nonmated_similarity.tolist() == sorted(strangers, reverse=True)
    for threshold in (*np.random.default_rng(seed).choice(similarity.ravel(), 9), -99.0, 99.0):
        level = float(threshold)
        assert score.fpir(level) == pytest.approx(sum(s >= level for s in strangers) / len(strangers))
        for rank in (1, 3, 10):
            missed = sum(not (s >= level and place <= rank) for s, place in mated)
            assert score.fnir(level, rank) == pytest.approx(missed / len(mated))


def score_of(strangers: list[float], mates: list[float], ranks: list[int] | None = None) -> OpenSetScore:
    return OpenSetScore(
        np.array(mates, np.float32),
        np.array(ranks or [1] * len(mates)),
        np.sort(np.array(strangers, np.float32))[::-1],
        (1, 1),
        (1, 1),
    )


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("target", [0.01, 0.05, 0.1, 0.29])
def test_the_operating_point_is_the_best_threshold(target: float, tied: bool) -> None:
    """No threshold within the FPIR has a higher TPIR."""
    rng = np.random.default_rng(7)
    strangers, mates = rng.normal(0.3, 0.1, 317), rng.normal(0.5, 0.1, 211)
    if tied:
        strangers, mates = strangers.round(2), mates.round(2)
    score = score_of(list(strangers), list(mates), list(rng.integers(1, 5, 211)))
    [one, two] = (score.at_fpir(target, (rank,)) for rank in (1, 2))
    levels = np.unique(np.concatenate([score.nonmated_similarity, score.mated_similarity]))
    allowed = [float(level) for level in levels if score.fpir(float(level)) <= target]
    assert one.threshold is not None and one.fpir is not None
    assert one.fpir == score.fpir(one.threshold) <= target
    assert one.false_positives == sum(s >= one.threshold for s in score.nonmated_similarity)
    for point, rank in ((one, 1), (two, 2)):
        assert point.tpir[0] == pytest.approx(max(1 - score.fnir(level, rank) for level in allowed))
    below = float(np.nextafter(np.float32(one.threshold), np.float32(-1)))
    assert score.fpir(below) > target  # the smallest one within it


@pytest.mark.parametrize(
    ("searches", "target", "needed"), [(99, 0.01, 100), (9, 0.1, 10), (1, 0.3, 4)], ids=["1 %", "10 %", "30 %"]
)
def test_a_rate_below_the_resolution_is_none(searches: int, target: float, needed: int) -> None:
    point = score_of([0.1] * searches, [0.9]).at_fpir(target, (1, 10))
    assert (point.threshold, point.fpir, point.false_positives, point.tpir) == (None, None, None, (None, None))
    assert point.reservation == f"{searches} non-mated searches cannot resolve it: at least {needed} are needed"
    enough = score_of([0.1] * (needed - 1) + [0.2], [0.9]).at_fpir(target, (1, 10))
    assert enough.false_positives == 1 and enough.tpir == (1.0, 1.0)


@pytest.mark.parametrize(("searches", "reliable"), [(100, False), (2999, False), (3000, True)])
def test_few_false_positives_cause_a_reservation(searches: int, reliable: bool) -> None:
    point = score_of(list(np.linspace(0, 0.5, searches)), [0.9]).at_fpir(0.01, (1,))
    assert (point.reservation == "") is reliable
    assert reliable or "3000 would make it reliable" in point.reservation


def test_tied_false_positives_are_accepted_together() -> None:
    """Of ten searches one may be a false positive; two are tied, so neither is accepted."""
    point = score_of([0.7, 0.7] + [0.2] * 8, [0.9, 0.7, 0.3]).at_fpir(0.1, (1,))
    assert point.threshold is not None and 0.7 < point.threshold < 0.7001
    assert (point.fpir, point.false_positives) == (0.0, 0)
    assert point.tpir[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("searches", [1, 2, 3, 40, 5000])
def test_the_curve_covers_fpir_from_0_to_1(searches: int) -> None:
    rng = np.random.default_rng(searches)
    score = score_of(list(rng.normal(0.3, 0.1, searches)), list(rng.normal(0.4, 0.1, 300)))
    thresholds = score.curve(60)
    assert len(thresholds) <= 60 and (np.diff(thresholds) < 0).all()
    fpir = [score.fpir(float(t)) for t in thresholds]
    fnir = [score.fnir(float(t), 1) for t in thresholds]
    assert (fpir[0], fpir[-1], fnir[-1]) == (0.0, 1.0, 0.0)
    assert fpir == sorted(fpir) and fnir == sorted(fnir, reverse=True)
    if searches > 1000:
        assert fpir[1:5] == pytest.approx([k / searches for k in (1, 2, 3, 4)])  # dense where errors are few


def test_hand_example() -> None:
    """Persons 1 and 3 are in list 0, person 2 in list 1, the distractor in both."""
    truth = GroundTruth(np.array([1, 2]), np.array([1, 1, 2, 3, 0]), np.array([5, 5]), np.array([5, 6, 6, 6, 6]))
    similarity = np.array([[0.95, 0.7, 0.8, 0.75, 0.1], [0.2, 0.3, 0.6, 0.5, 0.65]], np.float32)
    score = evaluate_open_set(lambda part: similarity[part], truth)
    # Query 1: its 0.95 is junk, person 3 ranks before it; query 2: the distractor does.
    assert score.mated_similarity.tolist() == pytest.approx([0.7, 0.6])
    assert score.mated_rank.tolist() == [2, 2]
    assert score.nonmated_similarity.tolist() == pytest.approx([0.8, 0.65])
    assert (score.persons, score.entries) == ((2, 1), (4, 2))
    assert (score.fpir(0.7), score.fnir(0.65, 1), score.fnir(0.65, 2), score.fnir(0.1, 2)) == (0.5, 1.0, 0.5, 0.0)


def test_a_query_of_person_0_is_a_non_mated_search() -> None:
    truth = GroundTruth(np.array([0, 1, -1]), np.array([0, 1, 2]), np.array([5, 5, 5]), np.array([5, 6, 6]))
    similarity = np.array([[0.9, 0.2, 0.3], [0.4, 0.8, 0.5], [1, 1, 1]], np.float32)
    score = evaluate_open_set(lambda part: similarity[part], truth)
    # Distractors of one camera are not the same person: 0.9 counts. The query of an unknown person is ignored.
    assert score.nonmated_similarity.tolist() == pytest.approx([0.9, 0.5])
    assert score.mated_similarity.tolist() == pytest.approx([0.8])


def test_a_threshold_round_trips_through_a_service() -> None:
    """Protocol buffers use float32: rounding must not accept the next false positive."""
    point = score_of(list(np.linspace(0.1, 0.9, 200)), [0.95]).at_fpir(0.01, (1,))
    assert point.threshold == float(np.float32(point.threshold))


def test_errors_state_why_the_metric_cannot_be_measured() -> None:
    eye, cameras = np.eye(3, dtype=np.float32), (np.array([1, 1, 1]), np.array([2, 2, 2]))
    alone = GroundTruth(np.array([4, 4, 0]), np.array([4, 4, 0]), *cameras)
    with pytest.raises(InputError, match=r"at least two persons in the gallery, found 1: add"):
        evaluate_open_set(cosine_rows(eye, eye, alone), alone)
    unmatched = GroundTruth(np.array([4, 5, 0]), np.array([6, 7, 0]), *cameras)
    with pytest.raises(InputError, match=r"none of 3 queries has a match .* two cameras"):
        evaluate_open_set(cosine_rows(eye, eye, unmatched), unmatched)


def test_the_rule_of_three_holds() -> None:
    """No error in n searches: with 95 % confidence the rate is at most about 3 / n."""
    assert 1 - math.exp(-3) == pytest.approx(0.95, abs=0.001)
