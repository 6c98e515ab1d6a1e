"""The adaptation loop: stages, epochs and optimisation steps that turn initial weights into a model of the site.

The method is *Learning to Purification* (Lan et al., TIP 2023): a teacher is trained by cluster contrast on three
views; a student starts again from the initial weights, uses the teacher's labels in one longer first epoch and is
regularised towards the frozen teacher's features throughout. With `labels = "persons"` the same loop is supervised.

An epoch depends only on the previous weights and on (seed, stage, epoch), so a run that is killed and resumed gives
the same result as an uninterrupted one.

A batch may be split into parts computed in sequence (`accumulate`) and across processes (`features.distributed`).
The loss is a sum over samples, gradients are summed over parts, batch norm works on groups (`ghost_batch_norm`), and
the memories are updated with all features in order, so splitting changes only memory use and run time.

Letters: B batch, D feature size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from resight.arrays import Ints, Pixels
from resight.encoder.checkpoint import Checkpoint, load_checkpoint
from resight.encoder.model import Encoder, with_parts
from resight.encoder.weights import restore_batch_norm
from resight.errors import RecipeError, TrainingError
from resight.training.adaptation.batches import erase, shift_and_flip
from resight.training.adaptation.checkpoints import (
    CARRIED,
    MOMENTS,
    Adaptation,
    History,
    check_plan,
    find_last_epoch,
    unpack_optimizer,
    unpack_tensors,
    write_epoch,
)
from resight.training.adaptation.distill import Teacher, fit_student
from resight.training.adaptation.epoch import (
    draw_batches,
    extract_views,
    label_crops,
    label_health,
    make_objective,
    set_teacher_anchors,
)
from resight.training.adaptation.ghost_batch_norm import batch_part, group_batch_norm
from resight.training.adaptation.loss import sample_weights
from resight.training.adaptation.objective import Objective
from resight.training.adaptation.recipe import Recipe, views_used
from resight.training.adaptation.run import (
    Stage,
    StageState,
    TrainingRun,
    make_optimizer,
    require_finite,
    set_learning_rate,
)
from resight.training.adaptation.selective import InstanceObjective
from resight.training.features.distributed import (
    all_reduce_sum,
    average_batch_norm,
    broadcast_weights,
    gather_slices,
    local_slice,
    on_first_process,
    shared_errors,
    sum_gradients,
    world_size,
)
from resight.training.features.extract import autocast, read_batches, to_input


def train_batches(
    run: TrainingRun,
    state: StageState,
    objective: Objective,
    batches: Iterator[tuple[Ints, Pixels]],
    erasing: np.random.Generator,
    *,
    total: int,
    description: str,
) -> dict[str, float]:
    """Take an optimisation step for each batch.

    Args:
        run: see `TrainingRun`.
        state: see `StageState`.
        objective: contrastive loss; its memories are updated after each step.
        batches: rows of the store, and this process's slice of their pixels, already flipped and shifted.
        erasing: random stream of random erasing.
        total: number of batches.
        description: shown with the progress bar and in errors.

    Returns:
        Mean of the loss and of each of its terms.

    Raises:
        TrainingError: a loss or, at the end, a weight is not finite.
    """
    recipe, encoder, teacher = run.recipe, state.encoder, state.teacher
    encoder.train()
    if teacher is not None:
        teacher.encoder.train(recipe.teacher_batch_norm == "batch")
    # float16 gradients underflow unless the loss is scaled up; a new scaler per epoch keeps resumed runs identical
    scaler = torch.amp.GradScaler(torch.device(run.device).type, enabled=recipe.precision == "fp16")
    sums: defaultdict[str, float] = defaultdict(float)
    with run.log.progress(description, total) as advance:
        for _ in range(total):
            with shared_errors():
                rows, pixels = next(batches)
                own_slice = local_slice(len(rows))
                images = to_input(encoder, pixels, run.device)
                erase(images, recipe.augment, erasing, batch=len(rows), start=own_slice.start)
                state.optimizer.zero_grad(set_to_none=True)
                features, terms = _backward(run, state, objective, images, rows, scaler)
            losses = dict(zip(terms, all_reduce_sum(torch.stack(list(terms.values()))).tolist(), strict=True))
            if not np.isfinite(losses["loss"]):
                raise TrainingError(
                    f"{description}: the loss is {losses['loss']}: lower lr in the recipe, or set precision to fp32; "
                    "the last epoch's checkpoint is intact"
                )
            sum_gradients(encoder)
            scaler.step(state.optimizer)
            scaler.update()
            all_features = [gather_slices(view, len(rows)) for view in features]
            objective.update(all_features, torch.from_numpy(rows).to(run.device))
            for name, value in losses.items():
                sums[name] += value / total
            advance(1)
    average_batch_norm(encoder)
    require_finite(encoder, f"weights after {description}")
    return dict(sums)


def _backward(
    run: TrainingRun,
    state: StageState,
    objective: Objective,
    images: Tensor,
    rows: Ints,
    scaler: torch.amp.GradScaler,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Compute features, loss terms and gradients of this process's slice of a batch, part by part."""
    recipe, count = run.recipe, run.recipe.accumulate
    weights = torch.from_numpy(sample_weights(run.store.cameras[rows], recipe.aggregate)[local_slice(len(rows))]).to(
        run.device
    )
    own_rows = torch.from_numpy(rows[local_slice(len(rows))]).to(run.device)
    computed: list[tuple[Tensor, ...]] = []
    totals: dict[str, Tensor] = {}
    parts = zip(images.chunk(count), own_rows.chunk(count), weights.chunk(count), strict=True)
    for index, (pixels, part_rows, weight) in enumerate(parts):
        with ExitStack() as stack:
            for network in (state.encoder, *([state.teacher.encoder] if state.teacher else [])):
                stack.enter_context(batch_part(network, index, count))
            with autocast(run.device, recipe.precision):
                features = state.encoder(pixels)[: views_used(recipe)]
                targets = state.teacher.views(pixels) if state.teacher else ()
        terms = {"contrast": weight * objective.losses(features, part_rows)}
        if state.teacher:
            guidance = state.teacher.losses(features, targets, recipe)
            terms |= {name: term / len(rows) for name, term in guidance.items()}
        summed = _weighted_loss({name: term.sum() for name, term in terms.items()}, recipe)
        scaler.scale(summed["loss"]).backward()  # type: ignore[no-untyped-call]
        computed.append(tuple(view.detach() for view in features))
        totals = {name: totals.get(name, 0) + term.detach() for name, term in summed.items()}
    return [torch.cat(views) for views in zip(*computed, strict=True)], totals


