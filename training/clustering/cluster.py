"""Pseudo-labels: camera centring, then DBSCAN on the sparse Jaccard graph with an eps chosen without labels.

Camera centring subtracts what all crops of a camera have in common: background, light and colour casts.

Letters: N crops, K clusters, D feature size, C cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from resight.arrays import Floats, Ints
from resight.errors import TrainingError
from resight.neighbours.jaccard import jaccard_graph
from resight.neighbours.reciprocal import (
    ReciprocalEncoding,
    camera_list_lengths,
    encode_camera_aware,
    encode_reciprocal,
)
from resight.neighbours.search import search_neighbours, search_neighbours_by_camera
from resight.training.clustering.dbscan import OUTLIER, LinkConstraints, dbscan
from resight.training.store.crops import CropStore
from resight.training.store.links import Links
from resight.validation import STRICT


def centre_cameras(features: Floats, cameras: Ints) -> Floats:
    """Subtract each camera's mean feature, so that backgrounds and colour casts do not affect similarities.

    Cameras see largely the same people over time, so what all crops of a camera have in common is due to the camera.
    A mean over few crops reflects a few people instead: it is shrunk towards the mean of all crops as far as chance
    explains its distance (see `_shrinkage`). Rows equal to their camera's mean are returned unchanged.

    Args:
        features: float32 (N, D), unit rows.
        cameras: int64 (N,), any numbers.

    Returns:
        float32 (N, D), unit rows.
    """
    _, number, counts = np.unique(cameras, return_inverse=True, return_counts=True)
    members = sparse.csr_matrix((np.ones(len(number), np.float32), (number, np.arange(len(number)))))  # (C, N)
    offsets = (members @ features) / counts[:, None] - features.mean(0)  # (C, D)
    offsets *= _shrinkage(features, offsets, counts)[:, None]
    centred = features - (features.mean(0) + offsets)[number]
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 1e-6, centred / np.maximum(length, 1e-6), features).astype(np.float32)


def _shrinkage(features: Floats, offsets: NDArray[np.float64], counts: Ints) -> NDArray[np.float64]:
    """Share of each camera's offset that is due to the camera, in [0, 1]: (C,).

    The empirical-Bayes estimate n / (n + s / t) for n crops (Efron and Morris 1973): s, the variance of crops
    within cameras, and t, that of cameras beyond it, follow from the analysis of variance of unbalanced groups.
    """
    total, groups = len(features), len(counts)
    between = float((counts * (offsets**2).sum(1)).sum())
    within = float(((features - features.mean(0)) ** 2).sum()) - between
    noise = within / max(total - groups, 1)
    spread = (between - (groups - 1) * noise) / max(total - float((counts**2).sum()) / total, 1.0)
    if total == groups or spread <= 0:  # no camera effect beyond chance
        return np.zeros(groups)
    return np.asarray(counts * spread / (counts * spread + noise))


EPS_GRID = tuple(round(0.30 + 0.05 * step, 2) for step in range(9))  # 0.30-0.70, the range of published values
LARGEST_SHARE_LIMIT = 0.5  # one cluster holding half of a site is a collapse, not a person


@validated(frozen=True, config=STRICT)
class ClusterSettings:
    """Settings of the clustering; the recipes give the sources of the values.

    Attributes:
        k1: neighbours of the k-reciprocal sets.
        k2: neighbours of the local query expansion.
        eps: DBSCAN radius in (0, 1), or "auto": chosen by `choose_eps` in the first epoch of a run.
        min_samples: DBSCAN core size.
        local_weight: LP's lambda_1, the share of each local view in the fused distance; 0 uses the global view only.
        centre_cameras: whether each camera's mean feature is subtracted before distances are computed.
        camera_aware: whether neighbours are ranked within and across cameras (CA-Jaccard, Chen et al., CVPR 2024)
            instead of by k1 and k2; its released commands pair it with eps 0.4 (Market-1501) and 0.6 (MSMT17, VeRi).
        k1_intra: neighbours of the same camera in the reciprocal sets; 5 in the released code.
        k1_inter: neighbours of other cameras in the reciprocal sets; 20.
        k2_intra: neighbours of the same camera in the query expansion, including the crop itself; 2.
        k2_inter: neighbours of other cameras in the query expansion; 4.
    """

    k1: Annotated[int, Field(ge=2)] = 30
    k2: Annotated[int, Field(ge=1)] = 6
    eps: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    min_samples: Annotated[int, Field(ge=1)] = 4
    local_weight: Annotated[float, Field(ge=0, lt=0.5)] = 0.15
    centre_cameras: bool = False
    camera_aware: bool = False
    k1_intra: Annotated[int, Field(ge=1)] = 5
    k1_inter: Annotated[int, Field(ge=1)] = 20
    k2_intra: Annotated[int, Field(ge=1)] = 2
    k2_inter: Annotated[int, Field(ge=0)] = 4


@dataclass(frozen=True)
class Clustering:
    """Labels and how they were obtained.

    Attributes:
        labels: int64 (N,), 0..K-1, -1 for outliers.
        eps: radius used; None if the labels are true persons.
        silhouette: mean over all crops in [-1, 1], outliers counting 0; 0 if the labels are true persons.
        links: number of links used as constraints; the labels satisfy all of them.
        links_violated: how many of them the same clustering without constraints would have violated.
    """

    labels: Ints
    eps: float | None = None
    silhouette: float = 0.0
    links: int = 0
    links_violated: int = 0

    @property
    def count(self) -> int:
        """K, the number of clusters."""
        return int(self.labels.max(initial=OUTLIER)) + 1

    @property
    def collapsed(self) -> bool:
        """Whether there are fewer than two clusters, or one holds more than half of all crops."""
        sizes = np.bincount(self.labels[self.labels != OUTLIER], minlength=1)
        return self.count < 2 or bool(sizes.max() > LARGEST_SHARE_LIMIT * len(self.labels))

    def health(self, persons: Ints | None = None) -> dict[str, float]:
        """Metrics that distinguish a good clustering from a collapsed one.

        Args:
            persons: true persons (N,), if known, for NMI and ARI over the clustered crops; not used for training.
        """
        inliers = self.labels != OUTLIER
        sizes = np.bincount(self.labels[inliers], minlength=1)
        metrics = {
            "clusters": float(self.count),
            "outlier_share": float(1 - inliers.mean()),
            "largest_share": float(sizes.max() / len(self.labels)),
        }
        if self.eps is not None:
            metrics |= {"eps": self.eps, "silhouette": self.silhouette}
        if self.links:
            metrics |= {"links": float(self.links), "links_violated": float(self.links_violated)}
        if persons is not None and inliers.any():
            metrics["nmi"] = float(normalized_mutual_info_score(persons[inliers], self.labels[inliers]))
            metrics["ari"] = float(adjusted_rand_score(persons[inliers], self.labels[inliers]))
        return metrics


def cluster(
    views: Sequence[Floats],
    settings: ClusterSettings,
    *,
    cameras: Ints | None = None,
    links: Links | None = None,
    device: str = "cpu",
) -> Clustering:
    """Cluster crops by the fused Jaccard distance of their views (LP, section 3.3 of its released code).

    Args:
        views: float32 (N, D) unit rows of the global view, then of the local ones.
        settings: see `ClusterSettings`.
        cameras: int64 (N,), any numbers; required for camera centring and camera-aware neighbours.
        links: crops known to be the same person or two persons, see `LinkConstraints`.
        device: device of the neighbour search.

    Raises:
        TrainingError: the clusters collapsed (see `Clustering.collapsed`), or the settings need cameras.
    """
    weights = _view_weights(len(views), settings.local_weight)
    used = [(view, weight) for view, weight in zip(views, weights, strict=True) if weight > 0]
    encoded = [_encode(view, settings, cameras, device) for view, _ in used]
    longest = max(EPS_GRID) if settings.eps == "auto" else settings.eps
    plain = jaccard_graph(encoded, [weight for _, weight in used], max_distance=longest)
    constraints = LinkConstraints(links, len(views[0])) if links is not None and len(links) else None
    graph = plain if constraints is None else constraints.adjust_graph(plain)
    if settings.eps == "auto":
        found = choose_eps(graph, settings.min_samples, constraints)
    else:
        found = _label(graph, settings.eps, settings.min_samples, constraints)
    if constraints is not None and found.eps is not None:
        violated = constraints.count_violated(dbscan(plain, found.eps, settings.min_samples))
        found = replace(found, links=len(constraints), links_violated=violated)
    return _refuse_collapse(found)


def _encode(view: Floats, settings: ClusterSettings, cameras: Ints | None, device: str) -> ReciprocalEncoding:
    """The reciprocal neighbours of one view, according to the settings."""
    if settings.camera_aware and cameras is None:
        raise TrainingError(
            "camera-aware neighbours need the camera of every crop, found none: pass cameras, or set "
            "cluster.camera_aware = false in the recipe"
        )
    if settings.centre_cameras and cameras is not None:
        view = centre_cameras(view, cameras)
    if not settings.camera_aware or cameras is None:
        near = search_neighbours(view, settings.k1, device=device)
        return encode_reciprocal(view, near, k1=settings.k1, k2=settings.k2)
    lists = {
        "k1_intra": settings.k1_intra,
        "k1_inter": settings.k1_inter,
        "k2_intra": settings.k2_intra,
        "k2_inter": settings.k2_inter,
    }
    intra, inter = search_neighbours_by_camera(view, cameras, *camera_list_lengths(**lists), device=device)
    return encode_camera_aware(intra, inter, **lists)


def _view_weights(count: int, local_weight: float) -> list[float]:
    """(1 - 2 l, l, l) for three views: they sum to 1, so the fused distance stays in [0, 1]."""
    return [1 - (count - 1) * local_weight, *[local_weight] * (count - 1)]


def _label(graph: sparse.csr_matrix, eps: float, min_samples: int, constraints: LinkConstraints | None) -> Clustering:
    """Labels at one radius that satisfy the constraints, if there are any."""
    labels = dbscan(graph, eps, min_samples)
    if constraints is not None:
        labels = constraints.repair_labels(labels, graph)
    return Clustering(labels, eps, silhouette(graph, labels))


def choose_eps(graph: sparse.csr_matrix, min_samples: int, constraints: LinkConstraints | None = None) -> Clustering:
    """The eps of `EPS_GRID` whose clusters have the highest mean silhouette, outliers counting 0.

    Too small an eps leaves outliers, which contribute 0; too large an eps merges people, which lowers their
    silhouettes. A collapsed clustering is returned only if every eps collapses, since a single cluster has no
    neighbouring cluster to compare with. No labels are used. docs/method.md compares the score with true agreement.
    """
    tried = [_label(graph, eps, min_samples, constraints) for eps in EPS_GRID]
    return max(tried, key=lambda found: (not found.collapsed, found.silhouette))


def silhouette(graph: sparse.csr_matrix, labels: Ints) -> float:
    """Mean silhouette (Rousseeuw 1987) on a sparse distance graph; pairs not stored have distance 1.

    For crop i, a is the mean distance to the rest of its cluster and b the smallest mean distance to
    another cluster; s = (b - a) / max(a, b). Outliers form clusters of one and score 0.

    Args:
        graph: CSR (N, N) of distances below 1, diagonal included.
        labels: int64 (N,), -1 for outliers.
    """
    n = len(labels)
    labels = labels.copy()
    outlier = labels == OUTLIER
    labels[outlier] = np.arange(outlier.sum()) + labels.max(initial=OUTLIER) + 1
    sizes = np.bincount(labels)
    closeness = graph.copy()
    closeness.data = 1 - closeness.data
    members = sparse.csr_matrix((np.ones(n, np.float32), (np.arange(n), labels)), (n, len(sizes)))
    sums = (closeness @ members).tocsr()  # (N, K): summed closeness of each crop to each cluster
    row = np.repeat(np.arange(n), np.diff(sums.indptr))
    own = sums.indices == labels[row]
    inside, outside = np.zeros(n), np.zeros(n)
    inside[row[own]] = (sums.data[own] - 1) / np.maximum(sizes[labels[row[own]]] - 1, 1)  # excluding itself
    np.maximum.at(outside, row[~own], sums.data[~own] / sizes[sums.indices[~own]])
    a, b = 1 - inside, 1 - outside
    scores = np.where(sizes[labels] > 1, (b - a) / np.maximum(np.maximum(a, b), 1e-12), 0.0)
    return float(scores.mean())


def _refuse_collapse(found: Clustering) -> Clustering:
    """Raise an error if the clusters collapsed."""
    metrics = found.health()
    if found.count == 0:
        raise TrainingError(
            f"no cluster among {len(found.labels)} crops at eps {found.eps}: expected at least two persons with "
            "several crops each; add crops, or use initial weights that suit the site better",
            clusters=0,
        )
    if found.collapsed:
        raise TrainingError(
            f"{metrics['largest_share']:.0%} of {len(found.labels)} crops fell into one cluster of {found.count} at "
            f"eps {found.eps}: expected many persons; lower eps in the recipe, or check that the crops show different "
            "people",
            clusters=found.count,
        )
    return found


def centroids(features: Floats, labels: Ints) -> NDArray[np.float32]:
    """Mean feature of each cluster, normalised to unit length.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), 0..K-1, all present, -1 for outliers.

    Returns:
        float32 (K, D) unit rows.
    """
    inliers = np.flatnonzero(labels != OUTLIER)
    order = inliers[np.argsort(labels[inliers], kind="stable")]
    starts = np.searchsorted(labels[order], np.arange(labels.max(initial=OUTLIER) + 1))
    sums = np.add.reduceat(features[order], starts, axis=0)
    return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True), np.float32)


LENGTH_TOLERANCE = 1e-2  # half precision gives lengths about 1e-3 from 1


def try_cluster(
    features: Floats, store: CropStore, settings: ClusterSettings, *, device: str = "cpu"
) -> Clustering | TrainingError:
    """Cluster the crops of a store; returns the error instead of raising it, for the judge.

    Args:
        features: float32 (N, D).
        store: the N crops.
        settings: the same for all compared models.
        device: device of the neighbour search.
    """
    problem = feature_problem(features)
    if problem:
        return TrainingError(problem)
    try:
        return cluster([features], settings, cameras=store.cameras, device=device)
    except TrainingError as error:
        return error


def feature_problem(features: Floats) -> str:
    """Why these features cannot be compared by cosine, or an empty string."""
    broken = int((~np.isfinite(features).all(1)).sum())
    if broken:
        return f"{broken} of {len(features)} features are not finite: the model's weights have diverged"
    wrong = int((np.abs(np.linalg.norm(features, axis=1) - 1) > LENGTH_TOLERANCE).sum())
    if wrong:
        return f"{wrong} of {len(features)} features do not have length 1: the model returns no valid features"
    return ""
