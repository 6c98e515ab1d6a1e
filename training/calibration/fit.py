"""Fit of the calibration of similarity on a site's own crops, without labels; docs/calibration.md has measurements.

The pairs to fit to must be such as a search compares: from different cameras. Pairs within a track are seconds apart in
front of one wall, and far more similar. Pairs within a cluster are selected for being similar. Therefore a crop gets
the cluster of the *other* crops of its track: whether a pair is selected does not depend on its own similarity.

Letters: N crops, D feature size, K clusters, U units, P pairs of one person, M pairs of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from resight.arrays import Doubles, Floats, Ints
from resight.calibration import MAX_SLOPE, Calibration
from resight.errors import TrainingError
from resight.training.calibration.reliability import Reliability, measure_reliability
from resight.training.clustering.cluster import ClusterSettings, try_cluster
from resight.training.clustering.dbscan import OUTLIER
from resight.training.judging.separation import MIN_ACCEPTED, pair_similarities
from resight.training.store.crops import CropStore
from resight.training.store.track_pairs import draw_track_pairs, number_tracks, sample_evenly

POSITIVE_LIMIT = 50_000
NEGATIVE_DRAWS = 200_000  # enough for a share of 1 in 1,000


@dataclass(frozen=True, eq=False)
class SearchPairs:
    """Pairs of crops from different cameras.

    Attributes:
        positives: int64 (P, 2), rows of crops that probably show one person.
        negatives: int64 (M, 2), rows of crops that almost certainly show two.
        units: int64 (N,), 0..U-1: the cluster of a crop, else its track, else the crop alone. Pairs that share a unit
            share a person, so whole units are held out and resampled.
        clusters: number of clusters that the positives are from.
        by_track: whether clusters were assigned by tracks; without tracks a crop has its own cluster.
    """

    positives: Ints
    negatives: Ints
    units: Ints
    clusters: int
    by_track: bool


def draw_search_pairs(store: CropStore, labels: Ints, *, seed: int = 0) -> SearchPairs:
    """Draw pairs across cameras: positives evenly over clusters, negatives at random.

    With K persons, one in K random pairs shows one person; pairs that share a cluster, by their own label or by that of
    their tracks, are excluded from the negatives.

    Args:
        store: N crops; labels of persons are not used.
        labels: int64 (N,), clusters, -1 for outliers.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    tracks = number_tracks(store.cameras, store.tracks)
    by_track = bool((np.bincount(tracks[tracks >= 0], minlength=1) > 1).any())
    assigned = label_by_track(labels, tracks) if by_track else labels
    positives = _pairs_within(assigned, store.cameras, rng)
    drawn = np.unique(np.sort(rng.integers(len(store), size=(NEGATIVE_DRAWS, 2)), axis=1), axis=0)
    one, other = drawn.T
    across = store.cameras[one] != store.cameras[other]
    together = _same_cluster(labels, one, other) | _same_cluster(assigned, one, other)
    negatives = drawn[across & ~together]
    return SearchPairs(
        positives, negatives, _units(labels, assigned, tracks), len(np.unique(assigned[positives[:, 0]])), by_track
    )


def label_by_track(labels: Ints, tracks: Ints) -> Ints:
    """For each crop the most frequent cluster among the other crops of its track; the lowest in case of a tie.

    Args:
        labels: int64 (N,), -1 for outliers.
        tracks: int64 (N,), -1 if unknown.

    Returns:
        int64 (N,), -1 if no other crop of the track is in a cluster.
    """
    known = (tracks >= 0) & (labels != OUTLIER)
    found = np.full(len(labels), OUTLIER, np.int64)
    if not known.any():
        return found
    clusters = labels.max() + 1
    cell, count = np.unique(tracks[known] * clusters + labels[known], return_counts=True)
    track, label = np.divmod(cell, clusters)
    order = np.lexsort((label, -count, track))  # the most frequent of a track first
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
    left = most[mine] - (own == best[mine])  # excluding the crop itself
    tie = (left == fewer[mine]) & (left > 0)
    found[has] = np.where(left > fewer[mine], best[mine], second[mine])
    found[has[tie]] = np.minimum(best[mine], second[mine])[tie]
    return found


