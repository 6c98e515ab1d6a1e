"""Which crops a night's work takes: whole tracks, cameras in balance, some held out to be judged on.

Crops are chosen in units that stay whole: scenes, which are tracks of one camera that follow each other without a
break, so that those who were in the picture together stay together; and whatever links tie, over all cameras.

Letters: N crops, T tracks, U units, C cameras.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from resight.training.crops import UNKNOWN, CropStore
from resight.training.links import Links
from resight.training.neighbours import Ints
from resight.training.pairs import number_tracks

CAP = 2.0  # times the median camera: what one busy camera may have of a model's attention
SCENES = 10  # a camera's crops make about as many, so that a fifth of them can be held out


def tracks_of(store: CropStore) -> Ints:
    """Number of each crop's track, 0..T-1; a crop without a track is one of its own: int64 (N,)."""
    numbers = number_tracks(store.cameras, store.tracks)
    alone = numbers == UNKNOWN
    numbers[alone] = numbers.max(initial=UNKNOWN) + 1 + np.arange(alone.sum())
    return numbers


def units_of(store: CropStore, links: Links) -> Ints:
    """Number of each crop's unit, 0..U-1: int64 (N,).

    A camera's tracks, by their begin, fill a scene until nobody of it is in the picture any more, or until there are
    two and a tenth of the camera's crops. Tracks with a link between them are a unit with all these are linked to;
    where that would be more than a tenth of all crops must-links alone tie, and where they do as well, nothing.

    Args:
        store: N crops.
        links: between its rows.
    """
    track = tracks_of(store)
    unit = _scenes(store, track)
    left = np.ones(len(store), bool)
    for ends in (links.rows, links.rows[links.same]):
        if not len(ends):
            continue
        tied = _tied(track, track[ends])
        size = np.bincount(tied[tied != UNKNOWN], minlength=1)
        fits = left & (tied != UNKNOWN)
        fits[fits] = size[tied[fits]] <= len(store) / SCENES
        unit[fits] = unit.max() + 1 + tied[fits]
        left &= ~fits
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def _tied(track: Ints, ends: Ints) -> Ints:
    """Which tracks hang together by links: a number for each crop of one that has any, else -1: int64 (N,)."""
    count = int(track.max(initial=UNKNOWN)) + 1
    graph = sparse.coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (count, count))
    group = connected_components(graph, directed=False)[1]
    return np.where(np.isin(track, ends), group[track], UNKNOWN)


def _scenes(store: CropStore, track: Ints) -> Ints:
    """Number of each crop's scene: int64 (N,)."""
    count = int(track.max(initial=UNKNOWN)) + 1
    begin, end, camera = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count, np.int64)
    np.minimum.at(begin, track, np.nan_to_num(store.times_s, nan=np.inf))
    np.maximum.at(end, track, np.nan_to_num(store.times_s, nan=-np.inf))
    camera[track] = store.cameras
    size = np.bincount(track, minlength=count)
    full = np.ceil(np.bincount(store.cameras) / SCENES)
    scene = np.zeros(count, np.int64)
    number, tracks, held, at, reach = -1, 0, 0, -1, -np.inf
    for one in np.lexsort((end, begin, camera)):
        if camera[one] != at or begin[one] > reach or (held >= full[at] and tracks > 1):
            number, tracks, held, at, reach = number + 1, 0, 0, int(camera[one]), -np.inf
        scene[one] = number
        tracks, held, reach = tracks + 1, held + int(size[one]), max(reach, float(end[one]))
    return scene[track]


def sizes_of(store: CropStore, unit: Ints) -> Ints:
    """How many crops each unit has at each camera: int64 (U, C)."""
    sizes = np.zeros((int(unit.max(initial=-1)) + 1, len(store.camera_names)), np.int64)
    np.add.at(sizes, (unit, store.cameras), 1)
    return sizes


def balance(sizes: Ints, order: Sequence[int] | Ints, budget: int) -> NDArray[np.bool_]:
    """Choose units in turns: always the next one of the camera that has fewest crops so far.

    No camera gets more than `CAP` times what the median camera has to offer, none more than fits into the budget;
    a unit that does not fit is passed over whole.

    Args:
        sizes: int64 (U, C).
        order: units, first come first; of a unit at several cameras the one that sees most of it has the turn.
        budget: most crops chosen.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    offered = sizes.sum(0)
    if not offered.any():
        return chosen
    cap = CAP * np.median(offered[offered > 0])
    queues: defaultdict[int, deque[int]] = defaultdict(deque)
    for unit in order:
        queues[int(sizes[unit].argmax())].append(int(unit))
    taken = np.zeros(sizes.shape[1], np.int64)
    turns = [(0, camera) for camera in sorted(queues)]
    while turns:
        _, camera = heapq.heappop(turns)
        while queues[camera]:
            unit = queues[camera].popleft()
            after = taken + sizes[unit]
            if after.sum() <= budget and (after <= cap)[sizes[unit] > 0].all():
                taken, chosen[unit] = after, True
                heapq.heappush(turns, (int(after[camera]), camera))
                break
    return chosen


def hold_out(sizes: Ints, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose units to be judged on: of each camera about a share of its crops, never all.

    Args:
        sizes: int64 (U, C).
        share: of each camera's crops, in [0, 1).
        rng: source of chance.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    offered, held = sizes.sum(0), np.zeros(sizes.shape[1])
    for unit in rng.permutation(len(sizes)):
        here = sizes[unit] > 0
        after = held + sizes[unit]
        # a unit is taken where that brings the camera nearer to its share than leaving it would
        if (held + sizes[unit] / 2 <= share * offered)[here].all() and (after < offered)[here].all():
            held, chosen[unit] = after, True
    return chosen
