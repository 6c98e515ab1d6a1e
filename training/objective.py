"""What a batch is pulled to and pushed from during one epoch: memories of clusters or of camera proxies.

Letters: B batch, D feature size, N crops, K clusters, P proxies, V views used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from resight.training.apart import clusters_apart
from resight.training.cluster import Clustering, centroids
from resight.training.links import Links
from resight.training.loss import (
    association_scores,
    cluster_contrast,
    offline_association,
    online_association,
    weigh_views,
)
from resight.training.memory import CentroidMemory
from resight.training.neighbours import Floats, Ints
from resight.training.proxies import split_by_camera
from resight.training.recipe import Recipe


class Objective(Protocol):
    """Losses against memories, and the memories' update after the step."""

    def losses(self, features: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Loss of each sample, weighed over the views.

        Args:
            features: V tensors (B, D), unit rows.
            rows: int64 (B,), the samples' rows in the store.

        Returns:
            (B,).
        """
        ...

    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """Let the memories follow the features of a whole batch, in its order."""
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
        _follow(self.memories, features, self.labels[rows])


class ProxyObjective:
    """O2CAP's offline and online association, on every view used.

    Attributes:
        memories: one per view, an entry a proxy.
        proxies: which crops and which cluster each proxy stands for.

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
        self._apart = clusters_apart(links, clustering.labels, device=device)

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
        between = memory.centroids[own] @ memory.centroids.T
        return loss + settings.online * online_association(
            similarity,
            association_scores(similarity, between, balance=settings.balance),
            self._cameras,
            temperature=recipe.temperature,
            positives=settings.positives,
            negatives=settings.negatives,
            barred=None if self._apart is None else self._apart(self._clusters[own], self._clusters),
        )

    def update(self, features: Sequence[Tensor], rows: Tensor) -> None:
        """See `Objective.update`."""
        _follow(self.memories, features, self._labels[rows])


def _memories(views: Sequence[Floats], labels: Ints, momentum: float, device: str) -> list[CentroidMemory]:
    """One memory per view, all over the same labels."""
    return [CentroidMemory(torch.from_numpy(centroids(view, labels)).to(device), momentum=momentum) for view in views]


def _follow(memories: Sequence[CentroidMemory], features: Sequence[Tensor], labels: Tensor) -> None:
    for memory, view in zip(memories, features, strict=True):
        memory.update(view, labels)
