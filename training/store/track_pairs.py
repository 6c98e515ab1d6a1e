"""Pairs of crops with a certain label from tracks: one track is one person; simultaneous tracks are two persons.

The pairs depend only on the store and a seed, never on features, so that two models are compared on the same pairs.

Letters: N crops, T tracks, P positive pairs, M negative pairs, G pairs of tracks.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Ints
from resight.training.store.crops import UNKNOWN, CropStore

PAIR_LIMIT = 100_000  # of each kind: a share of 1 in 1,000 negatives is then still 100 pairs


@dataclass(frozen=True, eq=False)
class TrackPairs:
    """Pairs of crops that certainly show one person (positive) or two (negative).

    Attributes:
        tracks: int64 (N,), the track of each crop, 0..T-1, numbered per (camera, track id); -1 where unknown.
        positives: int64 (P, 2), rows of crops of one track, one from its first and one from its last half.
        positive_tracks: int64 (P,), their track.
        negatives: int64 (M, 2), rows of crops of two tracks, taken while both were in the image of one camera.
        negative_tracks: int64 (M, 2), their tracks.
        overlaps: number of pairs of tracks of one camera that overlap in time; not all are necessarily drawn.
    """

    tracks: Ints
    positives: Ints
    positive_tracks: Ints
    negatives: Ints
    negative_tracks: Ints
    overlaps: int

    @property
    def track_count(self) -> int:
        """T, the number of tracks."""
        return int(self.tracks.max(initial=UNKNOWN)) + 1

    @cached_property
    def track_pairs(self) -> Ints:
        """int64 (G, 2): the distinct pairs of tracks of two persons among the negatives."""
        return np.unique(self.negative_tracks, axis=0)

    @cached_property
    def digest(self) -> str:
        """sha256 of all pairs: metrics of two models are comparable only if it is equal."""
        digest = hashlib.sha256()
        for part in (self.positives, self.negatives, self.positive_tracks, self.negative_tracks):
            digest.update(np.ascontiguousarray(part).tobytes() + len(part).to_bytes(8, "little"))
        return digest.hexdigest()

    def of_camera(self, cameras: Ints, camera: int) -> TrackPairs:
        """The pairs of one camera.

        Args:
            cameras: int64 (N,), cameras of the crops the pairs were drawn from.
            camera: number of the camera.
        """
        positive, negative = cameras[self.positives[:, 0]] == camera, cameras[self.negatives[:, 0]] == camera
        tracks = np.where(cameras == camera, self.tracks, UNKNOWN)
        negative_tracks = self.negative_tracks[negative]
        return TrackPairs(
            tracks,
            self.positives[positive],
            self.positive_tracks[positive],
            self.negatives[negative],
            negative_tracks,
            len(np.unique(negative_tracks, axis=0)),
        )


@dataclass(frozen=True)
class _TrackLayout:
    """Crops with a track, in order of track and time; unknown times are last within a track.

    Attributes:
        rows: int64 (R,), the crops.
        rank: int64 (R,), rank of each time among all times.
        first, size: int64 (T,), start and number of crops of each track.
        timed: int64 (T,), number of its crops with a time.
    """

    rows: Ints
    rank: Ints
    times_s: NDArray[np.float64]
    first: Ints
    size: Ints
    timed: Ints

    @cached_property
    def keys(self) -> Ints:
        """int64 (R,), ascending: track and time combined, to search a track's crops by time."""
        return np.repeat(np.arange(len(self.size)), self.size) * self.ranks + self.rank

    @property
    def ranks(self) -> int:
        """Number of distinct times."""
        return int(self.rank.max(initial=0)) + 1


def draw_track_pairs(store: CropStore, *, limit: int = PAIR_LIMIT, seed: int = 0) -> TrackPairs:
    """Draw pairs with a certain label, as evenly over the tracks as their lengths allow.

    A positive pair has one crop from the first and one from the last half of a track, because neighbouring frames are
    similar for any model. A negative pair belongs to two tracks of one camera whose time intervals overlap by more than
    a single time, since a tracker that loses and restarts a person can produce tracks that touch on a coarse clock. It
    consists of a crop of the later track, taken before the earlier one ended, and the earlier track's crop that is
    nearest in time.

    Both kinds rely on the tracker: a track that switches between persons gives wrong pairs for every model alike.

    Args:
        store: N crops; crops without a track are in no pair, tracks without times in no negative pair.
        limit: maximum number of pairs of each kind.
        seed: seed of the draw.
    """
    tracks = number_tracks(store.cameras, store.tracks)
    layout = _lay_out(tracks, store.times_s)
    rng = np.random.default_rng(seed)
    positives, positive_tracks = _positives(layout, limit, rng)
    cameras = store.cameras[layout.rows[layout.first]]  # (T,)
    negatives, negative_tracks, overlaps = _negatives(layout, cameras, limit, rng)
    return TrackPairs(tracks, positives, positive_tracks, negatives, negative_tracks, overlaps)


