"""Metrics of camera pairs against the protocol applied to each pair alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from resight.metrics.ranking import GroundTruth, evaluate_camera_pairs, evaluate_ranking, ground_truth_of


def slow_pair(similarity: NDArray[np.float32], truth: GroundTruth, a: int, b: int) -> tuple[float, float, int]:
    """mAP, rank-1 and valid queries of the queries of camera a against the gallery of camera b."""
    precisions, firsts = [], []
    for q in range(len(truth.query_persons)):
        person = truth.query_persons[q]
        if truth.query_cameras[q] != a:
            continue
        rows = [g for g in range(truth.gallery) if truth.gallery_cameras[g] == b and truth.gallery_persons[g] >= 0]
        rows = [g for g in rows if not (truth.gallery_persons[g] == person and a == b)]
        rows.sort(key=lambda g: (-similarity[q, g], g))
        hits = [person > 0 and truth.gallery_persons[g] == person for g in rows]
        if not any(hits):
            continue
        found = 0
        total = 0.0
        for place, hit in enumerate(hits, 1):
            if hit:
                found += 1
                total += found / place
        precisions.append(total / found)
        firsts.append(hits[0])
    if not precisions:
        return float("nan"), float("nan"), 0
    return float(np.mean(precisions)), float(np.mean(firsts)), len(precisions)


@pytest.mark.parametrize(
    ("seed", "queries", "gallery", "people", "cameras"),
    [(0, 37, 101, 9, [3, 7, 20]), (1, 5, 7, 3, [0, 1]), (2, 64, 230, 40, [0, 1, 2, 4, 5, 6])],
)
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])
def test_equals_the_loop(seed: int, queries: int, gallery: int, people: int, cameras: list[int], tied: bool) -> None:
    rng = np.random.default_rng(seed)
    persons = rng.integers(-1, people, queries), rng.integers(-1, people, gallery)
    truth = GroundTruth(*persons, rng.choice(cameras, queries), rng.choice(cameras, gallery))
    similarity = rng.standard_normal((queries, gallery)).astype(np.float32)
    if tied:
        similarity = similarity.round(0)
    for chunk in (1, 7, 1000):
        found = evaluate_camera_pairs(lambda part: similarity[part], truth, chunk=chunk)
        assert set(found.query_cameras) <= set(cameras) and set(found.gallery_cameras) <= set(cameras)
        for a, query_camera in enumerate(found.query_cameras):
            for b, gallery_camera in enumerate(found.gallery_cameras):
                slow = slow_pair(similarity, truth, query_camera, gallery_camera)
                fast = found.mAP[a, b], found.rank1[a, b], found.valid_queries[a, b]
                assert fast == pytest.approx(slow, abs=1e-12, nan_ok=True)
                assert query_camera != gallery_camera or slow[2] == 0  # with itself: junk only


def test_with_two_cameras_the_pairs_average_to_the_total() -> None:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((90, 8)).astype(np.float32)
    persons, cameras = rng.integers(1, 9, 90), rng.integers(0, 2, 90)
    columns = persons[:30], persons[30:], cameras[:30], 1 - np.zeros(60, np.int64)
    score = evaluate_ranking(features[:30], features[30:], *columns)
    similarity = features[:30] @ features[30:].T
    pairs = evaluate_camera_pairs(lambda part: similarity[part], ground_truth_of(*columns))
    assert pairs.mAP[0, 0] == pytest.approx(score.mAP)
    assert pairs.rank1[0, 0] == pytest.approx(score.rank(1))
    assert pairs.valid_queries.ravel().tolist() == [score.valid_queries, 0]
