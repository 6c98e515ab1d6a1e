"""Contrastive objectives of one epoch: memories of clusters or of camera proxies, and the losses against them.

Computing a loss only reads the memories; updating them is an explicit call. A camera proxy stands for the crops of one
cluster seen by one camera (CAP, AAAI 2021; O2CAP, TIP 2022). Cannot-links keep proxies of two known persons from being
each other's positives.

Letters: B batch, D feature size, N crops, K memory entries (clusters or proxies), P proxies, C cameras, V views used,
M groups or clusters that cannot-links refer to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from resight.arrays import Floats, Ints
from resight.training.adaptation.loss import (
    association_scores,
    cluster_contrast,
    offline_association,
    online_association,
    weigh_views,
)
from resight.training.adaptation.recipe import Recipe
from resight.training.clustering.cluster import Clustering, centroids
from resight.training.clustering.dbscan import OUTLIER
from resight.training.store.links import Links


class CentroidMemory:
    """One unit vector per cluster (Cluster Contrast, Dai et al., ACCV 2022) or per camera proxy (O2CAP).

    Attributes:
        centroids: float32 (K, D), unit rows. Never half precision: a running mean would drift.
        momentum: m, weight of the old value in an update; 1 freezes the memory.
    """

    def __init__(self, centroids: Tensor, *, momentum: float) -> None:
        self.centroids = centroids.float()
        self.momentum = momentum

    def similarity(self, features: Tensor) -> Tensor:
        """Cosines of unit features (B, D) with every entry: (B, K). Gradients reach the features only."""
        return features.float() @ self.centroids.T

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """c_y <- normalise(m c_y + (1 - m) f), sequentially in batch order.

        The order is part of the method: with m = 0.1 and 16 crops of a cluster the last one makes up 90 % of
        the result. Entries are independent, so the i-th samples of all entries are processed at once.

        Args:
            features: (B, D) unit rows.
            labels: int64 (B,), 0..K-1.
        """
        if self.momentum == 1.0:
            return
        update_memory(self.centroids, features, labels, momentum=self.momentum)


@torch.no_grad()
def update_memory(memory: Tensor, features: Tensor, labels: Tensor, *, momentum: float) -> None:
    """memory[y] <- normalise(m memory[y] + (1 - m) f) in place, sequentially in batch order.

    Args:
        memory: float32 (K, D).
        features: (B, D).
        labels: int64 (B,), 0..K-1.
        momentum: m.
    """
    features = features.float()
    occurrence = _occurrence(labels)
    for i in range(int(occurrence.max()) + 1):
        selected = occurrence == i
        rows = labels[selected]
        memory[rows] = functional.normalize(momentum * memory[rows] + (1 - momentum) * features[selected], dim=1)


def _occurrence(labels: Tensor) -> Tensor:
    """The number of equal labels before each position: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    position = torch.arange(len(labels), device=labels.device)
    first = torch.searchsorted(ordered, ordered, side="left")
    occurrence = torch.empty_like(position)
    occurrence[order] = position - first
    return occurrence


class CannotLinks:
    """Pairs of groups or clusters that are two persons, looked up per batch.

    Args:
        pairs: int64 (., 2), numbers 0..M-1.
        count: M.
        device: device of the lookups.
    """

    def __init__(self, pairs: Ints, count: int, *, device: str) -> None:
        involved = np.unique(pairs)
        index = np.zeros(count, np.int64)  # 0: without a cannot-link
        index[involved] = np.arange(1, len(involved) + 1)
        linked = np.zeros((len(involved) + 1, len(involved) + 1), bool)
        one, other = index[pairs].T
        linked[one, other] = linked[other, one] = True
        self._index, self._linked = torch.from_numpy(index).to(device), torch.from_numpy(linked).to(device)

    def __call__(self, own: Tensor, others: Tensor) -> Tensor:
        """Whether there is a cannot-link between each of `own` (B,) and each of `others` (P,): bool (B, P)."""
        return self._linked[self._index[own]][:, self._index[others]]


def cluster_cannot_links(links: Links | None, labels: Ints, *, device: str) -> CannotLinks | None:
    """Cannot-links between clusters; None if there are none.

    Args:
        links: between the crops.
        labels: int64 (N,), 0..K-1, -1 for outliers, whose links are ignored.
        device: device of the lookups.
    """
    if links is None:
        return None
    pairs = labels[links.rows[~links.same]]
    pairs = pairs[(pairs != OUTLIER).all(1)]
    return CannotLinks(pairs, int(labels.max()) + 1, device=device) if len(pairs) else None


@dataclass(frozen=True)
class CameraProxies:
    """Assignment of crops to camera proxies.

    Attributes:
        labels: int64 (N,), 0..P-1, -1 for outliers.
        clusters: int64 (P,), the cluster each proxy is a part of.
        cameras: int64 (P,), the camera of each proxy, renumbered 0..C-1.
    """

    labels: Ints
    clusters: Ints
    cameras: Ints

    def __len__(self) -> int:
        return len(self.clusters)


