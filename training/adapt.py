"""Adaptation: unlabelled crops and initial weights become a student made for the site.

*Learning to Purification* (Lan et al., TIP 2023): a teacher is trained by cluster contrast on three views;
a student starts again from the initial weights, takes the teacher's labels for one longer round, and is
pulled to the frozen teacher's features all the time. With `labels = "persons"` the same loop is supervised.

An epoch is a function of the weights before it and (seed, stage, epoch), so a run that was killed goes
on from its last finished epoch to the result of an unbroken one.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resight.checkpoint import Checkpoint, Provenance, is_checkpoint, load_checkpoint, write_checkpoint
from resight.errors import CheckpointError, SiteError
from resight.model import Encoder
from resight.training.epoch import STAGES, Run, Stage, require_finite, train_epoch
from resight.training.features import read_batches, to_input
from resight.training.optimizer import make_optimizer, pack_state, set_rate, unpack_state
from resight.weights import InitialWeights, restore_batch_norm

log = logging.getLogger(__name__)
STATISTICS_CROPS = 1024  # taken evenly over the store; each gives a norm hundreds of map positions to average

History = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Adaptation:
    """A run, where it starts and where its checkpoints go.

    Attributes:
        run: crops, method and device.
        initial: the encoder both stages start from; left as it is.
        out: folder of the result. The teacher stands beside it as `<out>-teacher`, never overwritten.
    """

    run: Run
    initial: InitialWeights
    out: Path

    def folder(self, stage: Stage) -> Path:
        """Where a stage's checkpoint stands."""
        is_last = stage == "student" or not self.run.recipe.student
        return self.out if is_last else self.out.with_name(f"{self.out.name}-teacher")


def adapt(plan: Adaptation, *, resume: bool = False) -> Checkpoint:
    """Train the recipe's stages and return the last one's checkpoint, read back from disk.

    Args:
        plan: see `Adaptation`.
        resume: go on after the last finished epoch of an earlier call with the same arguments.

    Raises:
        SiteError: persons are needed and missing, or there are too few crops.
        TrainingError: clusters collapsed, or a loss or weight is not finite; the last epoch's checkpoint stands.
        CheckpointError: the output folder is taken, or holds a run with other arguments.
    """
    _check(plan, resume)
    require_finite(plan.initial.encoder, "initial weights")
    start = _placed(copy.deepcopy(plan.initial.encoder), plan.run.device)
    if plan.initial.statistics_missing:
        _restore_statistics(start, plan.run)
    teacher, history = _train_stage(plan, "teacher", copy.deepcopy(start), None, [], resume)
    if plan.run.recipe.student:
        _train_stage(plan, "student", start, teacher, history, resume)
    return load_checkpoint(plan.out)


def _placed(encoder: Encoder, device: str) -> Encoder:
    """On the device, channels last: twice as fast for OSNet on a CPU."""
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(device)


def _check(plan: Adaptation, resume: bool) -> None:
    """Refuse what cannot be trained before anything is computed."""
    recipe, store = plan.run.recipe, plan.run.store
    if recipe.labels == "persons" and not store.has_persons:
        raise SiteError(f"recipe {recipe.name!r} trains with persons, and the store names none: take recipe 'purify'")
    if recipe.labels == "persons" and len(np.unique(store.persons)) < 2:
        raise SiteError(f"all {len(store)} crops show one person: expected two or more to tell apart")
    least = 2 * recipe.cluster.min_samples
    if len(store) < least:
        raise SiteError(
            f"{len(store)} usable crops are too few to adapt to: expected at least {least}, better thousands"
        )
    taken = [folder for folder in map(plan.folder, STAGES) if folder.exists()]
    if taken and not resume:
        raise CheckpointError(f"{taken[0]} exists: choose another --out, remove it, or go on with --resume")
    foreign = [folder for folder in taken if not is_checkpoint(folder)]
    if foreign:
        raise CheckpointError(f"{foreign[0]} exists and is no checkpoint to resume: choose another --out, or remove it")


def _restore_statistics(encoder: Encoder, run: Run) -> None:
    """Measure on the site's own crops what folding batch norm away has lost."""
    rows = np.linspace(0, len(run.store) - 1, min(len(run.store), STATISTICS_CROPS)).astype(np.int64)
    crops = read_batches(run.store, np.array_split(rows, -(-len(rows) // run.recipe.batch)), encoder.config.image)
    restore_batch_norm(encoder, (to_input(encoder, pixels, run.device) for _, pixels in crops))


def _train_stage(
    plan: Adaptation, stage: Stage, encoder: Encoder, teacher: Encoder | None, before: History, resume: bool
) -> tuple[Encoder, History]:
    """Label, train and write, `epochs` times. A student has a round -1 on the teacher's labels before."""
    run, folder = plan.run, plan.folder(stage)
    first = 0 if teacher is None else -1
    history, epoch = list(before), first
    state: Mapping[str, torch.Tensor] = {}
    if resume and is_checkpoint(folder):
        found = _find_last_epoch(plan, folder, stage)
        if found is not None:
            encoder = _placed(found.encoder, run.device)
            history, epoch, state = list(found.provenance.history), found.provenance.epoch + 1, found.resume
            log.info("%s goes on after epoch %d", stage, epoch - 1)
    optimizer = make_optimizer(encoder, run.recipe)
    if state:
        unpack_state(optimizer, state)
    while epoch < run.recipe.epochs:
        lr = set_rate(optimizer, run.recipe, epoch - first)
        figures = {"lr": lr, **train_epoch(_settled(run, history), stage, epoch, encoder, teacher, optimizer)}
        history.append({"stage": stage, "epoch": epoch, **figures})
        run.log.epoch(stage, epoch, figures)
        unfinished = pack_state(optimizer) if epoch + 1 < run.recipe.epochs else None
        write_checkpoint(folder, encoder, _provenance(plan, stage, epoch, history), resume=unfinished)
        epoch += 1
    return encoder, history


def _settled(run: Run, history: History) -> Run:
    """The run with the eps its first epoch chose: one for all epochs, as in LP.

    Chosen anew each time it would fall with the distances inside clusters that training has just made, and
    every epoch would split people further.
    """
    if run.recipe.cluster.eps != "auto" or not history or "eps" not in history[0]:
        return run
    settings = replace(run.recipe.cluster, eps=float(history[0]["eps"]))
    return replace(run, recipe=replace(run.recipe, cluster=settings))


def _provenance(plan: Adaptation, stage: Stage, epoch: int, history: History) -> Provenance:
    """Everything that made these weights; plain JSON values, so that a run can be told from another."""
    recipe = json.loads(json.dumps({**plan.run.recipe.to_json(), "seed": plan.run.seed}))
    return Provenance(recipe, stage, epoch, plan.run.store.fingerprint, plan.initial.source, tuple(history))


def _find_last_epoch(plan: Adaptation, folder: Path, stage: Stage) -> Checkpoint | None:
    """The checkpoint to go on from, if it is this very run's."""
    found = load_checkpoint(folder)
    mine = _provenance(plan, stage, found.provenance.epoch, [])
    for what in ("recipe", "stage", "store_fingerprint", "initial_weights"):
        theirs, ours = getattr(found.provenance, what), getattr(mine, what)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} was made with another {what.replace('_', ' ')} ({_difference(theirs, ours)}): "
                "resume with the same arguments, or choose another --out"
            )
    return found


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """Tell what differs between two values, down to the keys of mappings."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return f"{name} {theirs!r}, now {ours!r}".strip()
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    return "; ".join(_difference(theirs.get(key), ours.get(key), f"{name}.{key}".strip(".")) for key in keys)