def _pairs_within(labels: Ints, cameras: Ints, rng: np.random.Generator) -> Ints:
    """Rows (P, 2) of crops with the same label and different cameras, as evenly over labels as possible."""
    rows = np.flatnonzero(labels != OUTLIER)
    rows = rows[np.lexsort((rng.permutation(len(rows)), labels[rows]))]
    _, first, size = np.unique(labels[rows], return_index=True, return_counts=True)
    group, number = sample_evenly(size * (size - 1) // 2, POSITIVE_LIMIT, rng)
    high = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)  # number = high (high - 1) / 2 + low
    high -= high * (high - 1) // 2 > number  # if the root was rounded up
    low = number - high * (high - 1) // 2
    pairs = rows[np.stack([first[group] + low, first[group] + high], axis=1)]
    return np.asarray(pairs[cameras[pairs[:, 0]] != cameras[pairs[:, 1]]], np.int64)


def _same_cluster(labels: Ints, one: Ints, other: Ints) -> NDArray[np.bool_]:
    """Whether two crops share a cluster."""
    return np.asarray((labels[one] == labels[other]) & (labels[one] != OUTLIER))


def _units(labels: Ints, assigned: Ints, tracks: Ints) -> Ints:
    """The unit of each crop: its cluster, else its track, else the crop alone."""
    cluster = np.where(assigned != OUTLIER, assigned, labels)
    names = np.where(
        cluster != OUTLIER, 3 * cluster, np.where(tracks >= 0, 3 * tracks + 1, 3 * np.arange(len(labels)) + 2)
    )
    return np.asarray(np.unique(names, return_inverse=True)[1], np.int64)


# Each camera's mean is subtracted before clustering, else persons are split by camera and positives are too similar:
# the error on unadapted weights falls from 0.12 to 0.02.
CLUSTERING = ClusterSettings(centre_cameras=True)
FALSE_ACCEPT_SHARES = (0.001, 0.01)  # the first for which there are enough negatives
FALSE_REJECT_SHARE = 0.05
MIN_CLUSTERS = 20  # errors with 20 persons were 0.01-0.08, with 10 up to 0.13
MIN_POSITIVES = 100
# Persons whose crops are similar are in clusters, the others are outliers: with 25 % outliers the error was 0.02, with
# 76 % 0.06. Without tracks, which assign outliers to clusters, it was 0.02 with 15 % and 0.05 with 25 %.
OUTLIER_LIMIT, TRACKLESS_OUTLIER_LIMIT = 0.5, 0.2
MIN_CERTAIN = 100  # pairs: a percentage of fewer is not meaningful
FOLDS = 5
# Spread of the middle 90 % of cosines of two persons, below which thresholds need three digits.
NARROW_SPREAD = 0.1


class LogisticFit(NamedTuple):
    """Log-odds as a straight line: ``slope * (similarity - midpoint)``."""

    midpoint: float
    slope: float

    def probability(self, similarity: Doubles) -> Doubles:
        """Probability at even odds."""
        return np.asarray(expit(self.slope * (similarity - self.midpoint)), np.float64)


