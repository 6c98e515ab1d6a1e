"""The batches of one epoch: forward, losses, backward, step, memory update.

A batch may be computed in parts, one after the other (`accumulate`) and spread over processes (`distributed`): its
loss is a sum over samples, its gradient one over parts, its batch norms see groups (`ghost`), and the memories
follow all its features in order. So parts and processes change nothing but memory and time.

Letters: B batch, D feature size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resight.errors import TrainingError
from resight.image import Pixels
from resight.model import Encoder
from resight.training.augment import erase
from resight.training.distill import Guide
from resight.training.distributed import add_up, average_statistics, gather, share, sum_gradients, together
from resight.training.features import autocast, to_input
from resight.training.ghost import part_of_batch
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
            with together():
                rows, pixels = next(batches)
                mine = share(len(rows))
                images = to_input(encoder, pixels, run.device)
                erase(images, recipe.augment, erasing, batch=len(rows), start=mine.start)
                trainee.optimizer.zero_grad(set_to_none=True)
                features, terms = _backward(run, trainee, objective, images, rows, scaler)
            figures = dict(zip(terms, add_up(torch.stack(list(terms.values()))).tolist(), strict=True))
            if not np.isfinite(figures["loss"]):
                raise TrainingError(
                    f"the loss of {what} is {figures['loss']}: lower lr in the recipe, or set precision to fp32; the "
                    "last epoch's checkpoint stands"
                )
            sum_gradients(encoder)
            scaler.step(trainee.optimizer)
            scaler.update()
            whole = [gather(view, len(rows)) for view in features]
            objective.update(whole, torch.from_numpy(rows).to(run.device))
            for name, figure in figures.items():
                sums[name] += figure / total
            advance(1)
    average_statistics(encoder)
    require_finite(encoder, f"weights after {what}")
    return dict(sums)


def _backward(
    run: Run, trainee: Trainee, objective: Objective, images: Tensor, rows: Ints, scaler: torch.amp.GradScaler
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features and loss terms of this process's share of a batch, computed part by part, and their gradients."""
    recipe, count = run.recipe, run.recipe.accumulate
    weights = torch.from_numpy(shares(run.store.cameras[rows], recipe.aggregate)[share(len(rows))]).to(run.device)
    mine = torch.from_numpy(rows[share(len(rows))]).to(run.device)
    seen: list[tuple[Tensor, ...]] = []
    totals: dict[str, Tensor] = {}
    parts = zip(images.chunk(count), mine.chunk(count), weights.chunk(count), strict=True)
    for index, (pixels, own, weight) in enumerate(parts):
        with ExitStack() as within:
            for network in (trainee.encoder, *([trainee.guide.encoder] if trainee.guide else [])):
                within.enter_context(part_of_batch(network, index, count))
            with autocast(run.device, recipe.precision):
                features = trainee.encoder(pixels)[: views_used(recipe)]
                targets = trainee.guide.look(pixels) if trainee.guide else ()
        terms = {"contrast": weight * objective.losses(features, own)}
        if trainee.guide:
            guidance = trainee.guide.losses(features, targets, recipe)
            terms |= {name: term / len(rows) for name, term in guidance.items()}
        summed = _weighed({name: term.sum() for name, term in terms.items()}, recipe)
        scaler.scale(summed["loss"]).backward()  # type: ignore[no-untyped-call]
        seen.append(tuple(view.detach() for view in features))
        totals = {name: totals.get(name, 0) + term.detach() for name, term in summed.items()}
    return [torch.cat(views) for views in zip(*seen, strict=True)], totals


def _weighed(terms: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The terms of a loss and, as "loss", their weighed sum."""
    scale = {"contrast": 1.0, "guidance": recipe.guidance, "relation": recipe.relation}
    loss = sum((scale[name] * term for name, term in terms.items()), start=terms["contrast"].new_zeros(()))
    return {"loss": loss, **terms}


def views_used(recipe: Recipe) -> int | None:
    """How many views are trained, None for all: a slice's end."""
    return None if recipe.local_loss_weight > 0 or recipe.contrast == "instances" else 1
