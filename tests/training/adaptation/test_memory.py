import numpy as np
import pytest
import torch
from references import sequential_update
from torch.nn import functional

from resight.training.adaptation.objective import CentroidMemory, update_memory


def test_hand_example_of_two_samples_in_order() -> None:
    memory = CentroidMemory(torch.tensor([[1.0, 0.0]]), momentum=0.1)
    memory.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert memory.centroids[0].tolist() == pytest.approx([0.1104, 0.9939], abs=1e-4)
    memory.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert memory.centroids[0].tolist() == pytest.approx([0.9941, 0.1084], abs=1e-4)


@pytest.mark.parametrize(
    "batch, clusters, momentum", [(1, 1, 0.1), (15, 4, 0.1), (64, 8, 0.2), (33, 33, 0.5), (7, 1, 0.0)]
)
def test_update_equals_sequential_updates(batch: int, clusters: int, momentum: float) -> None:
    rng = np.random.default_rng(batch)
    centroids = functional.normalize(torch.from_numpy(rng.normal(size=(clusters, 6))).float())
    features = functional.normalize(torch.from_numpy(rng.normal(size=(batch, 6))).float())
    labels = torch.from_numpy(rng.integers(0, clusters, batch))
    memory = CentroidMemory(centroids.clone(), momentum=momentum)
    memory.update(features, labels)
    expected = sequential_update(centroids.numpy(), features.numpy(), labels.numpy(), momentum)
    assert np.abs(memory.centroids.numpy() - expected).max() < 1e-5


def test_frozen_memory_is_unchanged_and_half_precision_features_keep_it_in_float32() -> None:
    centroids = functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    frozen = CentroidMemory(centroids.clone(), momentum=1.0)
    frozen.update(torch.eye(8)[:2], torch.tensor([0, 1]))
    assert torch.equal(frozen.centroids, centroids)
    moving = CentroidMemory(centroids.clone(), momentum=0.1)
    moving.update(torch.eye(8, dtype=torch.bfloat16)[:2], torch.tensor([0, 1]))
    assert moving.centroids.dtype == torch.float32
    assert moving.centroids.norm(dim=1) == pytest.approx(torch.ones(3).numpy())


def test_gradients_reach_the_features_and_not_the_memory() -> None:
    memory = CentroidMemory(functional.normalize(torch.randn(4, 5)), momentum=0.1)
    features = functional.normalize(torch.randn(2, 5)).requires_grad_()
    memory.similarity(features).sum().backward()
    assert features.grad is not None and not memory.centroids.requires_grad


def test_blend_with_one_half_is_the_mean_with_each_new_value() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    update_memory(bank, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]), momentum=0.5)
    assert bank[0].tolist() == pytest.approx([0.3827, 0.9239], abs=1e-4)  # halfway to 90 degrees, twice
    assert bank[1].tolist() == [0.0, 1.0]
