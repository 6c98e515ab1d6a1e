"""The optimizer, its rate by epoch, and its state as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resight.model import Encoder
from resight.training.recipe import Recipe

WARMUP_START = 0.01  # O2CAP's linear warm-up begins at a hundredth of the rate


def make_optimizer(encoder: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over everything that learns (necks keep their bias frozen, see `Head`)."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def rate(recipe: Recipe, round_: int) -> float:
    """Learning rate of the n-th round of a stage, n from 0.

    StepLR of LP's code: it also steps after the student's round -1, which is round 0 here, so with 50
    epochs and steps at 0.4 and 0.8 the rate drops before rounds 20 and 40. O2CAP's warm-up grows linearly.
    """
    drops = sum(round_ >= round(step * recipe.epochs) for step in recipe.lr_steps)
    grown = WARMUP_START + (1 - WARMUP_START) * round_ / recipe.warmup if round_ < recipe.warmup else 1.0
    return recipe.lr * grown * recipe.lr_decay**drops


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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # fused steps walk both in memory order: the layouts must agree
            tensor = torch.empty_like(parameter).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor.detach()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