def calibrate(features: Floats, store: CropStore, *, seed: int = 0) -> tuple[Calibration | None, Reliability]:
    """Fit similarity to the probability that two crops of different cameras show one person.

    Positives are pairs whose tracks' other crops share a cluster, negatives random pairs that share none
    (`draw_search_pairs`); labels of persons are not used. The curve is logistic (Platt 1999) with equal weight on both
    kinds. ``accept`` is a quantile of the negatives, ``reject`` of the positives, independent of the curve's form.

    Args:
        features: float32 (N, D), unit rows.
        store: the N crops, in the same order, from two cameras or more.
        seed: of the pairs drawn, of the folds and of the resamples.

    Returns:
        The calibration; None with the reason in ``Reliability.problem`` if there is too little data.
    """
    assert len(features) == len(store), (len(features), len(store))
    drawn = _draw_pairs(features, store, seed)
    if isinstance(drawn, str):
        return None, Reliability(drawn)
    positive = pair_similarities(features, drawn.positives).astype(np.float64)
    negative = pair_similarities(features, drawn.negatives).astype(np.float64)
    line = fit_line(positive, negative)
    if line is None:
        return None, Reliability(
            f"pairs of one person have a mean similarity of {positive.mean():.3f}, pairs of two {negative.mean():.3f}: "
            "expected a model that separates them; adapt it to the site first"
        )
    accept, accept_share = _accept_threshold(negative)
    accept_probability, reject_probability = (
        float(np.clip(line.probability(np.array(at)), 1e-6, 1 - 1e-6)) for at in (accept, _reject_threshold(positive))
    )
    held_out = _cross_validated(positive, negative, drawn, seed)
    certain = pair_similarities(features, draw_track_pairs(store, seed=seed).negatives)
    reliability = measure_reliability(
        (positive, negative),
        held_out,
        (drawn.units[drawn.positives], drawn.units[drawn.negatives]),
        notes=_notes(negative, certain >= accept, drawn),
        seed=seed,
    )
    assert reliability.curve is not None
    source = "tracks whose other crops share a cluster" if drawn.by_track else "crops that share a cluster"
    return Calibration(
        line.midpoint,
        line.slope,
        accept_probability,
        min(reject_probability, accept_probability),  # equal if the model separates all pairs
        accept_share,
        FALSE_REJECT_SHARE,
        len(positive),
        len(negative),
        f"two cameras, {source}, {drawn.clusters} clusters",
        "two cameras, by chance, no cluster shared",
        reliability.curve.error,
    ), reliability


def fit_line(positive: Doubles, negative: Doubles) -> LogisticFit | None:
    """Logistic regression on one variable with equal total weight on both kinds and Platt's targets.

    Targets are (n + 1) / (n + 2) and 1 / (n + 2) (Platt 1999, section 2.2), so that the slope is finite.

    Args:
        positive: float64 (P,), similarities.
        negative: float64 (M,), likewise.

    Returns:
        None if probability does not rise with similarity, or the midpoint is not a cosine.
    """
    both = np.concatenate([positive, negative])
    centre, scale = float((positive.mean() + negative.mean()) / 2), float(both.std())
    if scale < 1 / MAX_SLOPE:
        return None
    target = np.repeat(
        [(len(positive) + 1) / (len(positive) + 2), 1 / (len(negative) + 2)], [len(positive), len(negative)]
    )
    weight = np.repeat([0.5 / len(positive), 0.5 / len(negative)], [len(positive), len(negative)])
    x = (both - centre) / scale

    def loss(line: Doubles) -> tuple[float, Doubles]:
        odds = line[0] * x + line[1]
        slack = weight * (expit(odds) - target)
        return float(weight @ (np.logaddexp(0, odds) - target * odds)), np.array([slack @ x, slack.sum()])

    slope, shift = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-7}).x
    if not 0 < slope / scale <= MAX_SLOPE:
        return None
    midpoint = centre - float(shift / slope) * scale
    return LogisticFit(midpoint, float(slope / scale)) if -1 <= midpoint <= 1 else None


