import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references import contrast
from references_losses import offline, online, selective
from torch import Tensor
from torch.nn import functional

from resight.training.adaptation.loss import (
    association_scores,
    cluster_contrast,
    distillation,
    offline_association,
    online_association,
    relation,
    sample_weights,
    selective_contrast,
    weigh_views,
)
from resight.training.adaptation.objective import CentroidMemory


def unit(count: int, dim: int, seed: int) -> Tensor:
    return functional.normalize(
        torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


@pytest.mark.parametrize("batch, clusters", [(1, 2), (15, 16), (64, 7), (5, 1)])
def test_contrast_equals_the_definition_gradients_included(batch: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    features = functional.normalize(torch.randn(batch, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    centroids = functional.normalize(torch.randn(clusters, 9, generator=generator))
    labels = torch.randint(clusters, (batch,), generator=generator)
    memory = CentroidMemory(centroids, momentum=0.1)
    loss = cluster_contrast(memory.similarity(features), labels, temperature=0.05).mean()
    loss.backward()
    assert loss.item() == pytest.approx(
        contrast(features.detach().numpy(), centroids.numpy(), labels.numpy(), 0.05), rel=1e-5, abs=1e-6
    )
    step = 1e-4
    for row, column in ((0, 0), (batch - 1, 8)):
        moved = features.detach().numpy().copy()
        moved[row, column] += step
        up = contrast(moved, centroids.numpy(), labels.numpy(), 0.05)
        moved[row, column] -= 2 * step
        down = contrast(moved, centroids.numpy(), labels.numpy(), 0.05)
        assert features.grad is not None
        assert features.grad[row, column].item() == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-5)


def random_case(batch: int, proxies: int, clusters: int, cameras: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, memory, own proxies, and each proxy's cluster and camera, every camera present."""
    rng = np.random.default_rng(proxies)
    own = torch.from_numpy(rng.integers(0, proxies, batch))
    seen = np.concatenate([np.arange(cameras), rng.integers(0, cameras, proxies)])[:proxies]
    _, seen = np.unique(seen, return_inverse=True)
    return (
        unit(batch, 6, proxies),
        unit(proxies, 6, proxies + 1),
        own,
        torch.from_numpy(rng.integers(0, clusters, proxies)),
        torch.from_numpy(seen.astype(np.int64)),
    )


def slope(loss: NDArray[np.float64], up: NDArray[np.float64], step: float) -> float:
    return float((up - loss).sum() / step)


# (batch, proxies, clusters, cameras): among them fewer proxies than negatives, one camera, one cluster, one proxy
SIZES = [(7, 90, 20, 5), (1, 12, 5, 3), (5, 9, 4, 1), (3, 6, 1, 2), (2, 1, 1, 1), (16, 60, 60, 4)]


@pytest.mark.parametrize("batch, proxies, clusters, cameras", SIZES)
def test_offline_association_equals_the_definition_gradients_included(
    batch: int, proxies: int, clusters: int, cameras: int
) -> None:
    features, memory, own, of, _ = random_case(batch, proxies, clusters, cameras)
    features.requires_grad_()
    found = offline_association(features @ memory.T, of[own], of, temperature=0.07, negatives=50)
    found.sum().backward()

    def by_loops(x: Tensor) -> NDArray[np.float64]:
        rows = x.detach().numpy()
        return np.array([offline(rows[i], memory.numpy(), int(own[i]), of.numpy(), 0.07, 50) for i in range(batch)])

    expected = by_loops(features)
    assert found.detach().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    moved = features.detach().clone()
    moved[batch // 2, 3] += 1e-7
    assert features.grad is not None
    assert features.grad[batch // 2, 3].item() == pytest.approx(slope(expected, by_loops(moved), 1e-7), abs=1e-4)


@pytest.mark.parametrize("batch, proxies, clusters, cameras", SIZES)
def test_online_association_equals_the_definition_gradients_included(
    batch: int, proxies: int, clusters: int, cameras: int
) -> None:
    features, memory, own, _, seen = random_case(batch, proxies, clusters, cameras)
    features.requires_grad_()
    similarity = features @ memory.T
    scores = association_scores(similarity, memory[own] @ memory.T, balance=0.15)
    found = online_association(similarity, scores, seen, temperature=0.07, positives=3, negatives=50)
    found.sum().backward()

    def by_loops(x: Tensor) -> NDArray[np.float64]:
        rows, entries = x.detach().numpy(), memory.numpy()
        return np.array([online(rows[i], entries, int(own[i]), seen.numpy(), 0.07, 0.15, 3, 50) for i in range(batch)])

    expected = by_loops(features)
    assert found.detach().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    moved = features.detach().clone()
    moved[batch // 2, 3] += 1e-7
    assert features.grad is not None
    assert features.grad[batch // 2, 3].item() == pytest.approx(slope(expected, by_loops(moved), 1e-7), abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_excluded_proxies_are_never_positives_and_gradients_are_finite(seed: int) -> None:
    features, memory, own, _, seen = random_case(7, 12, 5, 4)
    features.requires_grad_()
    similarity = features @ memory.T
    scores = association_scores(similarity, memory[own] @ memory.T, balance=0.15)
    excluded = torch.from_numpy(np.random.default_rng(seed).random((7, 12)) < 0.1 + 0.1 * seed)
    excluded[torch.arange(7), own] = False
    found = online_association(similarity, scores, seen, temperature=0.07, positives=3, negatives=6, excluded=excluded)
    rows, entries = features.detach().numpy(), memory.numpy()
    excluded_sets = [frozenset(np.flatnonzero(row).tolist()) for row in excluded.numpy()]
    slow = [online(rows[i], entries, int(own[i]), seen.numpy(), 0.07, 0.15, 3, 6, excluded_sets[i]) for i in range(7)]
    assert found.detach().numpy() == pytest.approx(np.array(slow), rel=1e-6, abs=1e-9)
    found.sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()


def test_hand_examples_of_association_scores() -> None:
    """The own proxy scores 0.85 + 0.15 cos; one with <K_y, K_q> = 0.6 and cos 0.9 scores 0.645."""
    found = association_scores(torch.tensor([[0.4, 0.9]]), torch.tensor([[1.0, 0.6]]), balance=0.15)
    assert found[0].tolist() == pytest.approx([0.85 + 0.15 * 0.4, 0.645])


@pytest.mark.parametrize("neighbours, negatives", [(7, 500), (3, 2), (1, 1), (0, 9)])
def test_selective_contrast_equals_the_definition_gradients_included(neighbours: int, negatives: int) -> None:
    bank = unit(1 + neighbours + negatives, 5, negatives)
    x = (1.7 * unit(2, 5, 3)).requires_grad_()
    found = selective_contrast(x @ bank.T, positives=neighbours, temperature=0.1, self_share=0.5, neighbour_gain=1.75)
    found.sum().backward()
    candidates = list(range(len(bank)))

    def by_loops(rows: Tensor) -> NDArray[np.float64]:
        return np.array(
            [selective(row, bank.numpy(), candidates, neighbours, 0.5, 1.75) for row in rows.detach().numpy()]
        )

    expected = by_loops(x)
    assert found.detach().numpy() == pytest.approx(expected, rel=1e-9)
    moved = x.detach().clone()
    moved[1, 2] += 1e-7
    assert x.grad is not None
    assert x.grad[1, 2].item() == pytest.approx(slope(expected, by_loops(moved), 1e-7), abs=1e-4)


def test_selective_weights_of_the_released_values_sum_to_1_375() -> None:
    """With equally likely candidates each cross entropy is log J; the weights are 0.5 + 7 x 0.125."""
    found = selective_contrast(torch.zeros(1, 20), positives=7, temperature=0.1, self_share=0.5, neighbour_gain=1.75)
    assert found.item() == pytest.approx(1.375 * np.log(20))


def test_distillation_of_unit_vectors_with_cosine_0_8_is_0_4() -> None:
    assert distillation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])).tolist() == pytest.approx([0.4])


def test_distillation_is_twice_one_minus_cosine() -> None:
    f, t = unit(13, 7, 1), unit(13, 7, 2)
    assert distillation(f, t).numpy() == pytest.approx([2 - 2 * float(a @ b) for a, b in zip(f, t, strict=True)])


def test_relation_is_the_divergence_of_similarity_distributions() -> None:
    found, target = unit(5, 6, 1) @ unit(6, 6, 2).T, unit(5, 6, 3) @ unit(6, 6, 4).T
    expected = []
    for row, other in zip(found.numpy(), target.numpy(), strict=True):
        p, q = (np.exp(x / 0.05) / np.exp(x / 0.05).sum() for x in (other, row))
        expected.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    assert relation(found, target, temperature=0.05).numpy() == pytest.approx(expected)
    assert relation(found, found, temperature=0.05).numpy() == pytest.approx(0, abs=1e-12)


def test_sample_weights_give_the_mean_or_the_sum_of_camera_means() -> None:
    cameras = np.array([7, 7, 7, 2, 100, 100])
    assert sample_weights(cameras, "mean").tolist() == pytest.approx([1 / 6] * 6)
    assert sample_weights(cameras, "cameras").tolist() == pytest.approx([1 / 3] * 3 + [1.0, 0.5, 0.5])


def test_lp_view_weights_are_0_8_and_twice_0_2() -> None:
    terms = [torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0)]
    assert weigh_views(terms, 0.2).item() == pytest.approx(0.8 + 2 + 20)
    assert weigh_views(terms[:1], 0.0).item() == 1.0