def number_tracks(cameras: Ints, tracks: Ints) -> Ints:
    """Number the tracks of all cameras consecutively; equal ids of two cameras are two tracks.

    Args:
        cameras: int64 (N,).
        tracks: int64 (N,), -1 where unknown.

    Returns:
        int64 (N,), 0..T-1, -1 where unknown.
    """
    known = np.flatnonzero(tracks != UNKNOWN)
    order = known[np.lexsort((tracks[known], cameras[known]))]
    new = (np.diff(cameras[order]) != 0) | (np.diff(tracks[order]) != 0)
    numbers = np.full(len(tracks), UNKNOWN, np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(new)])[: len(order)]
    return numbers


def _lay_out(tracks: Ints, times_s: NDArray[np.float64]) -> _TrackLayout:
    known = np.flatnonzero(tracks != UNKNOWN)
    rows = known[np.lexsort((times_s[known], tracks[known]))]  # stable; NaN last
    _, rank = np.unique(times_s[rows], return_inverse=True)  # NaN last, as one value
    size = np.bincount(tracks[rows])
    timed = np.bincount(tracks[rows], weights=np.isfinite(times_s[rows]), minlength=len(size)).astype(np.int64)
    return _TrackLayout(rows, rank.astype(np.int64), times_s[rows], np.cumsum(size) - size, size, timed)


def _positives(layout: _TrackLayout, limit: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Rows (P, 2) and tracks (P,) of pairs across the halves of a track; a middle crop belongs to neither half."""
    half = layout.size // 2
    track, number = sample_evenly(half**2, limit, rng)
    early, late = np.divmod(number, half[track])
    start = layout.first[track]
    positions = np.stack([start + early, start + (layout.size - half)[track] + late], 1)
    return layout.rows[positions], track


def _negatives(layout: _TrackLayout, cameras: Ints, limit: int, rng: np.random.Generator) -> tuple[Ints, Ints, int]:
    """Rows (M, 2) and tracks (M, 2) of simultaneous pairs in one camera, and the number of overlapping track pairs."""
    timed = np.flatnonzero(layout.timed > 0)
    begin = layout.rank[layout.first[timed]]
    end = layout.rank[layout.first[timed] + layout.timed[timed] - 1]
    # Ordered by begin, then end: a track of a single time precedes a longer one with the same begin, so it does not
    # overlap with those that follow.
    order = np.lexsort((end, begin, cameras[timed]))
    ordered, offset = timed[order], cameras[timed[order]] * layout.ranks
    partners = np.searchsorted(offset + begin[order], offset + end[order]) - np.arange(len(order)) - 1
    partners = np.maximum(partners, 0)
    overlaps = int(partners.sum())
    position, number = sample_evenly(partners, limit, rng)
    earlier, later = ordered[position], ordered[position + 1 + number]
    return *_simultaneous(layout, earlier, later, limit, rng), overlaps


def _simultaneous(
    layout: _TrackLayout, earlier: Ints, later: Ints, limit: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Pairs of a crop of the later track, before the earlier one ends, and the earlier one's nearest in time."""
    ends = layout.rank[layout.first[earlier] + layout.timed[earlier] - 1]
    joint = np.searchsorted(layout.keys, later * layout.ranks + ends, side="right") - layout.first[later]
    pair, number = sample_evenly(joint, limit, rng)
    one, other = earlier[pair], later[pair]
    anchor = layout.first[other] + number
    after = np.searchsorted(layout.keys, one * layout.ranks + layout.rank[anchor])
    low, high = layout.first[one], layout.first[one] + layout.timed[one] - 1
    before, after = np.clip(after - 1, low, high), np.clip(after, low, high)
    gap_before = np.abs(layout.times_s[anchor] - layout.times_s[before])
    gap_after = np.abs(layout.times_s[after] - layout.times_s[anchor])
    nearest = np.where(gap_after < gap_before, after, before)
    return layout.rows[np.stack([nearest, anchor], 1)], np.stack([one, other], 1)


def sample_evenly(sizes: Ints, limit: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Sample members of groups without repeats: at most the same number per group, and a limit in total.

    Within a group members are evenly spaced from a random start, so each is equally likely.

    Args:
        sizes: int64 (G,), members of each group.
        limit: maximum number of samples; all members if there are no more.
        rng: the only source of randomness.

    Returns:
        int64 group and int64 member, 0..size-1, of each sample, ordered by group.
    """
    most = bisect_right(range(limit + 1), limit, key=lambda cap: int(np.minimum(sizes, cap).sum())) - 1
    quota = np.minimum(sizes, most)
    if most == 0 and len(sizes):  # more groups than the limit: one member from some of them
        filled = np.flatnonzero(sizes)
        quota[filled[(np.arange(limit) * len(filled) + rng.integers(len(filled))) // limit]] = 1
    group = np.repeat(np.arange(len(sizes)), quota)
    position = np.arange(len(group)) - np.repeat(np.cumsum(quota) - quota, quota)
    start = rng.integers(np.maximum(sizes, 1))
    return group, (position * sizes[group] + start[group]) // quota[group]
