"""Adaptation: unlabelled crops and initial weights become a student made for the site.

*Learning to Purification* (Lan et al., TIP 2023): a teacher is trained by cluster contrast on three views;
a student starts again from the initial weights, takes the teacher's labels for one longer round, and is
pulled to the frozen teacher's features all the time. With `labels = "persons"` the same loop is supervised.

An epoch is a function of the weights before it and (seed, stage, epoch), so a run that was killed goes
on from its last finished epoch to the result of an unbroken one.

The batches of one epoch: forward, losses, backward, step, memory update.

A batch may be computed in parts, one after the other (`accumulate`) and spread over processes (`distributed`): its
loss is a sum over samples, its gradient one over parts, its batch norms see groups (`ghost`), and the memories
follow all its features in order. So parts and processes change nothing but memory and time.

Letters: B batch, D feature size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
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
    KEPT,
    MOMENTS,
    Adaptation,
    History,
    check_plan,
    find_last_epoch,
    pack_optimizer,
    pack_tensors,
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
    EpochState,
    Stage,
    TrainingRun,
    TrainState,
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
    trainee: TrainState,
    objective: Objective,
    batches: Iterator[tuple[Ints, Pixels]],
    erasing: np.random.Generator,
    *,
    total: int,
    what: str,
) -> dict[str, float]:
    """Take an optimisation step for each batch.

    Args:
        run: see `TrainingRun`.
        trainee: see `TrainState`.
        objective: contrasts the batch; its memories follow after each step.
        batches: rows of the store, and this process's share of their pixels, flipped and shifted already.
        erasing: chance of random erasing.
        total: how many batches there are.
        what: name of the work, for progress and errors.

    Returns:
        Mean of the loss and of each of its terms.

    Raises:
        TrainingError: a loss or, at the end, a weight is not finite.
    """
    recipe, encoder, guide = run.recipe, trainee.encoder, trainee.guide
    encoder.train()
    if guide is not None:
        guide.encoder.train(recipe.teacher_batch_norm == "batch")
    # float16 gradients underflow unless the loss is scaled up; a new scaler an epoch, so that resuming changes nothing
    scaler = torch.amp.GradScaler(torch.device(run.device).type, enabled=recipe.precision == "fp16")
    sums: defaultdict[str, float] = defaultdict(float)
    with run.log.bar(what, total) as advance:
        for _ in range(total):
            with shared_errors():
                rows, pixels = next(batches)
                mine = local_slice(len(rows))
                images = to_input(encoder, pixels, run.device)
                erase(images, recipe.augment, erasing, batch=len(rows), start=mine.start)
                trainee.optimizer.zero_grad(set_to_none=True)
                features, terms = _backward(run, trainee, objective, images, rows, scaler)
            figures = dict(zip(terms, all_reduce_sum(torch.stack(list(terms.values()))).tolist(), strict=True))
            if not np.isfinite(figures["loss"]):
                raise TrainingError(
                    f"the loss of {what} is {figures['loss']}: lower lr in the recipe, or set precision to fp32; the "
                    "last epoch's checkpoint stands"
                )
            sum_gradients(encoder)
            scaler.step(trainee.optimizer)
            scaler.update()
            whole = [gather_slices(view, len(rows)) for view in features]
            objective.update(whole, torch.from_numpy(rows).to(run.device))
            for name, figure in figures.items():
                sums[name] += figure / total
            advance(1)
    average_batch_norm(encoder)
    require_finite(encoder, f"weights after {what}")
    return dict(sums)


def _backward(
    run: TrainingRun,
    trainee: TrainState,
    objective: Objective,
    images: Tensor,
    rows: Ints,
    scaler: torch.amp.GradScaler,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features and loss terms of this process's share of a batch, computed part by part, and their gradients."""
    recipe, count = run.recipe, run.recipe.accumulate
    weights = torch.from_numpy(sample_weights(run.store.cameras[rows], recipe.aggregate)[local_slice(len(rows))]).to(
        run.device
    )
    mine = torch.from_numpy(rows[local_slice(len(rows))]).to(run.device)
    seen: list[tuple[Tensor, ...]] = []
    totals: dict[str, Tensor] = {}
    parts = zip(images.chunk(count), mine.chunk(count), weights.chunk(count), strict=True)
    for index, (pixels, own, weight) in enumerate(parts):
        with ExitStack() as within:
            for network in (trainee.encoder, *([trainee.guide.encoder] if trainee.guide else [])):
                within.enter_context(batch_part(network, index, count))
            with autocast(run.device, recipe.precision):
                features = trainee.encoder(pixels)[: views_used(recipe)]
                targets = trainee.guide.look(pixels) if trainee.guide else ()
        terms = {"contrast": weight * objective.losses(features, own)}
        if trainee.guide:
            guidance = trainee.guide.losses(features, targets, recipe)
            terms |= {name: term / len(rows) for name, term in guidance.items()}
        summed = _weighted_loss({name: term.sum() for name, term in terms.items()}, recipe)
        scaler.scale(summed["loss"]).backward()  # type: ignore[no-untyped-call]
        seen.append(tuple(view.detach() for view in features))
        totals = {name: totals.get(name, 0) + term.detach() for name, term in summed.items()}
    return [torch.cat(views) for views in zip(*seen, strict=True)], totals


