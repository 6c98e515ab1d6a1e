"""One epoch: label the crops, then contrast batches with the memories of their clusters.

Letters: N crops, B batch, D feature size, K clusters.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from resight.errors import RecipeError, TrainingError
from resight.image import Pixels
from resight.model import Encoder, Views
from resight.training.augment import erase, shift_and_flip
from resight.training.cluster import Clustering, centroids, cluster
from resight.training.crops import CropStore
from resight.training.features import autocast, extract, read_batches, to_input
from resight.training.loss import cluster_contrast, distillation, weigh_views
from resight.training.memory import ClusterMemory
from resight.training.neighbours import Floats, Ints
from resight.training.recipe import Recipe
from resight.training.runlog import RunLog
from resight.training.sampler import camera_batches

Stage = Literal["teacher", "student"]
STAGES: tuple[Stage, ...] = ("teacher", "student")


@dataclass(frozen=True)
class Run:
    """What stays the same through a run.

    Attributes:
        store: the N crops; row i is sample i in features, labels and batches.
        recipe: the method.
        seed: of every stream of chance.
        device: "cpu", "cuda" or "cuda:N".
        log: where figures and progress go.
    """

    store: CropStore
    recipe: Recipe
    seed: int
    device: str
    log: RunLog

    def chance(self, stage: Stage, epoch: int) -> tuple[np.random.Generator, ...]:
        """Independent streams for the sampler, for pixels (drawn in a thread) and for erasing."""
        seeds = np.random.SeedSequence([self.seed, STAGES.index(stage), epoch + 1]).spawn(3)
        return tuple(np.random.default_rng(seed) for seed in seeds)


def require_device(device: str) -> None:
    """Refuse a device this machine cannot compute on.

    Raises:
        RecipeError: not a device's name, or a GPU that is not there.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"cannot compute on device {device!r} ({str(error).splitlines()[0]}): expected cpu, or cuda on a machine "
            "with an NVIDIA GPU and its driver",
            field="device",
        ) from error


def require_finite(encoder: Encoder, what: str) -> None:
    """Refuse weights that have run away; one more step can spoil them after a loss that was still finite.

    Raises:
        TrainingError: names the first tensors that hold NaN or infinity.
    """
    broken = [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{what}: {len(broken)} tensors are not finite ({', '.join(broken[:3])}): start from sound weights, lower "
            "lr in the recipe, or set precision to fp32; the last epoch's checkpoint stands"
        )


