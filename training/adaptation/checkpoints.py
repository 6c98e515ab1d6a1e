"""Checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resight.encoder.checkpoint import (
    Checkpoint,
    Provenance,
    is_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from resight.encoder.model import Encoder
from resight.encoder.weights import InitialWeights
from resight.errors import CheckpointError, SiteError
from resight.training.adaptation.run import STAGES, Stage, TrainingRun
from resight.training.features.distributed import on_first_process

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

    run: TrainingRun
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


def check_plan(plan: Adaptation, resume: bool) -> None:
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


def pack_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The same tensors under names that say what they are for."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unpack_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What `pack_tensors` was given."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_epoch(
    plan: Adaptation, stage: Stage, epoch: int, encoder: Encoder, history: History, resume: Mapping[str, Any] | None
) -> None:
    """The checkpoint of an epoch, by the first process; the others wait until it stands."""

    def write() -> None:
        write_checkpoint(plan.folder(stage), encoder, _provenance(plan, stage, epoch, history), resume=resume)

    on_first_process(write)


def _provenance(plan: Adaptation, stage: Stage, epoch: int, history: History) -> Provenance:
    """Everything that made these weights; plain JSON values, so that a run can be told from another."""
    run = plan.run
    recipe = json.loads(json.dumps({**run.recipe.to_json(), "seed": run.seed}))
    if run.links:
        recipe["links"] = run.links.digest
    return Provenance(recipe, stage, epoch, run.store.fingerprint, plan.start(stage).source, tuple(history))


def find_last_epoch(plan: Adaptation, folder: Path, stage: Stage) -> Checkpoint | None:
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


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as "<parameter index>.<name>" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, slots in state.items() for name, value in slots.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `pack_optimizer` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # fused steps walk both in memory order: the layouts must agree
            tensor = torch.empty_like(parameter).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor.detach()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
