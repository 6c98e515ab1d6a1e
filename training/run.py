"""What stays the same through a run, and what every step of it must hold to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from resight.errors import RecipeError, TrainingError
from resight.model import Encoder
from resight.training.crops import CropStore
from resight.training.features import PixelCache
from resight.training.links import Links
from resight.training.recipe import Recipe
from resight.training.runlog import RunLog

Stage = Literal["teacher", "student"]
STAGES: tuple[Stage, ...] = ("teacher", "student")


@dataclass(frozen=True)
class Run:
    """A method on a store.

    Attributes:
        store: the N crops; row i is sample i in features, labels and batches.
        recipe: the method.
        seed: of every stream of chance.
        device: "cpu", "cuda" or "cuda:N".
        log: where figures and progress go.
        pixels: crops read so far.
        links: between rows of the store: clusters obey them.
    """

    store: CropStore
    recipe: Recipe
    seed: int
    device: str
    log: RunLog
    pixels: PixelCache = field(default_factory=PixelCache)
    links: Links | None = None

    def chance(self, stage: Stage, epoch: int) -> tuple[np.random.Generator, ...]:
        """Independent streams for the sampler, for pixels (drawn in a thread), for erasing and for the objective."""
        seeds = np.random.SeedSequence([self.seed, STAGES.index(stage), epoch + 1]).spawn(4)
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
