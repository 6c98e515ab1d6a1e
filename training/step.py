"""The batches of one epoch: forward, losses, backward, step, memory update.

Letters: B batch, D feature size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resight.errors import TrainingError
from resight.image import Pixels
from resight.model import Encoder, Views
from resight.training.augment import erase
from resight.training.distill import Guide
from resight.training.features import autocast, to_input
from resight.training.loss import shares
from resight.training.neighbours import Ints
from resight.training.objective import Objective
from resight.training.recipe import Recipe
from resight.training.run import Run, require_finite


@dataclass(frozen=True)
class Trainee:
    """Who is trained, and by whom.

    Attributes:
        encoder: trained in place.
        optimizer: of its parameters.
        guide: a student's teacher.
    """

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    guide: Guide | None = None


def train_batches(
    run: Run,
    trainee: Trainee,
    objective: Objective,
    batches: Iterator[tuple[Ints, Pixels]],
    erasing: np.random.Generator,
    *,
    total: int,
    what: str,
) -> dict[str, float]:
    """Take an optimisation step for each batch.

    Args:
        run: see `Run`.
        trainee: see `Trainee`.
        objective: contrasts the batch; its memories follow after each step.
        batches: rows of the store and their pixels, uint8 (B, H, W, 3), flipped and shifted already.
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
    sums: defaultdict[str, float] = defaultdict(float)
    with run.log.bar(what, total) as advance:
        for rows, pixels in batches:
            images = erase(to_input(encoder, pixels, run.device), recipe.augment, erasing)
            with autocast(run.device, recipe.precision):
                features = encoder(images)[: views_used(recipe)]
            row = torch.from_numpy(rows).to(run.device)
            terms = _losses(run, guide, objective, images, features, row)
            loss = terms["loss"]
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss of {what} is {loss.item()}: lower lr in the recipe, or set precision to fp32; the last "
                    "epoch's checkpoint stands"
                )
            trainee.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            trainee.optimizer.step()
            objective.update([view.detach() for view in features], row)  # after backward, which reads the memories
            for name, term in terms.items():
                sums[name] += term.item() / total
            advance(1)
    require_finite(encoder, f"weights after {what}")
    return dict(sums)


def _losses(
    run: Run, guide: Guide | None, objective: Objective, images: Tensor, features: Views, rows: Tensor
) -> dict[str, Tensor]:
    """Every term of a batch's loss and, as "loss", their weighed sum."""
    recipe = run.recipe
    weight = torch.from_numpy(shares(run.store.cameras[rows.cpu()], recipe.aggregate)).to(run.device)
    terms = {"contrast": (weight * objective.losses(features, rows)).sum()}
    if guide is not None:
        with autocast(run.device, recipe.precision):
            targets = guide.look(images)
        terms |= {name: term.mean() for name, term in guide.losses(features, targets, recipe).items()}
    scale = {"contrast": 1.0, "guidance": recipe.guidance, "relation": recipe.relation}
    return {"loss": sum((scale[name] * term for name, term in terms.items()), start=weight.new_zeros(())), **terms}


def views_used(recipe: Recipe) -> int | None:
    """How many views are trained, None for all: a slice's end."""
    return None if recipe.local_loss_weight > 0 or recipe.contrast == "instances" else 1
