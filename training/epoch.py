"""One epoch: label the crops, then contrast batches with memories of their clusters, their proxies or themselves.

Letters: N crops, K clusters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from resight.model import Encoder
from resight.training.augment import shift_and_flip
from resight.training.cluster import Clustering, centroids, cluster
from resight.training.dbscan import OUTLIER
from resight.training.distributed import from_first, share
from resight.training.features import extract, read_batches
from resight.training.ghost import group_batch_norm
from resight.training.judge import epoch_health
from resight.training.neighbours import Floats, Ints
from resight.training.objective import ClusterObjective, Objective, ProxyObjective
from resight.training.proxies import split_by_camera
from resight.training.run import Run, Stage
from resight.training.sampler import balanced_batches, camera_batches, proxy_batches, shuffled_batches
from resight.training.selective import InstanceObjective
from resight.training.step import Trainee, train_batches, views_used

LABELS = "labels"


@dataclass
class Round:
    """An epoch of a stage, and what it takes over from the one before.

    Attributes:
        stage: names the stream of chance and the progress bar.
        epoch: from 0, or -1 for a student's first round.
        kept: tensors that live from epoch to epoch: the last labels, the banks of selective contrast.
    """

    stage: Stage
    epoch: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def borrowed(self) -> bool:
        """Whether labels and centroids are the teacher's (LP, section 3.6 of methods as released)."""
        return self.epoch < 0

    def __str__(self) -> str:
        return f"{self.stage} epoch {self.epoch}"


def train_epoch(run: Run, now: Round, trainee: Trainee) -> dict[str, float]:
    """Label, build memories, train `iters` batches.

    A student's round -1 differs: labels and centroids come from the teacher, memories stay frozen and there are
    twice as many batches.

    Args:
        run: see `Run`.
        now: see `Round`; its ``kept`` is brought up to date.
        trainee: whose encoder is trained in place.

    Returns:
        Losses, cluster health and speed.

    Raises:
        TrainingError: clusters collapsed, or a loss is not finite.
    """
    recipe, started = run.recipe, time.perf_counter()
    for network in (trainee.encoder, *([trainee.guide.encoder] if trainee.guide else [])):
        group_batch_norm(network, recipe.samples_per_bn)
    source = trainee.guide.encoder if now.borrowed and trainee.guide else trainee.encoder
    parts = views_used(recipe) is None or recipe.cluster.local_weight > 0
    views = _extract(run, source, parts=parts)
    clustering = _label(run, views)
    health = _health(run, now, clustering)
    if trainee.guide and recipe.relation:
        _anchor(run, trainee, clustering.labels)
    objective = _objective(run, now, views, clustering)
    labelled = time.perf_counter()
    sampling, moving, erasing, _ = run.chance(now.stage, now.epoch)
    iters = recipe.iters * (2 if now.borrowed else 1)
    batches = read_batches(
        run.store,
        itertools.islice(draw_batches(run, clustering.labels, sampling), iters),
        trainee.encoder.config.image,
        cache=run.pixels,
        part=share,
        then=lambda pixels: shift_and_flip(
            pixels, recipe.augment, moving, batch=recipe.batch, start=share(recipe.batch).start
        ),
    )
    losses = train_batches(run, trainee, objective, batches, erasing, total=iters, what=str(now))
    trained = time.perf_counter()
    if isinstance(objective, InstanceObjective):
        now.kept |= objective.banks
    speed = {
        "images_per_s": iters * recipe.batch / (trained - labelled),
        "label_s": labelled - started,
        "train_s": trained - labelled,
    }
    return {**losses, **health, **speed}


def _extract(run: Run, encoder: Encoder, *, parts: bool) -> list[Floats]:
    """Features under a progress bar."""
    with run.log.bar("features", len(run.store)) as advance:
        precision, cache = run.recipe.precision, run.pixels
        return extract(
            encoder, run.store, device=run.device, precision=precision, local=parts, cache=cache, progress=advance
        )


def _label(run: Run, views: list[Floats]) -> Clustering:
    """Pseudo labels by clustering, or what the recipe asks for instead."""
    if run.recipe.labels == "persons":
        _, labels = np.unique(run.store.persons, return_inverse=True)
        return Clustering(labels.astype(np.int64))
    if run.recipe.labels == "none":
        return Clustering(np.full(len(run.store), OUTLIER, np.int64))
    used = views if run.recipe.cluster.local_weight > 0 else views[:1]
    settings, cameras = run.recipe.cluster, run.store.cameras
    return from_first(lambda: cluster(used, settings, cameras=cameras, links=run.links, device=run.device))


def _health(run: Run, now: Round, clustering: Clustering) -> dict[str, float]:
    """Figures of the labels, which are kept for the next epoch and for the report."""
    run.log.labels(now.stage, clustering.labels)
    if run.recipe.labels == "none":
        return {}
    before = now.kept.get(LABELS)
    now.kept[LABELS] = torch.from_numpy(clustering.labels)
    persons = run.store.persons if run.store.has_persons else None
    steadiness = epoch_health(clustering.labels, None if before is None else before.numpy(), run.store.cameras)
    return {**clustering.health(persons), **steadiness}


def _anchor(run: Run, trainee: Trainee, labels: Ints) -> None:
    """The teacher's centroids of these labels; its features never change and are computed once."""
    guide = trainee.guide
    assert guide is not None
    if guide.features is None:
        guide.features = _extract(run, guide.encoder, parts=False)[0]
    guide.anchors = torch.from_numpy(centroids(guide.features, labels)).to(run.device)


def _objective(run: Run, now: Round, views: list[Floats], clustering: Clustering) -> Objective:
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


def draw_batches(run: Run, labels: Ints, rng: np.random.Generator) -> Iterator[Ints]:
    """Rows of batches without end, by the recipe's sampler."""
    recipe, cameras = run.recipe, run.store.cameras
    batch, instances = recipe.batch, recipe.instances
    if recipe.sampler == "all":
        return shuffled_batches(len(labels), batch=batch, rng=rng)
    if recipe.sampler == "proxies":
        return proxy_batches(split_by_camera(labels, cameras).labels, batch=batch, instances=instances, rng=rng)
    draw = balanced_batches if recipe.sampler == "balanced" else camera_batches
    return draw(labels, cameras, batch=batch, instances=instances, rng=rng)
