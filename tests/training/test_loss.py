import numpy as np
import pytest
import torch
from references import contrast
from torch.nn import functional

from resight.training.loss import cluster_contrast, distillation, weigh_views
from resight.training.memory import ClusterMemory


@pytest.mark.parametrize("batch, clusters", [(1, 2), (15, 16), (64, 7), (5, 1)])
def test_contrast_equals_the_definition_gradients_included(batch: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    features = functional.normalize(torch.randn(batch, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    centroids = functional.normalize(torch.randn(clusters, 9, generator=generator))
    labels = torch.randint(clusters, (batch,), generator=generator)
    loss = cluster_contrast(features, ClusterMemory(centroids, momentum=0.1), labels, temperature=0.05)
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


def test_distillation_of_unit_vectors_with_cosine_0_8_is_0_4() -> None:
    assert distillation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])).item() == pytest.approx(0.4)


def test_distillation_is_twice_one_minus_cosine_on_average() -> None:
    rng = torch.Generator().manual_seed(1)
    f, t = (functional.normalize(torch.randn(13, 7, generator=rng)) for _ in range(2))
    assert distillation(f, t).item() == pytest.approx(
        np.mean([2 - 2 * float(a @ b) for a, b in zip(f, t, strict=True)])
    )


def test_lp_weighs_its_views_with_0_8_and_twice_0_2() -> None:
    terms = [torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0)]
    assert weigh_views(terms, 0.2).item() == pytest.approx(0.8 + 2 + 20)
    assert weigh_views(terms[:1], 0.0).item() == 1.0