def train_epoch(
    run: Run, stage: Stage, epoch: int, encoder: Encoder, teacher: Encoder | None, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Label, build memories, train `iters` batches.

    A student's round -1 differs (LP, section 3.6 of methods as released): labels and centroids come from the
    teacher, memories stay frozen and there are twice as many batches.

    Args:
        run: see `Run`.
        stage: names the stream of chance and the progress bar.
        epoch: from 0, or -1 for a student's first round.
        encoder: trained in place.
        teacher: frozen guide of a student.
        optimizer: of the encoder's parameters.

    Returns:
        Losses, cluster health and speed.

    Raises:
        TrainingError: clusters collapsed, or a loss is not finite.
    """
    recipe = run.recipe
    borrowed = epoch < 0
    started = time.perf_counter()
    views = _extract(run, teacher if borrowed and teacher is not None else encoder)
    clustering = _label(run, views)
    run.log.labels(stage, clustering.labels)
    memories = _memories(views, clustering, 1.0 if borrowed else recipe.momentum, run.device)
    labelled = time.perf_counter()
    iters = recipe.iters * (2 if borrowed else 1)
    losses = _train_batches(run, stage, epoch, encoder, teacher, optimizer, clustering.labels, memories, iters)
    trained = time.perf_counter()
    persons = run.store.persons if run.store.has_persons else None
    speed = {
        "images_per_s": iters * recipe.batch / (trained - labelled),
        "label_s": labelled - started,
        "train_s": trained - labelled,
    }
    return {**losses, **clustering.health(persons), **speed}


def _extract(run: Run, encoder: Encoder) -> list[Floats]:
    """Features of the views the recipe uses, under a progress bar."""
    local = run.recipe.local_loss_weight > 0 or run.recipe.cluster.local_weight > 0
    with run.log.bar("features", len(run.store)) as advance:
        return extract(
            encoder, run.store, device=run.device, precision=run.recipe.precision, local=local, progress=advance
        )


def _label(run: Run, views: list[Floats]) -> Clustering:
    """Pseudo labels by clustering, or true ones where the recipe asks for them."""
    if run.recipe.labels == "persons":
        _, labels = np.unique(run.store.persons, return_inverse=True)
        return Clustering(labels.astype(np.int64))
    return cluster(views, run.recipe.cluster, cameras=run.store.cameras, device=run.device)


def _memories(views: list[Floats], clustering: Clustering, momentum: float, device: str) -> list[ClusterMemory]:
    """One memory per view, all over the same labels."""
    return [
        ClusterMemory(torch.from_numpy(centroids(view, clustering.labels)).to(device), momentum=momentum)
        for view in views
    ]


def _batches(
    run: Run, stage: Stage, epoch: int, labels: Ints, iters: int, spec: Encoder
) -> Iterator[tuple[Ints, Pixels]]:
    """`iters` augmented batches, prepared in the background."""
    sampling, moving, _ = run.chance(stage, epoch)
    rows = camera_batches(
        labels, run.store.cameras, batch=run.recipe.batch, instances=run.recipe.instances, rng=sampling
    )
    return read_batches(
        run.store,
        itertools.islice(rows, iters),
        spec.config.image,
        then=lambda pixels: shift_and_flip(pixels, run.recipe.augment, moving),
    )


def _train_batches(
    run: Run,
    stage: Stage,
    epoch: int,
    encoder: Encoder,
    teacher: Encoder | None,
    optimizer: torch.optim.Optimizer,
    labels: Ints,
    memories: list[ClusterMemory],
    iters: int,
) -> dict[str, float]:
    """The optimisation itself. Returns the mean of each loss term."""
    recipe = run.recipe
    _, _, erasing = run.chance(stage, epoch)
    encoder.train()
    if teacher is not None:
        teacher.train(recipe.teacher_batch_norm == "batch")
    sums: defaultdict[str, float] = defaultdict(float)
    with run.log.bar(f"{stage} epoch {epoch}", iters) as advance:
        for rows, pixels in _batches(run, stage, epoch, labels, iters, encoder):
            images = erase(to_input(encoder, pixels, run.device), recipe.augment, erasing)
            targets = torch.from_numpy(labels[rows]).to(run.device)
            with autocast(run.device, recipe.precision):
                features = encoder(images)
                guide = _guide(teacher, images)
            contrast, guidance = _losses(recipe, features, guide, memories, targets)
            loss = contrast + recipe.guidance * guidance
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss of {stage} epoch {epoch} is {loss.item()}: lower lr in the recipe, or set precision to "
                    "fp32; the last epoch's checkpoint stands"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for memory, view in zip(memories, features, strict=False):
                memory.update(view.detach(), targets)
            for name, term in {"loss": loss, "contrast": contrast, "guidance": guidance}.items():
                sums[name] += term.item() / iters
            advance(1)
    require_finite(encoder, f"weights after {stage} epoch {epoch}")
    return dict(sums)


def _guide(teacher: Encoder | None, images: Tensor) -> Views | None:
    """The teacher's view of the same augmented batch, without gradient."""
    if teacher is None:
        return None
    with torch.no_grad():
        views: Views = teacher(images)
    return views


def _losses(
    recipe: Recipe, features: Views, guide: Views | None, memories: list[ClusterMemory], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Contrast and guidance, each weighed over the views (LP's L_student; the teacher has no guidance)."""
    weight = recipe.local_loss_weight
    used = list(zip(features, memories, strict=False)) if weight > 0 else [(features.whole, memories[0])]
    contrast = [cluster_contrast(view, memory, labels, temperature=recipe.temperature) for view, memory in used]
    if guide is None:
        return weigh_views(contrast, weight), contrast[0].new_zeros(())
    pulls = [distillation(view, target) for view, target in zip(features, guide, strict=True)][: len(used)]
    return weigh_views(contrast, weight), weigh_views(pulls, weight)
