"""Selective contrast against loop implementations: selected neighbours, losses and updated banks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references_losses import selective
from torch import Tensor

from resight.errors import RecipeError
from resight.training.adaptation.recipe import Recipe, SelectiveSettings
from resight.training.adaptation.selective import MIXTURE, InstanceObjective

N, DIM, STRIPES = 40, 8, 4
RECIPE = Recipe(
    "mine",
    labels="none",
    contrast="instances",
    sampler="all",
    parts=STRIPES,
    local_share=0.5,
    temperature=0.1,
    momentum=0.5,
    selective=SelectiveSettings(neighbours=3, negatives=6),
)


def unit(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def views(count: int, seed: int) -> list[NDArray[np.float32]]:
    return [unit(count, DIM, seed), *(unit(count, DIM // STRIPES, seed + 1 + i) for i in range(STRIPES))]


def objective(recipe: Recipe = RECIPE, *, warming: bool = False, mixture: bool = True) -> InstanceObjective:
    made = InstanceObjective(
        views(N, 0),
        np.arange(N) % 3,
        recipe,
        warming=warming,
        rng=np.random.default_rng(5),
        banks={},
        device="cpu",
    )
    if mixture:
        made.banks[MIXTURE] = torch.from_numpy(unit(N, DIM, 90))
    return made


def batch(count: int) -> tuple[list[Tensor], Tensor]:
    rows = np.random.default_rng(count).choice(N, count, replace=False)
    return [torch.from_numpy(view) for view in views(count, 30)], torch.from_numpy(rows)


def order(features: list[Tensor], rows: Tensor, sample: int) -> list[int]:
    """All other crops from near to far: 0.5 global + 0.5 mean of stripes + 0.05 for the same camera."""
    banks, near = views(N, 0), []
    for j in range(N):
        gaps = [float(((features[v][sample].numpy() - banks[v][j]) ** 2).sum()) for v in range(1 + STRIPES)]
        distance = 0.5 * gaps[0] + 0.5 * float(np.mean(gaps[1:])) + 0.05 * (int(rows[sample]) % 3 == j % 3)
        near.append((distance, j))
    return [j for _, j in sorted(near) if j != int(rows[sample])]


@pytest.mark.parametrize("count", [1, 5])
def test_loss_takes_the_nearest_as_positives_and_the_next_as_negatives(count: int) -> None:
    features, rows = batch(count)
    made = objective()
    mixture = made.banks[MIXTURE].numpy()
    for sample, found in enumerate(made.losses(features, rows).tolist()):
        candidates = [int(rows[sample]), *order(features, rows, sample)[:9]]
        whole = features[0][sample].numpy()
        stripes = np.concatenate([view[sample].numpy() for view in features[1:]])
        terms = [selective(x, mixture, candidates, 3, 0.5, 1.75) for x in (whole, stripes)]
        assert found == pytest.approx(0.7 * terms[0] + 0.3 * terms[1], rel=1e-4)


def test_during_warm_up_only_the_own_entry_is_positive_and_never_negative() -> None:
    features, rows = batch(6)
    made = objective(warming=True)
    drawn = made._random(rows)
    assert drawn.shape == (6, 9) and not (drawn == rows[:, None]).any()
    assert all(len(set(row)) == 9 for row in drawn.tolist())
    made._rng = np.random.default_rng(5)  # the same draw again
    again = objective(warming=True)
    expected = []
    for sample in range(6):
        candidates = [int(rows[sample]), *drawn[sample].tolist()]
        whole = features[0][sample].numpy()
        stripes = np.concatenate([view[sample].numpy() for view in features[1:]])
        terms = [selective(x, again.banks[MIXTURE].numpy(), candidates, 0, 0.5, 1.75) for x in (whole, stripes)]
        expected.append(0.7 * terms[0] + 0.3 * terms[1])
    assert again.losses(features, rows).tolist() == pytest.approx(expected, rel=1e-4)


def test_update_writes_every_positive_last_first_and_the_ranking_banks_of_the_batch() -> None:
    features, rows = batch(4)
    made = objective()
    mixture = made.banks[MIXTURE].numpy().astype(np.float64).copy()
    made.update(features, rows)
    entries = [[int(rows[s]), *order(features, rows, s)[:3]] for s in range(4)]
    stripes = np.concatenate([view.numpy() for view in features[1:]], 1)
    for block in (stripes, features[0].numpy()):
        for term in (3, 2, 1, 0):
            for sample in range(4):
                mixed = (mixture[entries[sample][term]] + block[sample]) / 2
                mixture[entries[sample][term]] = mixed / np.linalg.norm(mixed)
    assert made.banks[MIXTURE].numpy() == pytest.approx(mixture, abs=1e-5)
    for v, view in enumerate(views(N, 0)):
        expected = view.copy()
        for sample, row in enumerate(rows.tolist()):
            mixed = (expected[row] + features[v][sample].numpy()) / 2
            expected[row] = mixed / np.linalg.norm(mixed)
        assert made.banks[f"view{v}"].numpy() == pytest.approx(expected, abs=1e-5)


def test_few_crops_limit_the_candidates_and_banks_are_carried_over() -> None:
    greedy = dataclasses.replace(RECIPE, selective=SelectiveSettings(neighbours=7, negatives=500))
    features, rows = batch(3)
    made = objective(greedy)
    assert torch.isfinite(made.losses(features, rows)).all()
    made.update(features, rows)
    after = InstanceObjective(
        views(N, 70),
        np.zeros(N, np.int64),
        greedy,
        warming=True,
        rng=np.random.default_rng(0),
        banks=made.banks,
        device="cpu",
    )
    assert all(torch.equal(after.banks[name], bank) for name, bank in made.banks.items())
    assert torch.isfinite(after.losses(features, rows)).all()


def test_stripes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(RecipeError, match="8 values in total, found \\[2, 2, 2\\]"):
        InstanceObjective(
            views(N, 0)[:4],
            np.zeros(N, np.int64),
            RECIPE,
            warming=False,
            rng=np.random.default_rng(0),
            banks={},
            device="cpu",
        )


@pytest.mark.parametrize("start", ["zeros", "features"])
def test_the_mixture_is_initialised_with_zeros_or_a_copy_of_the_features(start: str) -> None:
    recipe = dataclasses.replace(RECIPE, selective=SelectiveSettings(mixture=start))  # type: ignore[arg-type]
    made = objective(recipe, mixture=False)
    expected = views(N, 0)[0] if start == "features" else np.zeros((N, DIM))
    assert made.banks[MIXTURE].numpy() == pytest.approx(expected)
    made.banks[MIXTURE].fill_(7.0)
    assert made.banks["view0"].numpy() == pytest.approx(views(N, 0)[0])