def split_by_camera(labels: Ints, cameras: Ints) -> CameraProxies:
    """Split every cluster by camera (O2CAP, section 3.2).

    Args:
        labels: int64 (N,), clusters, -1 for outliers.
        cameras: int64 (N,), any numbers.

    Returns:
        Proxies ordered by cluster, then by camera.
    """
    inliers = np.flatnonzero(labels != OUTLIER)
    pairs = np.stack([labels[inliers], cameras[inliers]], 1)
    unique_pairs, proxy = np.unique(pairs, axis=0, return_inverse=True)
    out = np.full(len(labels), OUTLIER, np.int64)
    out[inliers] = proxy.ravel()
    _, numbered = np.unique(unique_pairs[:, 1], return_inverse=True)
    return CameraProxies(out, unique_pairs[:, 0].astype(np.int64), numbered.ravel().astype(np.int64))


class Objective(Protocol):
    """Losses against memories, and the update of the memories after each step."""

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Loss of each sample, a weighted sum over the views.

        Args:
            features: V tensors (B, D), unit rows.
            rows: int64 (B,), the samples' rows in the store.

        Returns:
            (B,).
        """
        ...

    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """Update the memories with the features of a whole batch, in its order."""
        ...


class ClusterObjective:
    """Cluster Contrast on every view (LP, section 3.4 as released: weights 0.8, 0.2, 0.2).

    Attributes:
        memories: one per view, over the same labels.
        labels: int64 (N,).
    """

    def __init__(
        self, views: Sequence[Floats], clustering: Clustering, recipe: Recipe, *, momentum: float, device: str
    ) -> None:
        self.labels = torch.from_numpy(clustering.labels).to(device)
        self.memories = _memories(views, clustering.labels, momentum, device)
        self._recipe = recipe

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """See `Objective.losses`."""
        own = self.labels[rows]
        terms = [
            cluster_contrast(memory.similarity(view), own, temperature=self._recipe.temperature)
            for view, memory in zip(features, self.memories, strict=True)
        ]
        return weigh_views(terms, self._recipe.local_loss_weight)

    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """See `Objective.update`."""
        _update_all(self.memories, features, self.labels[rows])


class ProxyObjective:
    """O2CAP's offline and online association, on every view used.

    Attributes:
        memories: one per view, with one entry per proxy.
        proxies: crops and cluster of each proxy.

    Proxies of clusters with a cannot-link between them are never each other's positives.
    """

    def __init__(
        self,
        views: Sequence[Floats],
        clustering: Clustering,
        cameras: Ints,
        recipe: Recipe,
        *,
        momentum: float,
        device: str,
        links: Links | None = None,
    ) -> None:
        self.proxies = split_by_camera(clustering.labels, cameras)
        self.memories = _memories(views, self.proxies.labels, momentum, device)
        self._labels = torch.from_numpy(self.proxies.labels).to(device)
        self._clusters = torch.from_numpy(self.proxies.clusters).to(device)
        self._cameras = torch.from_numpy(self.proxies.cameras).to(device)
        self._recipe = recipe
        self._cannot_links = cluster_cannot_links(links, clustering.labels, device=device)

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """See `Objective.losses`."""
        own = self._labels[rows]
        terms = [self._associate(memory, view, own) for view, memory in zip(features, self.memories, strict=True)]
        return weigh_views(terms, self._recipe.local_loss_weight)

    def _associate(self, memory: CentroidMemory, view: Tensor, own: Tensor) -> Tensor:
        """L_offline + L_online of one view."""
        recipe, settings = self._recipe, self._recipe.proxies
        similarity = memory.similarity(view)
        loss = settings.offline * offline_association(
            similarity,
            self._clusters[own],
            self._clusters,
            temperature=recipe.temperature,
            negatives=settings.negatives,
        )
        if settings.online == 0:
            return loss
        proxy_similarity = memory.centroids[own] @ memory.centroids.T
        return loss + settings.online * online_association(
            similarity,
            association_scores(similarity, proxy_similarity, balance=settings.balance),
            self._cameras,
            temperature=recipe.temperature,
            positives=settings.positives,
            negatives=settings.negatives,
            excluded=None if self._cannot_links is None else self._cannot_links(self._clusters[own], self._clusters),
        )

    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """See `Objective.update`."""
        _update_all(self.memories, features, self._labels[rows])


def _memories(views: Sequence[Floats], labels: Ints, momentum: float, device: str) -> list[CentroidMemory]:
    """One memory per view, all over the same labels."""
    return [CentroidMemory(torch.from_numpy(centroids(view, labels)).to(device), momentum=momentum) for view in views]


def _update_all(memories: Sequence[CentroidMemory], features: Sequence[Tensor], labels: Tensor) -> None:
    for memory, view in zip(memories, features, strict=True):
        memory.update(view, labels)
