"""Reliability of a calibration: predicted against observed shares, with confidence intervals over persons.

Letters: P pairs of one person, M pairs of two, B bins, H bars.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resight.arrays import Doubles, Ints

BINS = 10
BARS = 50
RESAMPLES = 200  # enough for error bars: Efron and Tibshirani 1993, section 6.4
CONFIDENCE = 0.95
PositiveNegative = tuple[Doubles, Doubles]  # of positives and of negatives


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """The reliability of a calibration on held-out pairs, with equal total weight on both kinds.

    Attributes:
        predicted: float64 (B,), mean probability of the pairs whose probability is in [b / B, (b + 1) / B).
        observed: float64 (B,), share of pairs of one person among them; NaN, as the above, without pairs.
        low, high: float64 (B,), 95 % confidence interval of ``observed``, from resampled persons.
        positives, negatives: int64 (B,), number of pairs of each kind.
        edges: float64 (H + 1,), cosine similarities.
        positive_shares, negative_shares: float64 (H,), share of the pairs of each kind between two edges.
        error: expected calibration error (Naeini et al. 2015): mean of |predicted - observed|, weighted by pairs.
        brier: mean squared difference of probability and truth, 0 is perfect, 0.25 is a constant half.
    """

    predicted: Doubles
    observed: Doubles
    low: Doubles
    high: Doubles
    positives: Ints
    negatives: Ints
    edges: Doubles
    positive_shares: Doubles
    negative_shares: Doubles
    error: float
    brier: float


@dataclass(frozen=True, eq=False)
class Reliability:
    """The reliability of a calibration, or why there is none.

    Attributes:
        problem: why there is no calibration; empty if there is one.
        notes: sentences about its limits.
        curve: None without a calibration.
    """

    problem: str = ""
    notes: tuple[str, ...] = ()
    curve: ReliabilityCurve | None = None


def measure_reliability(
    similarity: PositiveNegative,
    probability: PositiveNegative,
    units: tuple[Ints, Ints],
    *,
    notes: tuple[str, ...] = (),
    seed: int = 0,
) -> Reliability:
    """Compare held-out probabilities with the truth.

    Args:
        similarity: float64 (P,) and (M,).
        probability: float64 (P,) and (M,), NaN if not fitted.
        units: int64 (P, 2) and (M, 2), the persons of each pair's crops; resampled as a whole.
        notes: see `Reliability`.
        seed: of the resamples.
    """
    fitted = np.isfinite(probability[0]), np.isfinite(probability[1])
    positive, negative = probability[0][fitted[0]], probability[1][fitted[1]]
    bins = _bin(positive), _bin(negative)
    counts = np.bincount(bins[0], minlength=BINS), np.bincount(bins[1], minlength=BINS)
    one, two = (count / max(count.sum(), 1) for count in counts)
    weight = one + two
    sums = np.bincount(bins[0], positive, BINS) / max(len(positive), 1)
    sums += np.bincount(bins[1], negative, BINS) / max(len(negative), 1)
    with np.errstate(invalid="ignore"):  # bins without pairs
        predicted, observed = sums / weight, one / weight
    drawn = np.stack(list(_resample(bins, (units[0][fitted[0]], units[1][fitted[1]]), seed)))
    edges = _edges(similarity)
    bars = [np.histogram(part, edges)[0] / len(part) for part in similarity]
    curve = ReliabilityCurve(
        predicted,
        observed,
        _quantile(drawn, (1 - CONFIDENCE) / 2),
        _quantile(drawn, (1 + CONFIDENCE) / 2),
        counts[0],
        counts[1],
        edges,
        bars[0],
        bars[1],
        float(np.nansum(np.abs(predicted - observed) * weight) / 2),
        float((np.square(1 - positive).mean() + np.square(negative).mean()) / 2),
    )
    return Reliability(notes=notes, curve=curve)


def _bin(probability: Doubles) -> Ints:
    """The bin of each probability; 1 is in the last bin."""
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def _resample(bins: tuple[Ints, Ints], units: tuple[Ints, Ints], seed: int) -> Iterator[Doubles]:
    """Observed shares (B,) in resamples of the persons; a pair's weight is the product of its two (Owen 2007)."""
    rng = np.random.default_rng(seed)
    names, number = np.unique(np.concatenate([part.ravel() for part in units]), return_inverse=True)
    split = np.split(number, [units[0].size])
    pairs = [part.reshape(-1, 2) for part in split]
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)).astype(np.float64)
        shares = []
        for number_of_bin, (one, other) in zip(bins, (part.T for part in pairs), strict=True):
            weight = np.where(one == other, times[one], times[one] * times[other])
            sums = np.bincount(number_of_bin, weight, BINS)
            shares.append(sums / max(sums.sum(), 1.0))
        total = shares[0] + shares[1]
        yield np.where(total > 0, shares[0] / np.where(total > 0, total, 1.0), np.nan)


def _quantile(drawn: Doubles, q: float) -> Doubles:
    """Quantile of each column without NaN; NaN for columns of NaN only."""
    empty = np.isnan(drawn).all(0)
    return np.where(empty, np.nan, np.nanquantile(np.where(empty, 0.0, drawn), q, axis=0))


def _edges(similarity: PositiveNegative) -> Doubles:
    """Equal steps from the least to the most similar pair."""
    low, high = min(part.min() for part in similarity), max(part.max() for part in similarity)
    return np.linspace(low, high, BARS + 1)
