"""Sample clusters for the report, selected without labels: the tightest, the loosest, and those of most cameras.

Letters: N crops, K clusters, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Floats, Ints
from resight.training.clustering.dbscan import OUTLIER
from resight.training.report.page import CropImage, Thumbnails
from resight.training.store.crops import CropStore


@dataclass(frozen=True)
class ClusterSample:
    """Some crops of one cluster.

    Attributes:
        label: the cluster's number.
        size: number of its crops.
        crops: the crops shown.
        cameras: number of its cameras.
        silhouette: in [-1, 1], see `resight.training.report.montage.tightness`.
        purity: share in [0, 1] of the most frequent true person; None without labels.
    """

    label: int
    size: int
    crops: Sequence[CropImage]
    cameras: int
    silhouette: float
    purity: float | None = None


@dataclass(frozen=True)
class ClusterGroup:
    """Clusters selected by one criterion, with an explanation."""

    title: str
    hint: str
    clusters: Sequence[ClusterSample] = ()


CLUSTERS_SHOWN = 4  # clusters per group
CROPS_SHOWN = 12  # per cluster
CHUNK = 4096  # crops compared with all centroids at once: 4096 x 10,000 clusters take 160 MiB

TIGHTEST = ClusterGroup(
    "Tightest",
    "The highest silhouette: likely one person each. Look for clusters of walls or colours instead of people.",
)
LOOSEST = ClusterGroup(
    "Loosest",
    "The lowest silhouette: two people in one cluster, or one person in two clusters. The last crops fit worst.",
)
MOST_CAMERAS = ClusterGroup(
    "Seen by most cameras",
    "One person seen by many cameras is the goal of adaptation; different people here are its worst mistake.",
)
ALL_CLUSTERS = ClusterGroup("All clusters", "The tightest first; in each, the crops nearest to its centre first.")


@dataclass(frozen=True, eq=False)  # arrays cannot be compared with ==
class Tightness:
    """The silhouette of crops and clusters.

    Attributes:
        crops: float64 (N,), simplified silhouette in [-1, 1]; 0 for outliers and clusters of one.
        clusters: float64 (K,), mean over each cluster's crops; NaN for a cluster without crops.
    """

    crops: NDArray[np.float64]
    clusters: NDArray[np.float64]


def tightness(features: Floats, labels: Ints) -> Tightness:
    """Simplified silhouette (Hruschka et al. 2004): distances to centroids instead of to all crops.

    For a crop, a is the cosine distance to the centroid of the rest of its cluster and b to the nearest other
    centroid; s = (b - a) / max(a, b). The crop itself is excluded from its centroid, else small clusters would seem
    tight. With a single cluster there is no b, and all values are 0.

    Args:
        features: float32 (N, D), unit rows.
        labels: int64 (N,), from 0, -1 for outliers.
    """
    sizes = np.bincount(labels[labels != OUTLIER])
    scores = np.zeros(len(labels))
    rows = np.flatnonzero(labels != OUTLIER)
    if np.count_nonzero(sizes) > 1:
        sums = np.zeros((len(sizes), features.shape[1]), np.float32)
        np.add.at(sums, labels[rows], features[rows])
        length = np.linalg.norm(sums, axis=1).clip(1e-12)
        units = sums / length[:, None]
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            scores[part] = _score(features[part] @ units.T, labels[part], length, sizes)  # from (CHUNK, K)
    mean = np.full(len(sizes), np.nan)
    totals = np.bincount(labels[rows], scores[rows], len(sizes))
    np.divide(totals, sizes, out=mean, where=sizes > 0)
    return Tightness(scores, mean)


def _score(similarity: Floats, own: Ints, length: Floats, sizes: Ints) -> NDArray[np.float64]:
    """Silhouettes of some crops from their similarities to all centroids (modified in place)."""
    each = np.arange(len(own))
    to_sum = similarity[each, own].astype(np.float64) * length[own]  # <x, S>, S the sum of the cluster
    similarity[each, own] = -np.inf
    similarity[:, sizes == 0] = -np.inf
    b = 1 - similarity.max(1).astype(np.float64)
    rest = np.sqrt(np.maximum(length[own].astype(np.float64) ** 2 - 2 * to_sum + 1, 1e-12))  # |S - x|
    a = 1 - (to_sum - 1) / rest
    return np.where(sizes[own] > 1, (b - a) / np.maximum(np.maximum(a, b), 1e-12), 0.0)


def cluster_groups(store: CropStore, labels: Ints, features: Floats, thumbnails: Thumbnails) -> list[ClusterGroup]:
    """Select clusters and some crops of each; empty without clusters.

    Args:
        store: N crops.
        labels: int64 (N,), from 0, -1 for outliers.
        features: float32 (N, D), unit rows.
        thumbnails: reads the crops.
    """
    held = tightness(features, labels)
    present = np.flatnonzero(np.isfinite(held.clusters))
    order = present[np.argsort(-held.clusters[present], kind="stable")]
    if len(order) <= CLUSTERS_SHOWN:
        chosen = [(ALL_CLUSTERS, order)] if len(order) else []
    else:
        cameras = camera_counts(labels, store.cameras)
        spread = order[np.lexsort((-cameras[order, 1], -cameras[order, 0]))]
        many = [(MOST_CAMERAS, spread[:CLUSTERS_SHOWN])] if cameras[order, 0].max() > 1 else []
        best = order[: min(CLUSTERS_SHOWN, len(order) // 2)]
        chosen = [(TIGHTEST, best), (LOOSEST, order[len(best) :][-CLUSTERS_SHOWN:][::-1]), *many]
    return [
        ClusterGroup(
            group.title,
            group.hint,
            [
                _cluster(store, labels, held, int(label), thumbnails, by_camera=group is MOST_CAMERAS)
                for label in members
            ],
        )
        for group, members in chosen
    ]


def camera_counts(labels: Ints, cameras: Ints) -> NDArray[np.float64]:
    """The number of cameras of each cluster.

    Returns:
        float64 (K, 2): distinct cameras, and 2 to the entropy of their shares, which is lower if one dominates.
    """
    rows = np.flatnonzero(labels != OUTLIER)
    width = int(cameras.max(initial=0)) + 1
    pairs, counts = np.unique(labels[rows] * width + cameras[rows], return_counts=True)
    owner, sizes = pairs // width, np.bincount(labels[rows])
    share = counts / sizes[owner]
    entropy = np.bincount(owner, -share * np.log2(share), len(sizes))
    return np.stack([np.bincount(owner, minlength=len(sizes)), 2**entropy], axis=1)


def _cluster(
    store: CropStore, labels: Ints, held: Tightness, label: int, thumbnails: Thumbnails, *, by_camera: bool
) -> ClusterSample:
    """A sample of one cluster: crops spaced evenly by silhouette, or evenly over its cameras."""
    rows = np.flatnonzero(labels == label)
    rows = rows[np.argsort(-held.crops[rows], kind="stable")]
    if by_camera:
        rows = rows[np.argsort(store.cameras[rows], kind="stable")]
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(CROPS_SHOWN, len(rows))).astype(int))]
    purity = (
        float(np.unique(store.persons[rows], return_counts=True)[1].max() / len(rows)) if store.has_persons else None
    )
    cameras = len(np.unique(store.cameras[rows]))
    return ClusterSample(label, len(rows), thumbnails.crops(store, shown), cameras, float(held.clusters[label]), purity)
