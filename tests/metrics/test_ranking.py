"""Ranking metrics against a slow implementation of the Market-1501 protocol with loops."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resight.errors import InputError
from resight.metrics.ranking import RankingScore, evaluate_ranking, score_rankings

Ints = NDArray[np.int64]
Columns = tuple[Ints, Ints, Ints, Ints]


def slow_lists(query: NDArray[np.float32], gallery: NDArray[np.float32]) -> list[list[int]]:
    """Full ranked lists: larger dot product first, then smaller row."""
    lists = []
    for q in query:
        similarity = [sum(float(a) * float(b) for a, b in zip(q, g, strict=True)) for g in gallery]
        lists.append(sorted(range(len(gallery)), key=lambda row: (-similarity[row], row)))
    return lists


def slow_scores(lists: list[list[int]], columns: Columns) -> tuple[list[float], list[float], list[int]]:
    """Average precision, INP and first rank (0: not found) of each valid query, one row at a time."""
    query_persons, gallery_persons, query_cameras, gallery_cameras = columns
    precisions, penalties, firsts = [], [], []
    for q, rows in enumerate(lists):
        person, camera = query_persons[q], query_cameras[q]
        matches = [
            g
            for g in range(len(gallery_persons))
            if person > 0 and gallery_persons[g] == person and gallery_cameras[g] != camera
        ]
        if not matches:
            continue
        rank, hits, total, first, last = 0, 0, 0.0, 0, 0
        for g in rows:
            if gallery_persons[g] == -1 or (gallery_persons[g] == person and gallery_cameras[g] == camera):
                continue
            rank += 1
            if g in matches:
                hits += 1
                total += hits / rank
                first = first or rank
                last = rank
        precisions.append(total / len(matches))
        penalties.append(len(matches) / last if hits == len(matches) else 0.0)
        firsts.append(first)
    return precisions, penalties, firsts


def assert_equal(score: RankingScore, slow: tuple[list[float], list[float], list[int]]) -> None:
    precisions, penalties, firsts = slow
    assert score.valid_queries == len(precisions)
    assert score.mAP == pytest.approx(np.mean(precisions), abs=1e-12)
    assert score.mINP == pytest.approx(np.mean(penalties), abs=1e-12)
    valid = score.average_precision[~np.isnan(score.average_precision)]
    np.testing.assert_allclose(valid, precisions, atol=1e-12)
    for rank in range(1, len(score.cmc) + 1):
        assert score.rank(rank) == pytest.approx(np.mean([0 < first <= rank for first in firsts]))


def random_site(seed: int, queries: int, gallery: int, people: int, cameras: int) -> Columns:
    """Persons from -1 (unknown) and 0 (distractor) up; some queries have no match."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(-1, people, queries),
        rng.integers(-1, people, gallery),
        rng.integers(0, cameras, queries),
        rng.integers(0, cameras, gallery),
    )


@pytest.mark.parametrize(
    ("seed", "queries", "gallery", "people", "cameras"), [(0, 37, 101, 9, 3), (1, 5, 7, 3, 2), (2, 64, 230, 40, 6)]
)
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])
def test_equals_the_loop(seed: int, queries: int, gallery: int, people: int, cameras: int, tied: bool) -> None:
    columns = random_site(seed, queries, gallery, people, cameras)
    rng = np.random.default_rng(seed + 100)
    if tied:  # few small integers: many exactly equal similarities, for any order of summation
        query = rng.integers(-1, 2, (queries, 3)).astype(np.float32)
        rows = rng.integers(-1, 2, (gallery, 3)).astype(np.float32)
    else:
        query, rows = (rng.standard_normal((n, 13)).astype(np.float32) for n in (queries, gallery))
    lists = slow_lists(query, rows)
    slow = slow_scores(lists, columns)
    for chunk in (1, 7, 1000):
        assert_equal(evaluate_ranking(query, rows, *columns, chunk=chunk), slow)
    assert_equal(score_rankings(lists, *columns), slow)


