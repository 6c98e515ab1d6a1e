"""Adaptation: unlabelled crops and initial weights become a student made for the site.

*Learning to Purification* (Lan et al., TIP 2023): a teacher is trained by cluster contrast on three views;
a student starts again from the initial weights, takes the teacher's labels for one longer round, and is
pulled to the frozen teacher's features all the time. With `labels = "persons"` the same loop is supervised.

An epoch is a function of the weights before it and (seed, stage, epoch), so a run that was killed goes
on from its last finished epoch to the result of an unbroken one.
"""

from __future__ import annotations

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
from resight.model import Encoder, with_parts
from resight.training.distill import Guide, fit_student
from resight.training.distributed import copy_first, from_first, require_even_shares
from resight.training.epoch import Round, train_epoch
from resight.training.features import read_batches, to_input
from resight.training.optimizer import make_optimizer, pack_state, set_rate, unpack_state
from resight.training.run import STAGES, Run, Stage, require_finite
from resight.training.step import Trainee
from resight.weights import InitialWeights, restore_batch_norm

log = logging.getLogger(__name__)
STATISTICS_CROPS = 1024  # taken evenly over the store; each gives a norm hundreds of map positions to average

MOMENTS, KEPT = "optimizer.", "kept."  # names of what training goes on from

History = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Adaptation:
    """A run, where it starts and where its checkpoints go.

    Attributes:
        run: crops, method and device.
        initial: the encoder both stages start from; left as it is.
        student: what the student starts from instead, of any backbone: distillation into a smaller model.
        out: folder of the result. The teacher stands beside it as `<out>-teacher`, never overwritten.
    """

    run: Run
    initial: InitialWeights
    out: Path
    student: InitialWeights | None = None

    def start(self, stage: Stage) -> InitialWeights:
        """Where a stage starts."""
        return self.student if stage == "student" and self.student is not None else self.initial

    def folder(self, stage: Stage) -> Path:
        """Where a stage's checkpoint stands."""
        is_last = stage == "student" or not self.run.recipe.student
        return self.out if is_last else self.out.with_name(f"{self.out.name}-teacher")


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
    require_even_shares(recipe)
    from_first(lambda: _check(plan, resume))
    teacher, history = _train_stage(plan, "teacher", _start(plan, "teacher"), None, [], resume)
    if recipe.student:
        student = _start(plan, "student")
        if plan.student is not None:
            student = _placed(fit_student(student, teacher), plan.run.device)
        _train_stage(plan, "student", student, Guide(teacher), history, resume)
    return from_first(lambda: load_checkpoint(plan.out))


def _start(plan: Adaptation, stage: Stage) -> Encoder:
    """The stage's initial encoder, a copy in the recipe's shape, ready to be trained."""
    initial, recipe = plan.start(stage), plan.run.recipe
    require_finite(initial.encoder, "initial weights")
    encoder = _placed(with_parts(initial.encoder, recipe.parts, recipe.local_share), plan.run.device)
    if initial.statistics_missing:
        _restore_statistics(encoder, plan.run)
    return encoder


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
    plan: Adaptation, stage: Stage, encoder: Encoder, guide: Guide | None, before: History, resume: bool
) -> tuple[Encoder, History]:
    """Label, train and write, `epochs` times. A student has a round -1 on the teacher's labels before."""
    run, folder = plan.run, plan.folder(stage)
    first = 0 if guide is None else -1
    history, now = list(before), Round(stage, first)
    state: Mapping[str, torch.Tensor] = {}
    found = from_first(lambda: _find_last_epoch(plan, folder, stage) if resume else None)
    if found is not None:
        encoder = _placed(found.encoder, run.device)
        history, state = list(found.provenance.history), found.resume
        now = Round(stage, found.provenance.epoch + 1, _unpack(state, KEPT))
        log.info("%s goes on after epoch %d", stage, now.epoch - 1)
    copy_first(encoder)
    optimizer = make_optimizer(encoder, run.recipe)
    if state:
        unpack_state(optimizer, _unpack(state, MOMENTS))
    trainee = Trainee(encoder, optimizer, guide)
    while now.epoch < run.recipe.epochs:
        lr = set_rate(optimizer, run.recipe, now.epoch - first)
        figures = {"lr": lr, **train_epoch(_settled(run, history), now, trainee)}
        history.append({"stage": stage, "epoch": now.epoch, **figures})
        run.log.epoch(stage, now.epoch, figures)
        is_last = now.epoch + 1 == run.recipe.epochs
        unfinished = None if is_last else _pack(pack_state(optimizer), MOMENTS) | _pack(now.kept, KEPT)
        _write(plan, stage, now.epoch, encoder, history, unfinished)
        now.epoch += 1
    return encoder, history


def _pack(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The same tensors under names that say what they are for."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _unpack(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What `_pack` was given."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _settled(run: Run, history: History) -> Run:
    """The run with the eps its first epoch chose: one for all epochs, as in LP.

    Chosen anew each time it would fall with the distances inside clusters that training has just made, and
    every epoch would split people further.
    """
    if run.recipe.cluster.eps != "auto" or not history or "eps" not in history[0]:
        return run
    settings = replace(run.recipe.cluster, eps=float(history[0]["eps"]))
    return replace(run, recipe=replace(run.recipe, cluster=settings))


def _write(
    plan: Adaptation, stage: Stage, epoch: int, encoder: Encoder, history: History, resume: Mapping[str, Any] | None
) -> None:
    """The checkpoint of an epoch, by the first process; the others wait until it stands."""

    def write() -> None:
        write_checkpoint(plan.folder(stage), encoder, _provenance(plan, stage, epoch, history), resume=resume)

    from_first(write)


def _provenance(plan: Adaptation, stage: Stage, epoch: int, history: History) -> Provenance:
    """Everything that made these weights; plain JSON values, so that a run can be told from another."""
    run = plan.run
    recipe = json.loads(json.dumps({**run.recipe.to_json(), "seed": run.seed}))
    if run.links:
        recipe["links"] = run.links.digest
    return Provenance(recipe, stage, epoch, run.store.fingerprint, plan.start(stage).source, tuple(history))


def _find_last_epoch(plan: Adaptation, folder: Path, stage: Stage) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one, which must be this very run's."""
    if not is_checkpoint(folder):
        return None
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
