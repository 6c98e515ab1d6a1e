"""Adam, its rate by epoch, and its state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resight.model import Encoder
from resight.training.recipe import Recipe


def make_optimizer(encoder: Encoder, recipe: Recipe) -> torch.optim.Adam:
    """Adam over everything that learns (necks keep their bias frozen, see `Head`)."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)


def rate(recipe: Recipe, round_: int) -> float:
    """Learning rate of the n-th round of a stage, n from 0.

    StepLR of LP's code: it also steps after the student's round -1, which is round 0 here, so with 50
    epochs and steps at 0.4 and 0.8 the rate drops before rounds 20 and 40.
    """
    drops = sum(round_ >= round(step * recipe.epochs) for step in recipe.lr_steps)
    return recipe.lr * recipe.lr_decay**drops


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, round_: int) -> float:
    """Apply `rate` and return it."""
    value = rate(recipe, round_)
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


def pack_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as "<parameter index>.<name>" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, slots in state.items() for name, value in slots.items()
    }


def unpack_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `pack_state` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
