"""Pairs with certain labels against loop implementations, and even sampling."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from references_judge import overlapping, positive_pairs, random_store, store_of, tracks_of

from resight.training.store.crops import CropStore
from resight.training.store.track_pairs import TrackPairs, draw_track_pairs, sample_evenly


def drawn_track_pairs(store: CropStore, pairs: TrackPairs) -> set[frozenset[tuple[int, int]]]:
    key = [(int(camera), int(track)) for camera, track in zip(store.cameras, store.tracks, strict=True)]
    return {frozenset((key[one], key[other])) for one, other in pairs.negatives.tolist()}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [1, 2, 7, 61])
def test_all_pairs_equal_the_loop_implementation(n: int, seed: int) -> None:
    store = random_store(n, seed)
    pairs = draw_track_pairs(store, seed=seed)
    assert {tuple(pair) for pair in pairs.positives.tolist()} == positive_pairs(store)
    assert len(pairs.positives) == len(positive_pairs(store))
    expected = overlapping(store)
    assert drawn_track_pairs(store, pairs) == expected
    assert pairs.overlaps == len(expected) == len(pairs.track_pairs)
    assert pairs.track_count == len(tracks_of(store))


@pytest.mark.parametrize("seed", range(12))
def test_negatives_are_simultaneous_and_nearest_in_time(seed: int) -> None:
    store = random_store(83, seed)
    rows = tracks_of(store)
    seen = set()
    for one, other in draw_track_pairs(store).negatives.tolist():
        times = store.times_s[rows[int(store.cameras[one]), int(store.tracks[one])]]
        moment = store.times_s[other]
        assert np.nanmin(times) <= moment <= np.nanmax(times)
        assert abs(store.times_s[one] - moment) == np.nanmin(np.abs(times - moment))
        assert (one, other) not in seen
        seen.add((one, other))


def test_each_crop_of_the_later_track_is_used_once_per_partner() -> None:
    store = store_of([0] * 7, [1, 1, 1, 2, 2, 2, 2], [0, 4, 8, 3, 5, 8, 9])
    assert draw_track_pairs(store).negatives.tolist() == [[1, 3], [1, 4], [2, 5]]  # not the one at 9 s


@pytest.mark.parametrize(
    ("times_s", "certain"),
    [
        ([0, 5, 5, 9], False),  # one ends when the other begins: perhaps one person, lost and found again
        ([0, 5, 4.9, 9], True),
        ([0, 5, 3, 3], True),  # seen before and after the other's only time
        ([0, 5, 0, 0], False),
        ([0, 5, 5, 5], False),
        ([2, 2, 2, 2], False),
        ([0, 5, 0, 5], True),
        ([0, 5, np.nan, np.nan], False),
        ([0, 5, np.nan, 3], True),
    ],
)
def test_what_counts_as_overlap(times_s: list[float], certain: bool) -> None:
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        store = store_of([0] * 4, [0, 0, 1, 1], [times_s[place] for place in order])
        assert (draw_track_pairs(store).overlaps == 1) == certain
        other_camera = store_of([0, 0, 1, 1], [0, 0, 1, 1], [times_s[place] for place in order])
        assert draw_track_pairs(other_camera).overlaps == 0


def test_one_id_in_two_cameras_is_two_tracks() -> None:
    pairs = draw_track_pairs(store_of([0, 1, 0, 1], [5, 5, 5, 5], [0, 0, 1, 1]))
    assert pairs.tracks.tolist() == [0, 1, 0, 1] and pairs.positives.tolist() == [[0, 2], [1, 3]]
    assert len(pairs.negatives) == 0


def test_without_tracks_or_times_there_are_no_pairs() -> None:
    assert len(draw_track_pairs(store_of([], [], [])).positives) == 0
    unknown = draw_track_pairs(store_of([0, 0, 1], [-1, -1, -1], [0, 1, 2]))
    assert (unknown.track_count, len(unknown.positives), len(unknown.negatives)) == (0, 0, 0)
    timeless = draw_track_pairs(store_of([0] * 4, [0, 0, 1, 1], [np.nan] * 4))
    assert timeless.positives.tolist() == [[0, 1], [2, 3]] and timeless.overlaps == 0
    assert draw_track_pairs(store_of([0, 0, 0], [1, 2, 3], [1, 2, 3])).positives.tolist() == []


@pytest.mark.parametrize("limit", [1, 3, 10, 57, 200])
@pytest.mark.parametrize("seed", range(5))
def test_sampling_is_even_without_repeats_and_within_the_limit(limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 12, 23) ** 2
    group, member = sample_evenly(sizes, limit, rng)
    assert (0 <= member).all() and (member < sizes[group]).all()
    assert len(set(zip(group.tolist(), member.tolist(), strict=True))) == len(group) <= limit
    counts = Counter(group.tolist())
    cap = max(counts.values())
    if cap > 1 or limit >= (sizes > 0).sum():  # all groups have the same number of samples, or all their members
        assert all(counts[index] == min(size, cap) for index, size in enumerate(sizes.tolist()))
        assert sum(min(size, cap + 1) for size in sizes.tolist()) > limit or sizes.sum() <= limit
    else:
        assert len(group) == limit


def test_members_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(10)
    for _ in range(3000):
        np.add.at(counts, sample_evenly(np.array([10]), 4, rng)[1], 1)
    assert counts == pytest.approx(np.full(10, 1200), rel=0.1)


@pytest.mark.parametrize("limit", [5, 40, 150])
def test_a_limited_draw_is_a_subset_of_all_pairs(limit: int) -> None:
    store = random_store(200, 3)
    some, other = draw_track_pairs(store, limit=limit, seed=1), draw_track_pairs(store, limit=limit, seed=1)
    assert some.digest == other.digest != draw_track_pairs(store, limit=limit, seed=2).digest
    assert {tuple(pair) for pair in some.positives.tolist()} <= positive_pairs(store)
    assert drawn_track_pairs(store, some) <= overlapping(store)
    assert some.overlaps == len(overlapping(store)) > 40  # all are counted, even if few are drawn
    assert limit / 3 < len(some.positives) <= limit and limit / 3 < len(some.negatives) <= limit


def test_many_simultaneous_tracks_do_not_need_quadratic_memory() -> None:
    n = 40_000  # all in one camera at one time: 200 million overlapping pairs of tracks
    tracks = np.repeat(np.arange(n // 2), 2)
    times_s = np.tile([0.0, 100.0], n // 2) + np.repeat(np.arange(n // 2), 2) * 1e-4
    pairs = draw_track_pairs(store_of([0] * n, tracks.tolist(), times_s.tolist()), limit=1000)
    assert pairs.overlaps == (n // 2) * (n // 2 - 1) // 2 and len(pairs.negatives) == 1000
