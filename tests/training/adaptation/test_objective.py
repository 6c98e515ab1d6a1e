"""Objectives against loop implementations: losses over all views, and the updated memories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references import contrast, sequential_update
from references_losses import offline, online
from torch import Tensor
from torch.nn import functional

from resight.training.adaptation.objective import ClusterObjective, ProxyObjective, split_by_camera
from resight.training.adaptation.recipe import ProxySettings, Recipe
from resight.training.clustering.cluster import Clustering, centroids

N, DIM = 60, 6
CLUSTERS = Recipe("mine", temperature=0.05, momentum=0.1, local_loss_weight=0.2)
PROXIES = dataclasses.replace(CLUSTERS, contrast="proxies", temperature=0.07, momentum=0.2)


def unit(count: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_case(cameras: int) -> tuple[list[NDArray[np.float32]], Clustering, NDArray[np.int64]]:
    """Three views of 60 crops in 5 clusters with outliers."""
    rng = np.random.default_rng(cameras)
    labels = np.concatenate([np.arange(5), rng.integers(-1, 5, N - 5)])
    return [unit(N, seed) for seed in range(3)], Clustering(labels), 10 * rng.integers(0, cameras, N) + 3


def batch(clustering: Clustering, size: int) -> tuple[list[Tensor], Tensor]:
    rows = np.random.default_rng(size).choice(np.flatnonzero(clustering.labels >= 0), size)
    return [torch.from_numpy(unit(size, 50 + view)) for view in range(3)], torch.from_numpy(rows)


@pytest.mark.parametrize("size", [1, 7, 16])
def test_cluster_objective_is_contrast_on_each_view_with_weights_0_8_0_2_0_2(size: int) -> None:
    views, clustering, _ = random_case(3)
    objective = ClusterObjective(views, clustering, CLUSTERS, momentum=0.1, device="cpu")
    features, rows = batch(clustering, size)
    own = clustering.labels[rows.numpy()]
    slow = [
        contrast(feature.numpy(), centroids(view, clustering.labels), own, 0.05)
        for feature, view in zip(features, views, strict=True)
    ]
    assert objective.losses(features, rows).mean().item() == pytest.approx(
        0.8 * slow[0] + 0.2 * slow[1] + 0.2 * slow[2], rel=1e-5
    )
    objective.update(features, rows)
    for memory, feature, view in zip(objective.memories, features, views, strict=True):
        expected = sequential_update(centroids(view, clustering.labels), feature.numpy(), own, 0.1)
        assert np.abs(memory.centroids.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("size, cameras, online_weight", [(9, 3, 1.0), (5, 1, 1.0), (16, 6, 0.0)])
def test_proxy_objective_is_both_associations_on_each_view(size: int, cameras: int, online_weight: float) -> None:
    views, clustering, seen = random_case(cameras)
    recipe = dataclasses.replace(PROXIES, proxies=ProxySettings(online=online_weight, negatives=4))
    objective = ProxyObjective(views, clustering, seen, recipe, momentum=0.2, device="cpu")
    proxies = split_by_camera(clustering.labels, seen)
    features, rows = batch(clustering, size)
    own = proxies.labels[rows.numpy()]
    expected = np.zeros(size)
    for feature, view, weight in zip(features, views, (0.8, 0.2, 0.2), strict=True):
        entries = centroids(view, proxies.labels)
        for i, row in enumerate(feature.numpy()):
            expected[i] += weight * offline(row, entries, own[i], proxies.clusters, 0.07, 4)
            expected[i] += weight * online_weight * online(row, entries, own[i], proxies.cameras, 0.07, 0.15, 3, 4)
    assert objective.losses(features, rows).numpy() == pytest.approx(expected, rel=1e-4)
    objective.update(features, rows)
    after = sequential_update(centroids(views[0], proxies.labels), features[0].numpy(), own, 0.2)
    assert np.abs(objective.memories[0].centroids.numpy() - after).max() < 1e-5


def test_global_view_only_needs_one_memory() -> None:
    views, clustering, seen = random_case(3)
    recipe = dataclasses.replace(PROXIES, local_loss_weight=0.0)
    objective = ProxyObjective(views[:1], clustering, seen, recipe, momentum=0.2, device="cpu")
    features, rows = batch(clustering, 4)
    leaf = functional.normalize(features[0]).requires_grad_()
    objective.losses([leaf], rows).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_a_frozen_memory_is_not_updated() -> None:
    views, clustering, _ = random_case(2)
    objective = ClusterObjective(views, clustering, CLUSTERS, momentum=1.0, device="cpu")
    before = [memory.centroids.clone() for memory in objective.memories]
    objective.update(*batch(clustering, 8))
    assert all(torch.equal(memory.centroids, old) for memory, old in zip(objective.memories, before, strict=True))
