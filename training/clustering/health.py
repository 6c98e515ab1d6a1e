"""Label health without person labels: cameras per cluster, agreement with tracks, stability between epochs.

Letters: N crops, K clusters, C cameras, T tracks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from resight.arrays import Ints
from resight.training.clustering.dbscan import OUTLIER
from resight.training.store.crops import UNKNOWN
from resight.training.store.track_pairs import TrackPairs


@dataclass(frozen=True)
class CameraMix:
    """Number of cameras per cluster, compared with chance.

    A person walks past several cameras, so clusters of people mix cameras; a model that responds to backgrounds and
    colour casts makes clusters of a single camera, however compact. Chance means drawing each cluster's size without
    replacement from all clustered crops (hypergeometric, computed exactly). If few cameras see a person, even perfect
    clusters are below chance: compare two models on one site, not two sites.

    Attributes:
        cameras_per_cluster: mean number of distinct cameras of a cluster, in [1, C].
        many_camera_share: share of clusters with more than one camera, in [0, 1].
        chance_cameras_per_cluster: expected `cameras_per_cluster` if cameras were shuffled.
        chance_many_camera_share: expected `many_camera_share` if cameras were shuffled.
        cameras_per_cluster_error: standard error of `cameras_per_cluster` over the clusters; 0 for a single one.
    """

    cameras_per_cluster: float
    many_camera_share: float
    chance_cameras_per_cluster: float
    chance_many_camera_share: float
    cameras_per_cluster_error: float = 0.0


@dataclass(frozen=True)
class Stability:
    """Agreement of two labellings of the same crops, of two epochs or of two models.

    Attributes:
        ari: adjusted Rand index (Hubert and Arabie 1985) over the crops clustered in both, in [-0.5, 1]; 0 is chance.
        nmi: normalised mutual information (arithmetic mean of the entropies) over the same crops, in [0, 1].
        moved_share: share of all crops that are an outlier in exactly one of the two, in [0, 1].
        shared_crops: number of crops clustered in both.
    """

    ari: float
    nmi: float
    moved_share: float
    shared_crops: int


@dataclass(frozen=True)
class TrackAgreement:
    """Whether clusters keep the crops of a track together and two people apart.

    A single cluster of all crops keeps every track whole and confuses every pair; only outliers do the reverse, so
    both shares are needed.

    Attributes:
        majority_share: share of a track's crops in its most frequent cluster (outliers have none), in [0, 1], averaged
            over the tracks with at least two crops. None without such tracks.
        whole_share: share of those tracks whose crops are all in one cluster, in [0, 1].
        confused_share: share of pairs of tracks of certainly two persons that have the same most frequent cluster,
            among the pairs where both have one, in [0, 1]; ideally 0. None without such pairs.
        compared_pairs: number of pairs of tracks `confused_share` is computed on.
    """

    majority_share: float | None
    whole_share: float | None
    confused_share: float | None
    compared_pairs: int


def camera_mix(labels: Ints, cameras: Ints) -> CameraMix | None:
    """Cameras per cluster, compared with chance.

    Args:
        labels: int64 (N,), any numbers from 0, -1 for outliers.
        cameras: int64 (N,), any numbers.

    Returns:
        None if nothing is clustered.
    """
    inliers = labels != OUTLIER
    if not inliers.any():
        return None
    _, clusters = np.unique(labels[inliers], return_inverse=True)
    _, seen_by, camera_sizes = np.unique(cameras[inliers], return_inverse=True, return_counts=True)
    sizes = np.bincount(clusters)
    pairs = np.unique(clusters.astype(np.int64) * len(camera_sizes) + seen_by)  # each (cluster, camera) once
    distinct = np.bincount(pairs // len(camera_sizes), minlength=len(sizes))
    size, repeats = np.unique(sizes, return_counts=True)
    total = int(inliers.sum())
    missed = _none_drawn(total, camera_sizes, size).sum(1)  # expected number of cameras a cluster of this size misses
    single = _none_drawn(total, total - camera_sizes, size).sum(1)  # probability of a single camera
    return CameraMix(
        float(distinct.mean()),
        float((distinct > 1).mean()),
        float(np.average(len(camera_sizes) - missed, weights=repeats)),
        float(1 - np.average(single, weights=repeats)),
        float(distinct.std(ddof=1) / np.sqrt(len(distinct))) if len(distinct) > 1 else 0.0,
    )


def _none_drawn(total: int, marked: Ints, drawn: Ints) -> NDArray[np.float64]:
    """Hypergeometric probability that ``drawn`` of ``total`` without replacement hit none of the ``marked``.

    C(total - marked, drawn) / C(total, drawn), through logarithms of factorials.

    Returns:
        (drawn, marked).
    """
    left = (total - marked)[None, :]
    n = drawn[:, None]
    possible = left >= n
    valid = np.where(possible, left, n)  # avoids poles; masked below
    log = gammaln(valid + 1) - gammaln(valid - n + 1) - gammaln(total + 1) + gammaln(total - n + 1)
    return np.where(possible, np.exp(log), 0.0)


def track_agreement(labels: Ints, pairs: TrackPairs) -> TrackAgreement:
    """Compare clusters with tracks.

    Args:
        labels: int64 (N,), any numbers from 0, -1 for outliers.
        pairs: tracks of the same N crops.
    """
    size = np.bincount(pairs.tracks[pairs.tracks != UNKNOWN], minlength=pairs.track_count)
    both = (labels != OUTLIER) & (pairs.tracks != UNKNOWN)
    clusters = int(labels.max(initial=OUTLIER)) + 1
    cell, count = np.unique(pairs.tracks[both] * clusters + labels[both], return_counts=True)
    largest_last = np.lexsort((-cell, count))  # the lowest label among equal counts
    most, main_cluster = np.zeros(pairs.track_count, np.int64), np.full(pairs.track_count, OUTLIER)
    track = cell[largest_last] // max(clusters, 1)
    most[track], main_cluster[track] = (
        count[largest_last],
        cell[largest_last] % max(clusters, 1),
    )  # the last assignment wins
    several = size > 1
    compared_clusters = main_cluster[pairs.track_pairs]  # (G, 2)
    compared = (compared_clusters != OUTLIER).all(1)
    return TrackAgreement(
        float((most / np.maximum(size, 1))[several].mean()) if several.any() else None,
        float((most == size)[several].mean()) if several.any() else None,
        float((compared_clusters[:, 0] == compared_clusters[:, 1])[compared].mean()) if compared.any() else None,
        int(compared.sum()),
    )


def stability(labels: Ints, previous: Ints) -> Stability | None:
    """Compare two labellings of the same crops.

    Args:
        labels: int64 (N,), -1 for outliers.
        previous: int64 (N,), likewise; cluster numbers need not correspond.

    Returns:
        None if fewer than two crops are clustered in both.
    """
    assert len(labels) == len(previous), (len(labels), len(previous))
    both = (labels != OUTLIER) & (previous != OUTLIER)
    if both.sum() < 2:
        return None
    return Stability(
        float(adjusted_rand_score(previous[both], labels[both])),
        float(normalized_mutual_info_score(previous[both], labels[both])),
        float(((labels == OUTLIER) != (previous == OUTLIER)).mean()),
        int(both.sum()),
    )


def epoch_health(labels: Ints, previous_labels: Ints | None, cameras: Ints) -> dict[str, float]:
    """Health metrics of one epoch's labels for the log; all values are finite.

    Args:
        labels: int64 (N,), -1 for outliers.
        previous_labels: labels of the previous epoch, None in the first.
        cameras: int64 (N,).

    Returns:
        The fields of `CameraMix` if something is clustered, and `stability_ari`, `stability_nmi` and `moved_share`
        of `Stability` if crops are clustered in both this and the previous epoch.
    """
    mix = camera_mix(labels, cameras)
    metrics: dict[str, float] = asdict(mix) if mix is not None else {}
    before = stability(labels, previous_labels) if previous_labels is not None else None
    if before is not None:
        metrics |= {"stability_ari": before.ari, "stability_nmi": before.nmi, "moved_share": before.moved_share}
    return metrics