def _weighted_loss(terms: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The loss terms and, as "loss", their weighted sum."""
    scale = {"contrast": 1.0, "guidance": recipe.guidance, "relation": recipe.relation}
    loss = sum((scale[name] * term for name, term in terms.items()), start=terms["contrast"].new_zeros(()))
    return {"loss": loss, **terms}


def require_even_slices(recipe: Recipe) -> None:
    """Refuse a batch size that cannot be divided into equal slices of complete groups (see `ghost_batch_norm`).

    With samples_per_bn = 0 batch norm uses everything a process computes at once, so the batch must not be divided.

    Raises:
        RecipeError: names the setting to change.
    """
    parts, samples = world_size() * recipe.accumulate, recipe.samples_per_bn
    if parts == 1:
        return
    where = f"{world_size()} processes with accumulate = {recipe.accumulate} divide a batch into {parts} slices"
    if samples == 0:
        raise RecipeError(
            f"{where}, and samples_per_bn = 0 normalises over the whole batch: set samples_per_bn to a value for "
            f"which {parts} * samples_per_bn divides the batch of {recipe.batch}",
            field="samples_per_bn",
        )
    if recipe.batch % (parts * samples):
        least = -(-recipe.batch // (parts * samples)) * parts * samples
        raise RecipeError(
            f"{where} of complete groups of samples_per_bn = {samples}, but {recipe.batch} crops are not divisible: "
            f"set batch to a multiple of {parts * samples} (next: {least}), or samples_per_bn to a divisor of "
            f"{recipe.batch / parts:g}",
            field="batch",
        )


def train_epoch(run: TrainingRun, state: StageState) -> dict[str, float]:
    """Label the crops, build the memories and train `iters` batches.

    A student's epoch -1 differs: labels and centroids come from the teacher, memories are frozen and the number of
    batches is doubled.

    Args:
        run: see `TrainingRun`.
        state: see `StageState`; its encoder is trained in place and its ``carried`` tensors are updated.

    Returns:
        Losses, cluster health and speed.

    Raises:
        TrainingError: clusters collapsed, or a loss is not finite.
    """
    recipe, started = run.recipe, time.perf_counter()
    for network in (state.encoder, *([state.teacher.encoder] if state.teacher else [])):
        group_batch_norm(network, recipe.samples_per_bn)
    source = state.teacher.encoder if state.uses_teacher_labels and state.teacher else state.encoder
    parts = views_used(recipe) is None or recipe.cluster.local_weight > 0
    views = extract_views(run, source, parts=parts)
    clustering = label_crops(run, views)
    health = label_health(run, state, clustering)
    if state.teacher and recipe.relation:
        set_teacher_anchors(run, state.teacher, clustering.labels)
    objective = make_objective(run, state, views, clustering)
    labelled = time.perf_counter()
    sampling, moving, erasing, _ = run.random_streams(state.stage, state.epoch)
    iters = recipe.iters * (2 if state.uses_teacher_labels else 1)
    batches = read_batches(
        run.store,
        itertools.islice(draw_batches(run, clustering.labels, sampling), iters),
        state.encoder.config.image,
        cache=run.pixels,
        part=local_slice,
        transform=lambda pixels: shift_and_flip(
            pixels, recipe.augment, moving, batch=recipe.batch, start=local_slice(recipe.batch).start
        ),
    )
    losses = train_batches(run, state, objective, batches, erasing, total=iters, description=str(state))
    trained = time.perf_counter()
    if isinstance(objective, InstanceObjective):
        state.carried |= objective.banks
    speed = {
        "images_per_s": iters * recipe.batch / (trained - labelled),
        "label_s": labelled - started,
        "train_s": trained - labelled,
    }
    return {**losses, **health, **speed}


log = logging.getLogger(__name__)
STATISTICS_CROPS = 1024  # spread evenly over the store; each gives a norm hundreds of map positions to average


def adapt(plan: Adaptation, *, resume: bool = False) -> Checkpoint:
    """Train the recipe's stages and return the checkpoint of the last one, read back from disk.

    With several processes (see `features.distributed`) the first one reads and writes the checkpoints.

    Args:
        plan: see `Adaptation`.
        resume: continue after the last finished epoch of an earlier call with the same arguments.

    Raises:
        RecipeError: the batch cannot be divided by accumulate and the number of processes.
        SiteError: the recipe needs person labels and the store has none, or there are too few crops.
        TrainingError: clusters collapsed, or a loss or weight is not finite; the last epoch's checkpoint is intact.
        CheckpointError: the output folder is in use, or holds a run with other arguments.
    """
    recipe = plan.run.recipe
    require_even_slices(recipe)
    on_first_process(lambda: check_plan(plan, resume))
    teacher, history = _train_stage(plan, "teacher", _start(plan, "teacher"), None, [], resume)
    if recipe.student:
        student = _start(plan, "student")
        if plan.student is not None:
            student = _to_device(fit_student(student, teacher), plan.run.device)
        _train_stage(plan, "student", student, Teacher(teacher), history, resume)
    return on_first_process(lambda: load_checkpoint(plan.out))


def _start(plan: Adaptation, stage: Stage) -> Encoder:
    """A copy of the stage's initial encoder with the recipe's heads, on the device and ready to train."""
    initial, recipe = plan.start(stage), plan.run.recipe
    require_finite(initial.encoder, "initial weights")
    encoder = _to_device(with_parts(initial.encoder, recipe.parts, recipe.local_share), plan.run.device)
    if initial.statistics_missing:
        _restore_statistics(encoder, plan.run)
    return encoder


def _to_device(encoder: Encoder, device: str) -> Encoder:
    """Move an encoder to the device, in channels-last layout: twice as fast for OSNet on a CPU."""
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(device)


def _restore_statistics(encoder: Encoder, run: TrainingRun) -> None:
    """Estimate the batch norm statistics, lost by folding batch norm, from the site's own crops."""
    rows = np.linspace(0, len(run.store) - 1, min(len(run.store), STATISTICS_CROPS)).astype(np.int64)
    crops = read_batches(run.store, np.array_split(rows, -(-len(rows) // run.recipe.batch)), encoder.config.image)
    restore_batch_norm(encoder, (to_input(encoder, pixels, run.device) for _, pixels in crops))


def _train_stage(
    plan: Adaptation, stage: Stage, encoder: Encoder, teacher: Teacher | None, before: History, resume: bool
) -> tuple[Encoder, History]:
    """Train `epochs` epochs and write a checkpoint after each. A student first trains epoch -1 on teacher labels."""
    run, folder, first = plan.run, plan.folder(stage), 0 if teacher is None else -1
    found = on_first_process(lambda: find_last_epoch(plan, folder, stage) if resume else None)
    if found is not None:
        encoder = _to_device(found.encoder, run.device)
    broadcast_weights(encoder)
    history, state = list(before), StageState(stage, encoder, make_optimizer(encoder, run.recipe), teacher, first)
    if found is not None:
        history, state.epoch = list(found.provenance.history), found.provenance.epoch + 1
        state.carried = unpack_tensors(found.resume, CARRIED)
        if found.resume:
            unpack_optimizer(state.optimizer, unpack_tensors(found.resume, MOMENTS))
        log.info("%s continues after epoch %d", stage, state.epoch - 1)
    while state.epoch < run.recipe.epochs:
        lr = set_learning_rate(state.optimizer, run.recipe, state.epoch - first)
        metrics = {"lr": lr, **train_epoch(_with_chosen_eps(run, history), state)}
        history.append({"stage": stage, "epoch": state.epoch, **metrics})
        run.log.epoch(stage, state.epoch, metrics)
        write_epoch(plan, state, history)
        state.epoch += 1
    return encoder, history


def _with_chosen_eps(run: TrainingRun, history: History) -> TrainingRun:
    """The run with the eps chosen in its first epoch, used for all epochs as in LP.

    Choosing it again in every epoch would lower it as training shrinks distances inside clusters, so that each epoch
    would split people further.
    """
    if run.recipe.cluster.eps != "auto" or not history or "eps" not in history[0]:
        return run
    settings = replace(run.recipe.cluster, eps=float(history[0]["eps"]))
    return replace(run, recipe=replace(run.recipe, cluster=settings))