def test_truncated_lists_count_missing_matches_as_not_found() -> None:
    columns = random_site(3, 41, 120, 8, 3)
    rng = np.random.default_rng(4)
    lists = [list(rng.permutation(120)[:length]) for length in rng.integers(0, 120, 41)]
    score = score_rankings(lists, *columns)
    assert_equal(score, slow_scores(lists, columns))
    full = score_rankings([row + [g for g in range(120) if g not in set(row)] for row in lists], *columns)
    assert score.mAP < full.mAP
    assert score.valid_queries == full.valid_queries


def test_hand_example_of_ranks_one_and_three() -> None:
    """Matches at ranks 1 and 3 after junk removal: AP (1 + 2/3) / 2 = 0.8333, INP 2/3."""
    query = np.array([[1.0, 0.0]], np.float32)
    angles = np.array([0.0, 0.1, 0.2, 0.3, 0.4])  # row 0 is junk: same person, same camera
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    persons = np.array([5, 5, 0, 5, 6])
    cameras = np.array([1, 2, 2, 3, 1])
    score = evaluate_ranking(query, rows, np.array([5]), persons, np.array([1]), cameras)
    assert score.mAP == pytest.approx((1 + 2 / 3) / 2)
    assert score.mINP == pytest.approx(2 / 3)
    assert score.cmc.tolist() == [1.0] * 5
    assert score.rank(1) == score.rank(50) == 1.0


def test_unknown_people_are_junk_and_distractors_are_wrong() -> None:
    query, rows = np.eye(2, dtype=np.float32)[:1], np.array([[1, 0], [0.5, 0], [0.2, 0]], np.float32)
    camera, cameras = np.array([1]), np.array([2, 2, 2])
    unknown = evaluate_ranking(query, rows, np.array([7]), np.array([-1, 7, 8]), camera, cameras)
    distractor = evaluate_ranking(query, rows, np.array([7]), np.array([0, 7, 8]), camera, cameras)
    assert (unknown.mAP, unknown.rank(1)) == (1.0, 1.0)
    assert (distractor.mAP, distractor.rank(1), distractor.rank(2)) == (0.5, 0.0, 1.0)


def test_skipped_queries_are_marked() -> None:
    features = np.eye(3, dtype=np.float32)
    score = evaluate_ranking(
        features, features, np.array([1, 2, 0]), np.array([1, 2, 0]), np.array([1, 1, 1]), np.array([2, 1, 2])
    )
    assert score.valid_queries == 1  # the second is from its own camera, the third a distractor
    assert np.isnan(score.average_precision).tolist() == [False, True, True]


def test_an_error_states_why_there_is_no_match() -> None:
    features, ones = np.eye(4, dtype=np.float32), np.ones(4, np.int64)
    with pytest.raises(InputError, match=r"none of 4 queries has a match .* another camera"):
        evaluate_ranking(features, features, ones, ones, ones, ones)


def test_invalid_input_is_rejected() -> None:
    features, persons = np.eye(4, dtype=np.float32), np.arange(1, 5)
    cameras = np.ones(4, np.int64)
    good = (persons, persons, cameras, cameras + 1)
    with pytest.raises(InputError, match="feature rows"):
        evaluate_ranking(features[:3], features, *good)
    with pytest.raises(InputError, match="one length"):
        evaluate_ranking(features[:, :3], features, *good)
    with pytest.raises(InputError, match="NaN"):
        evaluate_ranking(features * np.nan, features, *good)
    with pytest.raises(InputError, match="one camera for each query"):
        evaluate_ranking(features, features, persons, persons, cameras[:3], cameras)
    with pytest.raises(InputError, match="one camera for each gallery"):
        evaluate_ranking(features, features[:0], persons, persons[:0], cameras, cameras[:0])
    with pytest.raises(InputError, match="ranked lists"):
        score_rankings([[0]], *good)
    for bad in ([0, 0], [4], [-1]):
        with pytest.raises(InputError, match=r"distinct rows 0\.\.3, found others in list 1"):
            score_rankings([[0], bad, [0], [0]], *good)
