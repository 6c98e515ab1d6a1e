"""Units, balance and held-out crops, against loop implementations and with edge cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resight.training.curation.collect import (
    OVERDRAW,
    balance_cameras,
    hold_out_units,
    track_numbers,
    unit_numbers,
    unit_sizes,
)
from resight.training.store.crops import CropStore
from resight.training.store.links import Links

NONE = Links(np.empty((0, 2), np.int64), np.empty(0, bool))


def drawn(rng: np.random.Generator, n: int, cameras: int) -> CropStore:
    """A store without files, unordered; some rows without track or time."""
    tracks = rng.integers(-1, max(n // 3, 1), n)
    seen = np.where(tracks < 0, rng.integers(0, cameras, n), tracks % cameras)
    times = np.where(rng.random(n) < 0.1, np.nan, tracks * 4.0 + rng.uniform(0, 6, n))
    paths = tuple(f"{row}.jpg" for row in range(n))
    names = tuple(f"c{camera}" for camera in range(cameras))
    return CropStore(Path(), paths, seen.astype(np.int64), names, times, tracks.astype(np.int64), np.full(n, -1))


@pytest.mark.parametrize("seed", range(20))
def test_units_are_complete_tracks_of_one_camera_without_gaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    store = drawn(rng, int(rng.integers(1, 80)), int(rng.integers(1, 4)))
    track, unit = track_numbers(store), unit_numbers(store, NONE)
    assert sorted(set(unit)) == list(range(unit.max() + 1)) and unit.dtype == np.int64
    assert len(set(track)) == len(
        {(camera, own) for camera, own in zip(store.cameras, store.tracks, strict=True) if own >= 0}
    ) + int((store.tracks < 0).sum())
    for number in set(track):
        assert len(set(unit[track == number])) == 1
    full = np.ceil(np.bincount(store.cameras) / 10)
    for number in set(unit):
        members = unit == number
        assert len(set(store.cameras[members])) == 1
        spans = []
        for one in sorted(set(track[members])):
            times = store.times_s[track == one]
            times = times[np.isfinite(times)]
            spans.append((times.min(), times.max(), int((track == one).sum())) if len(times) else None)
        if len(spans) > 1:
            assert None not in spans
            ordered = sorted(span for span in spans if span)
            for index, (begin, _, _) in enumerate(ordered[1:], start=1):
                assert begin <= max(end for _, end, _ in ordered[:index])
            held = sum(size for _, _, size in ordered[:-1])
            assert len(ordered) == 2 or held < full[store.cameras[members][0]] or len(ordered) == 2


def test_linked_tracks_are_one_unit_over_all_cameras() -> None:
    store = drawn(np.random.default_rng(1), 200, 3)
    track = track_numbers(store)
    chain = np.array([np.flatnonzero(track == number)[0] for number in sorted(set(track))[:4]])
    unit = unit_numbers(store, Links(np.stack([chain[:-1], chain[1:]], 1), np.array([True, False, True])))
    assert len({unit[row] for row in np.flatnonzero(np.isin(track, track[chain]))}) == 1
    assert not np.isin(unit[~np.isin(track, track[chain])], unit[chain]).any()


def test_too_large_groups_use_only_must_links_or_no_links() -> None:
    store = drawn(np.random.default_rng(1), 200, 3)
    track = track_numbers(store)
    first = np.array([np.flatnonzero(track == number)[0] for number in sorted(set(track))[:40]])
    chain = np.stack([first[:-1], first[1:]], 1)
    alternating = np.arange(39) % 2 == 0
    unit = unit_numbers(store, Links(chain, alternating))
    assert all((unit[one] == unit[other]) == same for (one, other), same in zip(chain, alternating, strict=True))
    assert np.array_equal(unit_numbers(store, Links(chain, np.ones(39, bool))), unit_numbers(store, NONE))


@pytest.mark.parametrize("seed", range(20))
def test_sizes_and_balance_equal_the_loop_implementation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    store = drawn(rng, int(rng.integers(1, 120)), int(rng.integers(1, 5)))
    unit = unit_numbers(store, NONE)
    sizes = unit_sizes(store, unit)
    for number, row in enumerate(sizes):
        assert row.tolist() == [
            int(((unit == number) & (store.cameras == c)).sum()) for c in range(len(store.camera_names))
        ]
    order, budget = rng.permutation(len(sizes)), int(rng.integers(1, len(store) + 5))
    chosen = balance_cameras(sizes, order, budget)
    taken, left = np.zeros(sizes.shape[1], int), order.tolist()
    cap = OVERDRAW * np.median(sizes.sum(0)[sizes.sum(0) > 0])
    expected, out = set(), {camera for camera in range(sizes.shape[1]) if not sizes[:, camera].any()}
    while len(out) < sizes.shape[1]:
        camera = min((c for c in range(sizes.shape[1]) if c not in out), key=lambda c: (taken[c], c))
        fits = [
            u
            for u in left
            if sizes[u, camera] and taken[camera] + sizes[u, camera] <= cap and taken.sum() + sizes[u].sum() <= budget
        ]
        if not fits:
            out.add(camera)
            continue
        expected.add(fits[0])
        taken += sizes[fits[0]]
        left = left[: left.index(fits[0])] + left[left.index(fits[0]) + 1 :]
    assert set(np.flatnonzero(chosen)) == expected and sizes[chosen].sum() <= budget


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5])
def test_each_camera_holds_out_about_its_share_and_keeps_some(share: float) -> None:
    rng = np.random.default_rng(2)
    sizes = np.zeros((200, 3), np.int64)
    sizes[np.arange(200), rng.integers(0, 3, 200)] = rng.integers(1, 9, 200)
    held = hold_out_units(sizes, share, rng)
    assert sizes[held].sum(0) / sizes.sum(0) == pytest.approx(share, abs=0.05)
    alone = hold_out_units(np.array([[4, 0], [0, 4], [0, 4]]), 0.6, rng)
    assert not alone[0] and alone.sum() == 1  # never all of a camera


def test_empty_stores_give_empty_selections() -> None:
    none = np.zeros((0, 2), np.int64)
    assert not len(balance_cameras(none, [], 10)) and not len(hold_out_units(none, 0.2, np.random.default_rng(0)))
