"""Separation of pairs of one person from pairs of two by similarity, with confidence intervals over tracks.

Letters: P positive pairs, M negative pairs, T tracks, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resight.arrays import Doubles, Floats, Ints
from resight.training.store.track_pairs import TrackPairs

FALSE_SHARES = (0.1, 0.01, 0.001)  # of negative pairs accepted; 1 % and 10 % as in open-set reports
RESAMPLES = 1000  # for percentile intervals of 95 %: Efron and Tibshirani 1993, section 14.2
CONFIDENCE = 0.95
MIN_TRACKS = 10  # of each kind; with fewer, resampling is meaningless
MIN_ACCEPTED = 10  # negative pairs above a threshold; with fewer, it is placed by chance


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % confidence interval (percentiles over resampled tracks)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Separation:
    """Metrics of one model with their resamples; those of `separate` are `auc`, `tpr_at_fpr_0.1` and so on.

    Attributes:
        figures: the measured metrics.
        missing: for each other metric, why it could not be measured.
        resampled: float64 (B,) for each measured metric; resample b draws the same tracks for every model.
        digest: of the pairs; only results with the same digest may be compared.
        seed: of the resamples.
    """

    figures: Mapping[str, Estimate]
    missing: Mapping[str, str]
    resampled: Mapping[str, Doubles]
    digest: str
    seed: int


@dataclass(frozen=True, eq=False)
class RankedPairs:
    """Sorted similarities, so that a resample of the pairs costs O(P + M).

    Attributes:
        negative_order: int64 (M,), negative pairs by ascending similarity.
        positive_order: int64 (P,), positive pairs likewise.
        below, upto: int64 (P,), for each ordered positive pair the number of negatives below, and at or below it.
        ties_end: int64 (M,), for each ordered negative pair the number of negatives at or below it.
    """

    negative_order: Ints
    positive_order: Ints
    below: Ints
    upto: Ints
    ties_end: Ints

    def figures(self, positive_weights: Doubles, negative_weights: Doubles, false_shares: tuple[float, ...]) -> Doubles:
        """Weighted AUC, then the share of positives accepted at each false share; (1 + len(false_shares),)."""
        heavy = np.cumsum(positive_weights[self.positive_order])
        light = np.concatenate([[0.0], np.cumsum(negative_weights[self.negative_order])])  # weight of the lowest k
        if not heavy[-1] or not light[-1]:
            return np.full(1 + len(false_shares), np.nan)  # a resample without tracks of one kind
        ordered = positive_weights[self.positive_order]
        auc = ordered @ (light[self.below] + light[self.upto]) / (2 * heavy[-1] * light[-1])
        above = light[-1] - light[self.ties_end]  # (M,) weight above each negative, descending
        # Weights are integers: the tolerance absorbs the rounding of share * total, never a whole pair.
        allowed = np.array(false_shares) * light[-1] + 1e-9 * light[-1]
        threshold = np.searchsorted(-above, -allowed)  # the lowest negative with at most that weight above it
        first = np.searchsorted(self.below, self.ties_end[threshold])  # positives above it, from here on
        accepted = heavy[-1] - np.concatenate([[0.0], heavy])[first]
        return np.concatenate([[auc], accepted / heavy[-1]])


def separate(features: Floats, pairs: TrackPairs, *, seed: int = 0) -> Separation:
    """Measure AUC and the share of positives accepted at fixed shares of false acceptance.

    AUC is P(positive > negative) + P(tie) / 2, the Mann-Whitney statistic, exact over all pairs of pairs.
    `tpr_at_fpr_a` is the share of positive pairs above the lowest threshold that at most a share a of the negative
    pairs exceeds.

    Intervals resample tracks, not pairs: pairs of one track share its person and lighting. The weight of a positive
    pair is the number of times its track was drawn, that of a negative pair the product for its two tracks (the
    pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1(2)).

    Args:
        features: float32 (N, D), unit rows.
        pairs: from `draw_track_pairs`.
        seed: of the resamples.
    """
    missing = _missing(pairs)
    shares = tuple(share for share in FALSE_SHARES if _name(share) not in missing)
    if "auc" in missing:
        return Separation({}, missing, {}, pairs.digest, seed)
    ranked = rank_pairs(pair_similarities(features, pairs.positives), pair_similarities(features, pairs.negatives))
    ones = np.ones(len(pairs.positives)), np.ones(len(pairs.negatives))
    values = ranked.figures(*ones, shares)
    drawn = np.stack([ranked.figures(*weights, shares) for weights in _resamples(pairs, seed)])  # (B, 1 + shares)
    return with_intervals(("auc", *map(_name, shares)), values, drawn, missing, pairs.digest, seed)


def with_intervals(
    names: Sequence[str], values: Doubles, drawn: Doubles, missing: Mapping[str, str], digest: str, seed: int
) -> Separation:
    """Metrics with the percentile intervals of their resamples.

    Args:
        names: F names.
        values: float64 (F,), over all pairs.
        drawn: float64 (B, F), over each resample; NaN for a resample without pairs.
        missing: names of the other metrics, with the reasons.
        digest: of the pairs measured on.
        seed: of the resamples.
    """
    bounds = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    figures = {
        name: Estimate(float(value), float(low), float(high))
        for name, value, low, high in zip(names, values, *bounds, strict=True)
    }
    return Separation(figures, missing, dict(zip(names, drawn.T, strict=True)), digest, seed)


def bootstrap_weights(count: int, seed: int) -> Iterator[Doubles]:
    """Bootstrap resamples: the number of times each of ``count`` tracks is drawn; float64 (count,) each."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)


