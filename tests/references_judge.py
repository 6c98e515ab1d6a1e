"""Reference implementations of the judge's metrics with loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resight.training.store.crops import CropStore

Ints = NDArray[np.int64]


def store_of(cameras: list[int], tracks: list[int], times_s: list[float]) -> CropStore:
    n = len(cameras)
    names = tuple(f"cam{camera}" for camera in range(max(cameras, default=0) + 1))
    return CropStore(
        Path("nowhere"),
        tuple(f"{row}.jpg" for row in range(n)),
        np.array(cameras, np.int64),
        names,
        np.array(times_s, np.float64),
        np.array(tracks, np.int64),
        np.full(n, -1, np.int64),
    )


def random_store(n: int, seed: int) -> CropStore:
    """Whole seconds, so that tracks often touch; track ids shared by cameras; some unknown values."""
    rng = np.random.default_rng(seed)
    times_s = rng.integers(0, max(n // 3, 2), n).astype(float)
    times_s[rng.random(n) < 0.1] = np.nan
    tracks = rng.integers(0, max(n // 4, 1), n) * 1_000_000_007
    tracks[rng.random(n) < 0.1] = -1
    return store_of(rng.integers(0, 3, n).tolist(), tracks.tolist(), times_s.tolist())


def tracks_of(store: CropStore) -> dict[tuple[int, int], list[int]]:
    """Rows of each (camera, track), by time and then row, unknown times last."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in range(len(store)):
        if store.tracks[row] >= 0:
            found[int(store.cameras[row]), int(store.tracks[row])].append(row)
    for rows in found.values():
        rows.sort(key=lambda row: (math.isnan(store.times_s[row]), store.times_s[row]))
    return dict(sorted(found.items()))


def positive_pairs(store: CropStore) -> set[tuple[int, int]]:
    """Each crop of a track's first half with each of its second half."""
    found = set()
    for rows in tracks_of(store).values():
        half = len(rows) // 2
        found |= set(itertools.product(rows[:half], rows[len(rows) - half :]))
    return found


def overlapping(store: CropStore) -> set[frozenset[tuple[int, int]]]:
    """Pairs of tracks of one camera that overlap in time."""
    spans = {}
    for key, rows in tracks_of(store).items():
        times = [float(store.times_s[row]) for row in rows if not math.isnan(store.times_s[row])]
        if times:
            spans[key] = (min(times), max(times))
    found = set()
    for one, other in itertools.combinations(spans, 2):
        (start, end), (begin, finish) = spans[one], spans[other]
        if one[0] == other[0] and start < finish and begin < end:
            found.add(frozenset((one, other)))
    return found


def auc(positive: list[float], negative: list[float]) -> float:
    """Share of pairs of pairs in the right order; ties count half."""
    right = 0.0
    for one in positive:
        for other in negative:
            right += 1.0 if one > other else 0.5 if one == other else 0.0
    return right / (len(positive) * len(negative))


def tpr_at_fpr(positive: list[float], negative: list[float], tenth_percent: int) -> float:
    """Share of positives above the lowest threshold that at most `tenth_percent` of 1,000 negatives exceed."""
    for threshold in sorted(set(negative)):
        if 1000 * sum(value > threshold for value in negative) <= tenth_percent * len(negative):
            return sum(value > threshold for value in positive) / len(positive)
    raise AssertionError("the highest negative is exceeded by none")


def repeat_pairs(values: list[float], weights: list[int]) -> list[float]:
    """Pairs repeated by their weights."""
    return [value for value, weight in zip(values, weights, strict=True) for _ in range(weight)]


def camera_figures(labels: Ints, cameras: Ints) -> tuple[float, float]:
    """Cameras per cluster, and share of clusters with several cameras."""
    seen = defaultdict(set)
    for label, camera in zip(labels.tolist(), cameras.tolist(), strict=True):
        if label >= 0:
            seen[label].add(camera)
    counts = [len(cameras) for cameras in seen.values()]
    return sum(counts) / len(counts), sum(count > 1 for count in counts) / len(counts)


def chance_camera_figures(labels: Ints, cameras: Ints) -> tuple[float, float]:
    """The same, averaged over every order of the clustered crops' cameras."""
    inliers = [row for row in range(len(labels)) if labels[row] >= 0]
    each = []
    for order in itertools.permutations(cameras[inliers].tolist()):
        each.append(camera_figures(labels[inliers], np.array(order)))
    means = np.mean(each, axis=0)
    return float(means[0]), float(means[1])


def track_figures(store: CropStore, labels: Ints) -> dict[str, float | None]:
    """Majority and whole share over tracks of several crops, confused share over overlapping tracks."""
    majority, home = [], {}
    for key, rows in tracks_of(store).items():
        counts = Counter(int(labels[row]) for row in rows if labels[row] >= 0)
        most = max(counts.values(), default=0)
        home[key] = min((label for label in counts if counts[label] == most), default=-1)
        if len(rows) > 1:
            majority.append(most / len(rows))
    confused = [len({home[key] for key in pair}) == 1 for pair in overlapping(store) if all(home[k] >= 0 for k in pair)]
    return {
        "majority_share": sum(majority) / len(majority) if majority else None,
        "whole_share": sum(share == 1 for share in majority) / len(majority) if majority else None,
        "confused_share": sum(confused) / len(confused) if confused else None,
    }


def pair_counts(labels: Ints, previous: Ints) -> float:
    """Adjusted Rand index from counts of crop pairs (Hubert and Arabie 1985, equation 5), both clustered."""
    rows = [row for row in range(len(labels)) if labels[row] >= 0 and previous[row] >= 0]
    same_both = same_one = same_other = total = 0
    for i, j in itertools.combinations(rows, 2):
        one, other = labels[i] == labels[j], previous[i] == previous[j]
        same_both += bool(one and other)
        same_one += bool(one)
        same_other += bool(other)
        total += 1
    expected = same_one * same_other / total
    highest = (same_one + same_other) / 2
    return 1.0 if highest == expected else (same_both - expected) / (highest - expected)


def people_store(*, persons: int, cameras: int, crops: int) -> CropStore:
    """Each person passes each camera once; tracks of neighbours overlap. Row order: person, camera, crop."""
    person, camera, crop = (part.ravel() for part in np.mgrid[:persons, :cameras, :crops])
    times_s = person * 0.4 * crops + camera * 1000.0 + crop
    made = store_of(camera.tolist(), person.tolist(), times_s.tolist())
    return replace(made, persons=person.astype(np.int64))


def people_features(store: CropStore, *, spread: float, camera: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows: a direction per person, one per camera, and noise; the lengths of the last two are given."""
    rng = np.random.default_rng(seed)
    people = rng.normal(size=(store.persons.max() + 2, 32))[store.persons]
    seen = rng.normal(size=(store.cameras.max() + 1, 32))[store.cameras]
    rows = people + camera * seen + spread * rng.normal(size=people.shape)
    unit: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit
