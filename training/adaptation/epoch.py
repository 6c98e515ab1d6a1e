"""One epoch: label the crops, then contrast batches with memories of their clusters, their proxies or themselves.

Letters: N crops, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from resight.arrays import Floats, Ints
from resight.encoder.model import Encoder
from resight.training.adaptation.batches import (
    balanced_batches,
    camera_batches,
    proxy_batches,
    shuffled_batches,
)
from resight.training.adaptation.objective import ClusterObjective, Objective, ProxyObjective, split_by_camera
from resight.training.adaptation.recipe import views_used
from resight.training.adaptation.run import EpochState, TrainingRun, TrainState
from resight.training.adaptation.selective import InstanceObjective
from resight.training.clustering.cluster import Clustering, centroids, cluster
from resight.training.clustering.dbscan import OUTLIER
from resight.training.clustering.health import epoch_health
from resight.training.features.distributed import on_first_process
from resight.training.features.extract import extract_features

LABELS = "labels"


def extract_views(run: TrainingRun, encoder: Encoder, *, parts: bool) -> list[Floats]:
    """Features under a progress bar."""
    with run.log.bar("features", len(run.store)) as advance:
        precision, cache = run.recipe.precision, run.pixels
        return extract_features(
            encoder, run.store, device=run.device, precision=precision, local=parts, cache=cache, progress=advance
        )


def label_crops(run: TrainingRun, views: list[Floats]) -> Clustering:
    """Pseudo labels by clustering, or what the recipe asks for instead."""
    if run.recipe.labels == "persons":
        _, labels = np.unique(run.store.persons, return_inverse=True)
        return Clustering(labels.astype(np.int64))
    if run.recipe.labels == "none":
        return Clustering(np.full(len(run.store), OUTLIER, np.int64))
    used = views if run.recipe.cluster.local_weight > 0 else views[:1]
    settings, cameras = run.recipe.cluster, run.store.cameras
    return on_first_process(lambda: cluster(used, settings, cameras=cameras, links=run.links, device=run.device))


def label_health(run: TrainingRun, now: EpochState, clustering: Clustering) -> dict[str, float]:
    """Figures of the labels, which are kept for the next epoch and for the report."""
    run.log.labels(now.stage, clustering.labels)
    if run.recipe.labels == "none":
        return {}
    before = now.kept.get(LABELS)
    now.kept[LABELS] = torch.from_numpy(clustering.labels)
    persons = run.store.persons if run.store.has_persons else None
    steadiness = epoch_health(clustering.labels, None if before is None else before.numpy(), run.store.cameras)
    return {**clustering.health(persons), **steadiness}


def set_teacher_anchors(run: TrainingRun, trainee: TrainState, labels: Ints) -> None:
    """The teacher's centroids of these labels; its features never change and are computed once."""
    guide = trainee.guide
    assert guide is not None
    if guide.features is None:
        guide.features = extract_views(run, guide.encoder, parts=False)[0]
    guide.anchors = torch.from_numpy(centroids(guide.features, labels)).to(run.device)


def make_objective(run: TrainingRun, now: EpochState, views: list[Floats], clustering: Clustering) -> Objective:
    """The memories of this epoch."""
    recipe, cameras = run.recipe, run.store.cameras
    if recipe.contrast == "instances":
        *_, chance = run.chance(now.stage, now.epoch)
        warming = now.epoch < recipe.selective.warmup_epochs
        banks = {name: tensor for name, tensor in now.kept.items() if name != LABELS}
        return InstanceObjective(
            views, cameras, recipe, warming=warming, rng=chance, banks=banks, device=run.device, links=run.links
        )
    momentum = 1.0 if now.borrowed else recipe.momentum
    used = views[: views_used(recipe)]
    if recipe.contrast == "proxies":
        return ProxyObjective(used, clustering, cameras, recipe, momentum=momentum, device=run.device, links=run.links)
    return ClusterObjective(used, clustering, recipe, momentum=momentum, device=run.device)


def draw_batches(run: TrainingRun, labels: Ints, rng: np.random.Generator) -> Iterator[Ints]:
    """Rows of batches without end, by the recipe's sampler."""
    recipe, cameras = run.recipe, run.store.cameras
    batch, instances = recipe.batch, recipe.instances
    if recipe.sampler == "all":
        return shuffled_batches(len(labels), batch=batch, rng=rng)
    if recipe.sampler == "proxies":
        return proxy_batches(split_by_camera(labels, cameras).labels, batch=batch, instances=instances, rng=rng)
    draw = balanced_batches if recipe.sampler == "balanced" else camera_batches
    return draw(labels, cameras, batch=batch, instances=instances, rng=rng)
