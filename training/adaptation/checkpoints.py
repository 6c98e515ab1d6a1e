"""Checkpoints of a run: where each stage is written, what it takes to resume, and checks before training."""

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
from resight.encoder.weights import InitialWeights
from resight.errors import CheckpointError, SiteError
from resight.training.adaptation.run import STAGES, Stage, StageState, TrainingRun
from resight.training.features.distributed import on_first_process

MOMENTS, CARRIED = "optimizer.", "kept."  # name prefixes of the tensors needed to resume

History = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Adaptation:
    """A training run with its initial weights and its output folders.

    Attributes:
        run: crops, recipe and device.
        initial: the encoder both stages start from; not modified.
        student: other initial weights for the student, of any backbone: distillation into a smaller model.
        out: folder of the result. The teacher is written next to it as `<out>-teacher`, never overwritten.
    """

    run: TrainingRun
    initial: InitialWeights
    out: Path
    student: InitialWeights | None = None

    def start(self, stage: Stage) -> InitialWeights:
        """The initial weights of a stage."""
        return self.student if stage == "student" and self.student is not None else self.initial

    def folder(self, stage: Stage) -> Path:
        """The checkpoint folder of a stage."""
        is_last = stage == "student" or not self.run.recipe.student
        return self.out if is_last else self.out.with_name(f"{self.out.name}-teacher")


def check_plan(plan: Adaptation, resume: bool) -> None:
    """Check the store and the output folders before anything is computed."""
    recipe, store = plan.run.recipe, plan.run.store
    if recipe.labels == "persons" and not store.has_persons:
        raise SiteError(
            f"recipe {recipe.name!r} trains with person labels, and the store has none: use recipe 'purify'"
        )
    if recipe.labels == "persons" and len(np.unique(store.persons)) < 2:
        raise SiteError(f"all {len(store)} crops show one person: expected at least two persons")
    least = 2 * recipe.cluster.min_samples
    if len(store) < least:
        raise SiteError(
            f"{len(store)} usable crops are too few to adapt to: expected at least {least}, preferably thousands"
        )
    existing = [folder for folder in map(plan.folder, STAGES) if folder.exists()]
    if existing and not resume:
        raise CheckpointError(f"{existing[0]} exists: choose another --out, remove it, or continue with --resume")
    foreign = [folder for folder in existing if not is_checkpoint(folder)]
    if foreign:
        raise CheckpointError(
            f"{foreign[0]} exists and is not a checkpoint to resume: choose another --out, or remove it"
        )


def pack_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors with a prefix on their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unpack_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names have the prefix, without it: the inverse of `pack_tensors`."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def write_epoch(plan: Adaptation, state: StageState, history: History) -> None:
    """Write the checkpoint of an epoch in the first process; the others wait for it.

    It holds what resuming needs, unless it is the stage's last.
    """
    to_resume = None
    if state.epoch + 1 < plan.run.recipe.epochs:
        to_resume = pack_tensors(pack_optimizer(state.optimizer), MOMENTS) | pack_tensors(state.carried, CARRIED)

    def write() -> None:
        provenance = _provenance(plan, state.stage, state.epoch, history)
        write_checkpoint(plan.folder(state.stage), state.encoder, provenance, resume=to_resume)

    on_first_process(write)


def _provenance(plan: Adaptation, stage: Stage, epoch: int, history: History) -> Provenance:
    """Everything the weights depend on, as plain JSON values, so that two runs can be compared."""
    run = plan.run
    recipe = json.loads(json.dumps({**run.recipe.to_json(), "seed": run.seed}))
    if run.links:
        recipe["links"] = run.links.digest
    return Provenance(recipe, stage, epoch, run.store.fingerprint, plan.start(stage).source, tuple(history))


def find_last_epoch(plan: Adaptation, folder: Path, stage: Stage) -> Checkpoint | None:
    """The checkpoint to resume from, or None; refuses one of a run with other arguments."""
    if not is_checkpoint(folder):
        return None
    found = load_checkpoint(folder)
    expected = _provenance(plan, stage, found.provenance.epoch, [])
    for field in ("recipe", "stage", "store_fingerprint", "initial_weights"):
        found_value, value = getattr(found.provenance, field), getattr(expected, field)
        if found_value != value:
            raise CheckpointError(
                f"{folder} was made with another {field.replace('_', ' ')} ({_difference(found_value, value)}): "
                "resume with the same arguments, or choose another --out"
            )
    return found


def _difference(old: Any, new: Any, name: str = "") -> str:
    """Describe the difference between two values, down to the keys of mappings."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return f"{name} {old!r}, now {new!r}".strip()
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return "; ".join(_difference(old.get(key), new.get(key), f"{name}.{key}".strip(".")) for key in keys)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts of an optimizer as "<parameter index>.<name>" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, slots in state.items() for name, value in slots.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `pack_optimizer` into an optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # fused optimizers iterate in memory order, so the layouts must match
            tensor = torch.empty_like(parameter).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor.detach()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
