"""Pairs of crops whose truth tracks tell: one passage is one person, and nobody is twice in one picture.

Everything here follows from the store and a seed alone, never from features, so two models meet the same pairs.

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
    """Which crops surely show one person and which surely two.

    Attributes:
        tracks: int64 (N,), the track of each crop, 0..T-1, one number for each (camera, track id); -1 where unknown.
        positives: int64 (P, 2), rows of crops of one track, one of its first and one of its last half.
        positive_tracks: int64 (P,), their track.
        negatives: int64 (M, 2), rows of crops of two tracks, taken while both were in one camera's picture.
        negative_tracks: int64 (M, 2), their tracks.
        overlaps: how many pairs of tracks of one camera overlap in time; not all need be drawn.
    """

    tracks: Ints
    positives: Ints
    positive_tracks: Ints
    negatives: Ints
    negative_tracks: Ints
    overlaps: int

    @property
    def track_count(self) -> int:
        """T."""
        return int(self.tracks.max(initial=UNKNOWN)) + 1

    @cached_property
    def track_pairs(self) -> Ints:
        """int64 (G, 2): the drawn pairs of tracks that surely show two persons, each once."""
        return np.unique(self.negative_tracks, axis=0)

    @cached_property
    def digest(self) -> str:
        """sha256 of all pairs: figures of two models may be set against each other only where it is equal."""
        digest = hashlib.sha256()
        for part in (self.positives, self.negatives, self.positive_tracks, self.negative_tracks):
            digest.update(np.ascontiguousarray(part).tobytes() + len(part).to_bytes(8, "little"))
        return digest.hexdigest()

    def of_camera(self, cameras: Ints, camera: int) -> TrackPairs:
        """The pairs drawn of one camera.

        Args:
            cameras: int64 (N,), of the crops these pairs were drawn from.
            camera: its number.
        """
        of_one, of_two = cameras[self.positives[:, 0]] == camera, cameras[self.negatives[:, 0]] == camera
        tracks = np.where(cameras == camera, self.tracks, UNKNOWN)
        two = self.negative_tracks[of_two]
        return TrackPairs(
            tracks,
            self.positives[of_one],
            self.positive_tracks[of_one],
            self.negatives[of_two],
            two,
            len(np.unique(two, axis=0)),
        )


@dataclass(frozen=True)
class _TrackLayout:
    """Crops with a track, in order of track and time; unknown times come last within a track.

    Attributes:
        rows: int64 (R,), the crops.
        rank: int64 (R,), place of each time among all times.
        first, size: int64 (T,), where each track begins and how many crops it has.
        timed: int64 (T,), how many of them have a time.
    """

    rows: Ints
    rank: Ints
    times_s: NDArray[np.float64]
    first: Ints
    size: Ints
    timed: Ints

    @cached_property
    def keys(self) -> Ints:
        """int64 (R,), ascending: track and time as one number, to search a track's crops by time."""
        return np.repeat(np.arange(len(self.size)), self.size) * self.ranks + self.rank

    @property
    def ranks(self) -> int:
        """How many different times there are."""
        return int(self.rank.max(initial=0)) + 1


def draw_track_pairs(store: CropStore, *, limit: int = PAIR_LIMIT, seed: int = 0) -> TrackPairs:
    """Draw pairs of certain truth, as evenly over the tracks as their lengths allow.

    A positive pair takes one crop of the first and one of the last half of a track: neighbouring frames are alike
    for any model. A negative pair belongs to two tracks of one camera whose time intervals overlap in more than an
    instant, since a tracker that loses a person and starts anew can touch itself on a coarse clock. Its crops are one
    of the later track, taken before the earlier one ended, and the earlier one's nearest to it in time.

    Both rest on the tracker: a track that jumps from one person to another spoils both kinds of pairs alike for
    every model.

    Args:
        store: N crops; crops without a track make no pair, tracks without times no negative pair.
        limit: most pairs of each kind.
        seed: of the draw.
    """
    tracks = number_tracks(store.cameras, store.tracks)
    layout = _lay_out(tracks, store.times_s)
    rng = np.random.default_rng(seed)
    positives, positive_tracks = _positives(layout, limit, rng)
    cameras = store.cameras[layout.rows[layout.first]]  # (T,)
    negatives, negative_tracks, overlaps = _negatives(layout, cameras, limit, rng)
    return TrackPairs(tracks, positives, positive_tracks, negatives, negative_tracks, overlaps)


def number_tracks(cameras: Ints, tracks: Ints) -> Ints:
    """Number the tracks of all cameras through; equal ids of two cameras are two tracks.

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
    """Rows (P, 2) and tracks (P,) of pairs across the halves of a track; a middle crop is in neither half."""
    half = layout.size // 2
    track, number = sample_evenly(half**2, limit, rng)
    early, late = np.divmod(number, half[track])
    start = layout.first[track]
    places = np.stack([start + early, start + (layout.size - half)[track] + late], 1)
    return layout.rows[places], track


def _negatives(layout: _TrackLayout, cameras: Ints, limit: int, rng: np.random.Generator) -> tuple[Ints, Ints, int]:
    """Rows (M, 2) and tracks (M, 2) of pairs in one camera at one time, and how many pairs of tracks overlap."""
    timed = np.flatnonzero(layout.timed > 0)
    begin = layout.rank[layout.first[timed]]
    end = layout.rank[layout.first[timed] + layout.timed[timed] - 1]
    # By begin, then end: a passage of one instant comes before a longer one that begins with it, and so is none
    # of those that follow and begin before its end.
    order = np.lexsort((end, begin, cameras[timed]))
    ordered, at = timed[order], cameras[timed[order]] * layout.ranks
    partners = np.searchsorted(at + begin[order], at + end[order]) - np.arange(len(order)) - 1
    partners = np.maximum(partners, 0)
    overlaps = int(partners.sum())
    place, number = sample_evenly(partners, limit, rng)
    earlier, later = ordered[place], ordered[place + 1 + number]
    return *_simultaneous(layout, earlier, later, limit, rng), overlaps


def _simultaneous(
    layout: _TrackLayout, earlier: Ints, later: Ints, limit: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Crops of each later track while the earlier one lasts, each with the earlier one's nearest in time."""
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
    """Choose members of groups without repeats, up to one number for all groups and a limit over all.

    Within a group members are evenly spaced from a random start, so that each is equally likely.

    Args:
        sizes: int64 (G,), members of each group.
        limit: most members chosen; below it all are taken.
        rng: source of chance.

    Returns:
        int64 group and int64 member, 0..size-1, of each chosen one; in order of groups.
    """
    most = bisect_right(range(limit + 1), limit, key=lambda cap: int(np.minimum(sizes, cap).sum())) - 1
    quota = np.minimum(sizes, most)
    if most == 0 and len(sizes):  # more groups than the limit: one member of some
        filled = np.flatnonzero(sizes)
        quota[filled[(np.arange(limit) * len(filled) + rng.integers(len(filled))) // limit]] = 1
    group = np.repeat(np.arange(len(sizes)), quota)
    place = np.arange(len(group)) - np.repeat(np.cumsum(quota) - quota, quota)
    start = rng.integers(np.maximum(sizes, 1))
    return group, (place * sizes[group] + start[group]) // quota[group]