def _draw_pairs(features: Floats, store: CropStore, seed: int) -> SearchPairs | str:
    """Pairs to fit to, or the reason why there are not enough."""
    cameras = len(np.unique(store.cameras))
    if cameras < 2:
        return (
            f"{len(store)} crops of {cameras} camera: expected two cameras or more, since a search compares crops of "
            "different ones"
        )
    clustering = try_cluster(features, store, CLUSTERING)
    if isinstance(clustering, TrainingError):
        return str(clustering)
    drawn = draw_search_pairs(store, clustering.labels, seed=seed)
    outliers = float((clustering.labels == OUTLIER).mean())
    limit = OUTLIER_LIMIT if drawn.by_track else TRACKLESS_OUTLIER_LIMIT
    if outliers > limit:
        of_tracks = "with" if drawn.by_track else "without"
        return (
            f"{outliers:.0%} of {len(store)} crops are in no cluster: expected {limit:.0%} or less {of_tracks} tracks; "
            "adapt the model to the site first"
        )
    if drawn.clusters < MIN_CLUSTERS or len(drawn.positives) < MIN_POSITIVES:
        return (
            f"{len(drawn.positives)} pairs across cameras in {drawn.clusters} clusters: expected {MIN_POSITIVES} pairs "
            f"in {MIN_CLUSTERS} clusters or more; give more crops of people seen by two cameras"
        )
    needed = math.ceil(MIN_ACCEPTED / max(FALSE_ACCEPT_SHARES))
    if len(drawn.negatives) < needed:
        return f"{len(drawn.negatives)} pairs of two persons across cameras: expected {needed} or more; give more crops"
    return drawn


def _accept_threshold(negative: Doubles) -> tuple[float, float]:
    """The lowest threshold that at most a given share of the negatives reaches, and that share."""
    share = next(share for share in FALSE_ACCEPT_SHARES if share * len(negative) >= MIN_ACCEPTED)
    descending = np.sort(negative)[::-1]
    return float(np.nextafter(np.float32(descending[math.floor(share * len(negative))]), np.float32(np.inf))), share


def _reject_threshold(positive: Doubles) -> float:
    """The highest threshold below which at most `FALSE_REJECT_SHARE` of the positives are."""
    return float(np.sort(positive)[math.floor(FALSE_REJECT_SHARE * len(positive))])


def _cross_validated(positive: Doubles, negative: Doubles, drawn: SearchPairs, seed: int) -> tuple[Doubles, Doubles]:
    """Probability of each pair from a line fitted to pairs that share no unit with its fold."""
    rng = np.random.default_rng(seed)
    fold = rng.permutation(int(drawn.units.max()) + 1) % FOLDS
    of_positive, of_negative = (fold[drawn.units[rows]] for rows in (drawn.positives, drawn.negatives))
    found = np.full(len(positive), np.nan), np.full(len(negative), np.nan)
    for held in range(FOLDS):
        line = fit_line(positive[(of_positive != held).all(1)], negative[(of_negative != held).all(1)])
        if line is None:
            continue
        for similarity, folds, probability in zip((positive, negative), (of_positive, of_negative), found, strict=True):
            own = folds[:, 0] == held
            probability[own] = line.probability(similarity[own])
    return found


def _notes(negative: Doubles, certain_accepted: NDArray[np.bool_], drawn: SearchPairs) -> tuple[str, ...]:
    """Notes for the reader of the report."""
    low, high = np.quantile(negative, [0.05, 0.95])
    notes = []
    if high - low < NARROW_SPREAD:
        notes.append(
            f"90 % of pairs of two persons have similarities of {low:.3f} to {high:.3f}: the model separates little, "
            "and small differences decide. Compare probabilities, and adapt the model to the site."
        )
    if not drawn.by_track:
        notes.append(
            "Without tracks the pairs of one person are those in one cluster: real ones are less similar, and "
            "more of them are below the thresholds than stated here."
        )
    if len(certain_accepted) >= MIN_CERTAIN:
        notes.append(
            f"Of {len(certain_accepted)} pairs in one camera's image at the same time, certainly two persons and more "
            f"similar than pairs of two cameras, {certain_accepted.mean():.1%} are decided as a match."
        )
    return tuple(notes)
