"""Searches scored by tracks: the first half of each track is enrolled, crops of the second half are searched for.

Only tracks that overlap in time in one camera certainly show different persons (`track_pairs`), so the search of a
track is limited to its own entry and the entries of those tracks. FPIR and TPIR are defined in
`resight.metrics.open_set`; the lists are small here, so the metrics compare models on one store, not stores.

Letters: N crops, D feature size, T tracks, Q searches, E (search, stranger) pairs, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Doubles, Floats, Ints
from resight.training.judging.separation import (
    MIN_ACCEPTED,
    MIN_TRACKS,
    Separation,
    bootstrap_weights,
    pair_similarities,
    with_intervals,
)
from resight.training.store.track_pairs import TrackPairs

FPIR_TARGETS = (0.1, 0.01)  # as in `resight evaluate`


@dataclass(frozen=True, eq=False)
class _TrackSearches:
    """The results of all searches.

    Attributes:
        tracks: int64 (Q,), of the track searched for.
        own: float32 (Q,), similarity to its own entry.
        stranger: float32 (Q,), to the most similar entry of another person.
    """

    tracks: Ints
    own: Floats
    stranger: Floats


def search_tracks(features: Floats, pairs: TrackPairs, *, seed: int = 0) -> Separation:
    """TPIR at fixed FPIR of searches among tracks.

    Every search is run twice, as with the two lists in `resight.metrics.open_set`: with the own track enrolled (mated)
    and without it (non-mated). Intervals resample tracks.

    Args:
        features: float32 (N, D), unit rows.
        pairs: from `draw_track_pairs`; their crops are enrolled and searched.
        seed: of the resamples.

    Returns:
        Metrics `tpir_at_fpir_0.1` and `tpir_at_fpir_0.01`, at rank 1.
    """
    probes, tracks, edges = _plan(pairs)
    missing = _missing(probes, tracks)
    targets = tuple(target for target in FPIR_TARGETS if _name(target) not in missing)
    if not targets:
        return Separation({}, missing, {}, pairs.digest, seed)
    found = _search(features, pairs, probes, tracks, edges)
    _, number = np.unique(tracks, return_inverse=True)
    figures = _RankedSearches(found)
    values = figures.at(np.ones(len(tracks)), targets)
    drawn = np.stack([figures.at(weights[number], targets) for weights in bootstrap_weights(number.max() + 1, seed)])
    return with_intervals([_name(target) for target in targets], values, drawn, missing, pairs.digest, seed)


def missing_searches(problem: str, pairs: TrackPairs, *, seed: int) -> Separation:
    """A result without metrics, each missing for the same reason."""
    return Separation({}, dict.fromkeys(map(_name, FPIR_TARGETS), problem), {}, pairs.digest, seed)


def _name(target: float) -> str:
    return f"tpir_at_fpir_{target:g}"


def _plan(pairs: TrackPairs) -> tuple[Ints, Ints, Ints]:
    """Crops searched (Q,), their tracks (Q,), and (E, 2) pairs of a search and a track of another person."""
    enrolled = np.zeros(pairs.track_count, bool)
    enrolled[pairs.positive_tracks] = True
    both_ways = np.concatenate([pairs.track_pairs, pairs.track_pairs[:, ::-1]])
    meets = np.unique(both_ways[enrolled[both_ways].all(1)], axis=0)  # by track, then stranger
    strangers = np.bincount(meets[:, 0], minlength=pairs.track_count)
    crops = np.unique(np.stack([pairs.positive_tracks, pairs.positives[:, 1]], 1), axis=0)
    crops = crops[strangers[crops[:, 0]] > 0]
    tracks, probes = crops.T
    count = strangers[tracks]
    search = np.repeat(np.arange(len(probes)), count)
    first = (np.cumsum(strangers) - strangers)[tracks]
    place = np.arange(len(search)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    return probes, tracks, np.stack([search, meets[place, 1]], 1)


def _search(features: Floats, pairs: TrackPairs, probes: Ints, tracks: Ints, edges: Ints) -> _TrackSearches:
    """Similarities of every search to its own entry and to its nearest stranger."""
    entries = np.zeros((pairs.track_count, features.shape[1]), np.float32)
    enrolled = np.unique(np.stack([pairs.positive_tracks, pairs.positives[:, 0]], 1), axis=0)
    np.add.at(entries, enrolled[:, 0], features[enrolled[:, 1]])
    entries /= np.linalg.norm(entries, axis=1, keepdims=True).clip(1e-12)
    both = np.concatenate([features, entries])
    own = pair_similarities(both, np.stack([probes, len(features) + tracks], 1))
    met = pair_similarities(both, np.stack([probes[edges[:, 0]], len(features) + edges[:, 1]], 1))
    first = np.searchsorted(edges[:, 0], np.arange(len(probes)))
    return _TrackSearches(tracks, own, np.maximum.reduceat(met, first))


class _RankedSearches:
    """Searches in order, so that a resample of the tracks costs O(Q)."""

    def __init__(self, found: _TrackSearches) -> None:
        self.falling = np.argsort(-found.stranger, kind="stable")
        above = found.own > found.stranger  # rank 1; ties do not count
        self.hits = np.flatnonzero(above)[np.argsort(-found.own[above], kind="stable")]
        # For each non-mated search the number of hits above it.
        self.ahead = np.searchsorted(-found.own[self.hits], -found.stranger[self.falling], side="left")

    def at(self, weights: Doubles, targets: tuple[float, ...]) -> Doubles:
        """Weighted TPIR at each FPIR, (len(targets),); NaN for a resample without searches."""
        false = np.cumsum(weights[self.falling])
        total = false[-1]
        if not total:
            return np.full(len(targets), np.nan)
        right = np.concatenate([[0.0], np.cumsum(weights[self.hits])])
        # The threshold is just above the first non-mated search that would exceed the FPIR.
        last = np.searchsorted(false, np.array(targets) * total + 1e-9 * total, side="right").clip(max=len(false) - 1)
        found: NDArray[np.float64] = right[self.ahead[last]] / total
        return found


def _missing(probes: Ints, tracks: Ints) -> dict[str, str]:
    """The metrics that cannot be measured with these searches, each with its reason."""
    searched = len(np.unique(tracks))
    if searched < MIN_TRACKS:
        why = f"{searched} tracks with several crops overlap another such track in time: expected {MIN_TRACKS} or more"
        return dict.fromkeys(map(_name, FPIR_TARGETS), why)
    needed = {target: round(MIN_ACCEPTED / target) for target in FPIR_TARGETS}
    return {
        _name(target): f"{len(probes)} searches: expected {count} or more"
        for target, count in needed.items()
        if len(probes) < count
    }