def pair_similarities(features: Floats, rows: Ints, *, chunk: int = 1 << 14) -> Floats:
    """Cosine of each pair of rows, float32 (P,) in [-1, 1]; ``chunk`` pairs at a time, to limit memory."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        found[start : start + chunk] = np.einsum("pd,pd->p", features[part[:, 0]], features[part[:, 1]])
    return found


def _name(false_share: float) -> str:
    return f"tpr_at_fpr_{false_share:g}"


def _names() -> tuple[str, ...]:
    return ("auc", *map(_name, FALSE_SHARES))


def missing_separation(problem: str, pairs: TrackPairs, *, seed: int) -> Separation:
    """A result without metrics, each missing for the same reason."""
    return Separation({}, dict.fromkeys(_names(), problem), {}, pairs.digest, seed)


def _missing(pairs: TrackPairs) -> dict[str, str]:
    """The metrics that cannot be measured with these pairs, each with its reason."""
    names = _names()
    if not pairs.track_count:
        return dict.fromkeys(names, "the store has no tracks")
    with_pairs, overlapping = len(np.unique(pairs.positive_tracks)), len(np.unique(pairs.negative_tracks))
    if with_pairs < MIN_TRACKS:
        found = f"{with_pairs} of {pairs.track_count} tracks have two crops"
        return dict.fromkeys(names, f"{found}: expected {MIN_TRACKS} or more")
    if overlapping < MIN_TRACKS:
        found = f"{overlapping} of {pairs.track_count} tracks overlap another one of their camera in time"
        return dict.fromkeys(names, f"{found}: expected {MIN_TRACKS} or more")
    needed = {share: round(MIN_ACCEPTED / share) for share in FALSE_SHARES}
    return {
        _name(share): f"{len(pairs.negatives)} certain negative pairs: expected {count} or more"
        for share, count in needed.items()
        if len(pairs.negatives) < count
    }


def rank_pairs(positive: Floats, negative: Floats) -> RankedPairs:
    """Sort float32 (P,) similarities of pairs of one person and (M,) of pairs of two."""
    negative_order, positive_order = np.argsort(negative, kind="stable"), np.argsort(positive, kind="stable")
    ascending, ordered = negative[negative_order], positive[positive_order]
    return RankedPairs(
        negative_order,
        positive_order,
        np.searchsorted(ascending, ordered, side="left"),
        np.searchsorted(ascending, ordered, side="right"),
        np.searchsorted(ascending, ascending, side="right"),
    )


def _resamples(pairs: TrackPairs, seed: int) -> Iterator[tuple[Doubles, Doubles]]:
    """Weights of positive and negative pairs in each bootstrap resample of the tracks."""
    used, number = np.unique(
        np.concatenate([pairs.positive_tracks, pairs.negative_tracks.ravel()]), return_inverse=True
    )
    own, two = number[: len(pairs.positives)], number[len(pairs.positives) :].reshape(-1, 2)
    for times in bootstrap_weights(len(used), seed):
        yield times[own], times[two[:, 0]] * times[two[:, 1]]