def _weighted_loss(terms: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The terms of a loss and, as "loss", their weighed sum."""
    scale = {"contrast": 1.0, "guidance": recipe.guidance, "relation": recipe.relation}
    loss = sum((scale[name] * term for name, term in terms.items()), start=terms["contrast"].new_zeros(()))
    return {"loss": loss, **terms}


def require_even_slices(recipe: Recipe) -> None:
    """Refuse a batch that does not fall into equal slices of whole groups (see `ghost`).

    With samples_per_bn = 0 statistics are those of what a process computes at once, so nothing may be divided.

    Raises:
        RecipeError: says what to change.
    """
    parts, samples = world_size() * recipe.accumulate, recipe.samples_per_bn
    if parts == 1:
        return
    where = f"{world_size()} processes with accumulate = {recipe.accumulate} divide a batch into {parts} slices"
    if samples == 0:
        raise RecipeError(
            f"{where}, and samples_per_bn = 0 normalises over the whole batch: set samples_per_bn to a number whose "
            f"{parts}-fold divides the batch of {recipe.batch}",
            field="samples_per_bn",
        )
    if recipe.batch % (parts * samples):
        least = -(-recipe.batch // (parts * samples)) * parts * samples
        raise RecipeError(
            f"{where} of whole groups of samples_per_bn = {samples}, and {recipe.batch} crops do not divide so: set "
            f"batch to a multiple of {parts * samples} ({least} is next), or samples_per_bn to a divisor of "
            f"{recipe.batch / parts:g}",
            field="batch",
        )


def train_epoch(run: TrainingRun, now: EpochState, trainee: TrainState) -> dict[str, float]:
    """Label, build memories, train `iters` batches.

    A student's round -1 differs: labels and centroids come from the teacher, memories stay frozen and there are
    twice as many batches.

    Args:
        run: see `TrainingRun`.
        now: see `EpochState`; its ``kept`` is brought up to date.
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
    views = extract_views(run, source, parts=parts)
    clustering = label_crops(run, views)
    health = label_health(run, now, clustering)
    if trainee.guide and recipe.relation:
        set_teacher_anchors(run, trainee, clustering.labels)
    objective = make_objective(run, now, views, clustering)
    labelled = time.perf_counter()
    sampling, moving, erasing, _ = run.chance(now.stage, now.epoch)
    iters = recipe.iters * (2 if now.borrowed else 1)
    batches = read_batches(
        run.store,
        itertools.islice(draw_batches(run, clustering.labels, sampling), iters),
        trainee.encoder.config.image,
        cache=run.pixels,
        part=local_slice,
        then=lambda pixels: shift_and_flip(
            pixels, recipe.augment, moving, batch=recipe.batch, start=local_slice(recipe.batch).start
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


log = logging.getLogger(__name__)
STATISTICS_CROPS = 1024  # taken evenly over the store; each gives a norm hundreds of map positions to average


def adapt(plan: Adaptation, *, resume: bool = False) -> Checkpoint:
    """Train the recipe's stages and return the last one's checkpoint, read back from disk.

    In several processes (see `distributed`) the first reads and writes checkpoints for all.

    Args:
        plan: see `Adaptation`.
        resume: go on after the last finished epoch of an earlier call with the same arguments.

    Raises:
        RecipeError: the batch cannot be divided as accumulate and the number of processes demand.
        SiteError: persons are needed and missing, or there are too few crops.
        TrainingError: clusters collapsed, or a loss or weight is not finite; the last epoch's checkpoint stands.
        CheckpointError: the output folder is taken, or holds a run with other arguments.
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
    """The stage's initial encoder, a copy in the recipe's shape, ready to be trained."""
    initial, recipe = plan.start(stage), plan.run.recipe
    require_finite(initial.encoder, "initial weights")
    encoder = _to_device(with_parts(initial.encoder, recipe.parts, recipe.local_share), plan.run.device)
    if initial.statistics_missing:
        _restore_statistics(encoder, plan.run)
    return encoder


def _to_device(encoder: Encoder, device: str) -> Encoder:
    """On the device, channels last: twice as fast for OSNet on a CPU."""
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(device)


def _restore_statistics(encoder: Encoder, run: TrainingRun) -> None:
    """Measure on the site's own crops what folding batch norm away has lost."""
    rows = np.linspace(0, len(run.store) - 1, min(len(run.store), STATISTICS_CROPS)).astype(np.int64)
    crops = read_batches(run.store, np.array_split(rows, -(-len(rows) // run.recipe.batch)), encoder.config.image)
    restore_batch_norm(encoder, (to_input(encoder, pixels, run.device) for _, pixels in crops))


def _train_stage(
    plan: Adaptation, stage: Stage, encoder: Encoder, guide: Teacher | None, before: History, resume: bool
) -> tuple[Encoder, History]:
    """Label, train and write, `epochs` times. A student has a round -1 on the teacher's labels before."""
    run, folder = plan.run, plan.folder(stage)
    first = 0 if guide is None else -1
    history, now = list(before), EpochState(stage, first)
    state: Mapping[str, torch.Tensor] = {}
    found = on_first_process(lambda: find_last_epoch(plan, folder, stage) if resume else None)
    if found is not None:
        encoder = _to_device(found.encoder, run.device)
        history, state = list(found.provenance.history), found.resume
        now = EpochState(stage, found.provenance.epoch + 1, unpack_tensors(state, KEPT))
        log.info("%s goes on after epoch %d", stage, now.epoch - 1)
    broadcast_weights(encoder)
    optimizer = make_optimizer(encoder, run.recipe)
    if state:
        unpack_optimizer(optimizer, unpack_tensors(state, MOMENTS))
    trainee = TrainState(encoder, optimizer, guide)
    while now.epoch < run.recipe.epochs:
        lr = set_learning_rate(optimizer, run.recipe, now.epoch - first)
        figures = {"lr": lr, **train_epoch(_with_chosen_eps(run, history), now, trainee)}
        history.append({"stage": stage, "epoch": now.epoch, **figures})
        run.log.epoch(stage, now.epoch, figures)
        is_last = now.epoch + 1 == run.recipe.epochs
        unfinished = (
            None if is_last else pack_tensors(pack_optimizer(optimizer), MOMENTS) | pack_tensors(now.kept, KEPT)
        )
        write_epoch(plan, stage, now.epoch, encoder, history, unfinished)
        now.epoch += 1
    return encoder, history


def _with_chosen_eps(run: TrainingRun, history: History) -> TrainingRun:
    """The run with the eps its first epoch chose: one for all epochs, as in LP.

    Chosen anew each time it would fall with the distances inside clusters that training has just made, and
    every epoch would split people further.
    """
    if run.recipe.cluster.eps != "auto" or not history or "eps" not in history[0]:
        return run
    settings = replace(run.recipe.cluster, eps=float(history[0]["eps"]))
    return replace(run, recipe=replace(run.recipe, cluster=settings))
