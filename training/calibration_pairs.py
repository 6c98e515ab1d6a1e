"""Pairs such as a search compares, of one person and of two, told apart without a label.

A search compares crops of different cameras. Tracks hold none: their pairs are seconds apart, before one wall, and
far more alike. Clusters do, but a pair is in one because it is alike. So a crop stands for the cluster that the
*other* crops of its track are in: whether the pair is drawn does not depend on how alike its own two crops are.

Letters: N crops, K clusters, U units, P pairs of one person, M pairs of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.training.crops import CropStore
from resight.training.dbscan import OUTLIER
from resight.training.neighbours import Ints
from resight.training.pairs import number_tracks, spread

POSITIVE_LIMIT = 50_000
NEGATIVE_DRAWS = 200_000  # 1 in 1,000 of them is still a hundred or more


@dataclass(frozen=True, eq=False)
class SearchPairs:
    """Pairs of crops of two cameras.

    Attributes:
        positives: int64 (P, 2), rows of crops that are probably of one person.
        negatives: int64 (M, 2), rows of crops that are nearly surely of two.
        units: int64 (N,), 0..U-1: crops of one cluster, else of one track, else one crop. Pairs that share a unit
            share a person, so units are what is held out and resampled.
        clusters: how many clusters the positives are from.
        relayed: whether tracks told the clusters; without tracks each crop stands for its own.
    """

    positives: Ints
    negatives: Ints
    units: Ints
    clusters: int
    relayed: bool


def draw_search_pairs(store: CropStore, labels: Ints, *, seed: int = 0) -> SearchPairs:
    """Draw pairs across cameras: positives evenly over clusters, negatives by chance.

    Two crops drawn by chance are of one person once in as many pairs as there are persons; those that share a
    cluster, by their own label or by their tracks', are left out.

    Args:
        store: N crops; persons are not read.
        labels: int64 (N,), clusters, -1 for outliers.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    tracks = number_tracks(store.cameras, store.tracks)
    relayed = bool((np.bincount(tracks[tracks >= 0], minlength=1) > 1).any())
    told = relay(labels, tracks) if relayed else labels
    positives = _within(told, store.cameras, rng)
    drawn = np.unique(np.sort(rng.integers(len(store), size=(NEGATIVE_DRAWS, 2)), axis=1), axis=0)
    one, other = drawn.T
    across = store.cameras[one] != store.cameras[other]
    together = _equal(labels, one, other) | _equal(told, one, other)
    negatives = drawn[across & ~together]
    return SearchPairs(
        positives, negatives, _units(labels, told, tracks), len(np.unique(told[positives[:, 0]])), relayed
    )


def relay(labels: Ints, tracks: Ints) -> Ints:
    """For each crop the commonest cluster among the other crops of its track; of equally common ones the lowest.

    Args:
        labels: int64 (N,), -1 for outliers.
        tracks: int64 (N,), -1 where unknown.

    Returns:
        int64 (N,), -1 where no other crop of the track is in a cluster.
    """
    known = (tracks >= 0) & (labels != OUTLIER)
    found = np.full(len(labels), OUTLIER, np.int64)
    if not known.any():
        return found
    clusters = labels.max() + 1
    cell, count = np.unique(tracks[known] * clusters + labels[known], return_counts=True)
    track, label = np.divmod(cell, clusters)
    order = np.lexsort((label, -count, track))  # of a track the commonest first
    track, label, count = track[order], label[order], count[order]
    new = np.flatnonzero(np.diff(track, prepend=-1))
    size = np.diff(new, append=len(track))
    total = tracks.max() + 1
    best, most, second, fewer = (np.full(total, fill, np.int64) for fill in (OUTLIER, 0, OUTLIER, 0))
    best[track[new]], most[track[new]] = label[new], count[new]
    runner = new[size > 1] + 1
    second[track[runner]], fewer[track[runner]] = label[runner], count[runner]
    has = np.flatnonzero(tracks >= 0)
    mine, own = tracks[has], labels[has]
    left = most[mine] - (own == best[mine])  # without the crop itself
    tie = (left == fewer[mine]) & (left > 0)
    found[has] = np.where(left > fewer[mine], best[mine], second[mine])
    found[has[tie]] = np.minimum(best[mine], second[mine])[tie]
    return found


def _within(labels: Ints, cameras: Ints, rng: np.random.Generator) -> Ints:
    """Rows (P, 2) of crops with one label and two cameras, as evenly over labels as they allow."""
    rows = np.flatnonzero(labels != OUTLIER)
    rows = rows[np.lexsort((rng.permutation(len(rows)), labels[rows]))]
    _, first, size = np.unique(labels[rows], return_index=True, return_counts=True)
    group, number = spread(size * (size - 1) // 2, POSITIVE_LIMIT, rng)
    high = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)  # number = high (high - 1) / 2 + low
    high -= high * (high - 1) // 2 > number  # where the root was rounded up
    low = number - high * (high - 1) // 2
    pairs = rows[np.stack([first[group] + low, first[group] + high], axis=1)]
    return np.asarray(pairs[cameras[pairs[:, 0]] != cameras[pairs[:, 1]]], np.int64)


def _equal(labels: Ints, one: Ints, other: Ints) -> NDArray[np.bool_]:
    """Whether two crops share a cluster."""
    return np.asarray((labels[one] == labels[other]) & (labels[one] != OUTLIER))


def _units(labels: Ints, told: Ints, tracks: Ints) -> Ints:
    """One number for crops of one cluster, of one track outside clusters, and for each crop of neither."""
    cluster = np.where(told != OUTLIER, told, labels)
    names = np.where(
        cluster != OUTLIER, 3 * cluster, np.where(tracks >= 0, 3 * tracks + 1, 3 * np.arange(len(labels)) + 2)
    )
    return np.asarray(np.unique(names, return_inverse=True)[1], np.int64)
