"""The parts of an epoch: features, pseudo-labels and their health, the objective and the batch sampler.

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
from resight.training.adaptation.distill import Teacher
from resight.training.adaptation.objective import ClusterObjective, Objective, ProxyObjective, split_by_camera
from resight.training.adaptation.recipe import views_used
from resight.training.adaptation.run import StageState, TrainingRun
from resight.training.adaptation.selective import InstanceObjective
from resight.training.clustering.cluster import Clustering, centroids, cluster
from resight.training.clustering.dbscan import OUTLIER
from resight.training.clustering.health import epoch_health
from resight.training.features.distributed import on_first_process
from resight.training.features.extract import extract_features

LABELS = "labels"


def extract_views(run: TrainingRun, encoder: Encoder, *, parts: bool) -> list[Floats]:
    """Extract the features of the store with a progress bar."""
    with run.log.progress("features", len(run.store)) as advance:
        precision, cache = run.recipe.precision, run.pixels
        return extract_features(
            encoder, run.store, device=run.device, precision=precision, local=parts, cache=cache, progress=advance
        )


def label_crops(run: TrainingRun, views: list[Floats]) -> Clustering:
    """Pseudo-labels by clustering, or the labels that the recipe uses in their place."""
    if run.recipe.labels == "persons":
        _, labels = np.unique(run.store.persons, return_inverse=True)
        return Clustering(labels.astype(np.int64))
    if run.recipe.labels == "none":
        return Clustering(np.full(len(run.store), OUTLIER, np.int64))
    used = views if run.recipe.cluster.local_weight > 0 else views[:1]
    settings, cameras = run.recipe.cluster, run.store.cameras
    return on_first_process(lambda: cluster(used, settings, cameras=cameras, links=run.links, device=run.device))


def label_health(run: TrainingRun, state: StageState, clustering: Clustering) -> dict[str, float]:
    """Log the labels, carry them over to the next epoch and return their health metrics."""
    run.log.labels(state.stage, clustering.labels)
    if run.recipe.labels == "none":
        return {}
    before = state.carried.get(LABELS)
    state.carried[LABELS] = torch.from_numpy(clustering.labels)
    persons = run.store.persons if run.store.has_persons else None
    stability = epoch_health(clustering.labels, None if before is None else before.numpy(), run.store.cameras)
    return {**clustering.health(persons), **stability}


def set_teacher_anchors(run: TrainingRun, teacher: Teacher, labels: Ints) -> None:
    """Set the teacher's anchors to its centroids of these labels; its features are computed once."""
    if teacher.features is None:
        teacher.features = extract_views(run, teacher.encoder, parts=False)[0]
    teacher.anchors = torch.from_numpy(centroids(teacher.features, labels)).to(run.device)


def make_objective(run: TrainingRun, state: StageState, views: list[Floats], clustering: Clustering) -> Objective:
    """The objective of this epoch with newly built memories."""
    recipe, cameras = run.recipe, run.store.cameras
    if recipe.contrast == "instances":
        *_, rng = run.random_streams(state.stage, state.epoch)
        warming = state.epoch < recipe.selective.warmup_epochs
        banks = {name: tensor for name, tensor in state.carried.items() if name != LABELS}
        return InstanceObjective(
            views, cameras, recipe, warming=warming, rng=rng, banks=banks, device=run.device, links=run.links
        )
    momentum = 1.0 if state.uses_teacher_labels else recipe.momentum
    used = views[: views_used(recipe)]
    if recipe.contrast == "proxies":
        return ProxyObjective(used, clustering, cameras, recipe, momentum=momentum, device=run.device, links=run.links)
    return ClusterObjective(used, clustering, recipe, momentum=momentum, device=run.device)


def draw_batches(run: TrainingRun, labels: Ints, rng: np.random.Generator) -> Iterator[Ints]:
    """Endless batches of rows from the recipe's sampler."""
    recipe, cameras = run.recipe, run.store.cameras
    batch, instances = recipe.batch, recipe.instances
    if recipe.sampler == "all":
        return shuffled_batches(len(labels), batch=batch, rng=rng)
    if recipe.sampler == "proxies":
        return proxy_batches(split_by_camera(labels, cameras).labels, batch=batch, instances=instances, rng=rng)
    draw = balanced_batches if recipe.sampler == "balanced" else camera_batches
    return draw(labels, cameras, batch=batch, instances=instances, rng=rng)
