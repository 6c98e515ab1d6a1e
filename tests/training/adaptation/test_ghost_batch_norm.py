"""Grouped batch norm against loop implementations, and unchanged behaviour outside training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import random_encoder
from torch import Tensor, nn

from resight.training.adaptation.ghost_batch_norm import batch_part, group_batch_norm, group_count

Doubles = NDArray[np.float64]


def sizes(batch: int, samples: int) -> list[int]:
    """Sizes of the groups a batch is split into."""
    count = group_count(batch, samples)
    return [len(part) for part in np.array_split(np.arange(batch), count)]


@pytest.mark.parametrize(
    "batch, samples, expected",
    [
        (64, 64, [64]),
        (256, 64, [64, 64, 64, 64]),
        (65, 64, [33, 32]),
        (48, 64, [48]),
        (3, 2, [3]),
        (7, 2, [3, 2, 2]),
        (7, 3, [3, 2, 2]),
        (9, 0, [9]),
        (1, 8, [1]),
    ],
)
def test_groups_are_as_equal_as_possible_and_never_of_one(batch: int, samples: int, expected: list[int]) -> None:
    assert sizes(batch, samples) == expected


def by_loops(x: Doubles, weight: Doubles, bias: Doubles, groups: list[int], eps: float) -> tuple[Doubles, ...]:
    """Normalised rows (B, C, positions), and each group's mean and unbiased variance (G, C)."""
    out, means, variances, start = np.empty_like(x), [], [], 0
    for size in groups:
        rows = slice(start, start + size)
        start += size
        means.append([])
        variances.append([])
        for channel in range(x.shape[1]):
            values = x[rows, channel]
            mean, variance = values.mean(), values.var()
            out[rows, channel] = (values - mean) / np.sqrt(variance + eps) * weight[channel] + bias[channel]
            means[-1].append(mean)
            variances[-1].append(variance * values.size / (values.size - 1))
    return out, np.array(means), np.array(variances)


def by_loops_backward(
    x: Doubles, weight: Doubles, upstream: Doubles, groups: list[int], eps: float
) -> tuple[Doubles, Doubles, Doubles]:
    """Gradients of input, weight and bias (Ioffe and Szegedy, ICML 2015, section 3), channel by channel."""
    of_x, of_weight, of_bias, start = np.empty_like(x), np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0
    for size in groups:
        rows = slice(start, start + size)
        start += size
        for channel in range(x.shape[1]):
            values, arriving = x[rows, channel], upstream[rows, channel]
            deviation = np.sqrt(values.var() + eps)
            unit = (values - values.mean()) / deviation
            of_weight[channel] += (arriving * unit).sum()
            of_bias[channel] += arriving.sum()
            scaled = arriving * weight[channel]
            of_x[rows, channel] = (scaled - scaled.mean() - unit * (scaled * unit).mean()) / deviation
    return of_x, of_weight, of_bias


def norm_of(kind: type[nn.Module], channels: int, samples: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(kind(channels)).double()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            getattr(network[0], name).normal_()
        network[0].running_var.uniform_(0.5, 2)
    group_batch_norm(network, samples)
    return network


@pytest.mark.parametrize("batch, samples", [(7, 3), (8, 4), (9, 2), (6, 6), (5, 0), (13, 4)])
@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (3, 4, 5))])
def test_outputs_gradients_and_running_statistics_are_those_of_loops(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int, samples: int
) -> None:
    network = norm_of(kind, shape[0], samples)
    norm = network[0]
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(batch, *shape, dtype=torch.float64)
    out = network(x)
    out.backward(upstream)

    def flat(tensor: Tensor) -> Doubles:
        return tensor.detach().numpy().reshape(batch, shape[0], -1)

    weight, bias, groups = norm.weight.detach().numpy(), norm.bias.detach().numpy(), sizes(batch, samples)
    expected, means, variances = by_loops(flat(x), weight, bias, groups, norm.eps)
    gradients = by_loops_backward(flat(x), weight, flat(upstream), groups, norm.eps)
    np.testing.assert_allclose(flat(out), expected, rtol=1e-9, atol=1e-9)
    for found, expected_gradient in zip((flat(x.grad), norm.weight.grad, norm.bias.grad), gradients, strict=True):
        np.testing.assert_allclose(found, expected_gradient, rtol=1e-8, atol=1e-8)
    for name, group_values in (("running_mean", means), ("running_var", variances)):
        np.testing.assert_allclose(
            getattr(norm, name), 0.9 * before[name].numpy() + 0.1 * group_values.mean(0), rtol=1e-9
        )
    assert norm.num_batches_tracked == 1


def test_a_batch_no_larger_than_a_group_takes_the_plain_path() -> None:
    grouped, plain = random_encoder().train(), random_encoder().train()
    group_batch_norm(grouped, 8)
    images = torch.randn(8, 3, 64, 32)
    assert all(torch.equal(one, other) for one, other in zip(grouped(images), plain(images), strict=True))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, grouped.state_dict()[name]), name


def test_groups_equal_separate_batches() -> None:
    grouped, separate = random_encoder().train(), random_encoder().train()
    group_batch_norm(grouped, 4)
    images = torch.randn(12, 3, 64, 32)
    whole = grouped(images)
    for start in (0, 4, 8):
        for view, part in zip(whole, separate(images[start : start + 4]), strict=True):
            torch.testing.assert_close(view[start : start + 4], part, rtol=1e-4, atol=1e-5)


def test_parameters_and_eval_mode_are_unchanged() -> None:
    encoder, plain = random_encoder(), random_encoder()
    parameters = dict(encoder.named_parameters())
    buffers = dict(encoder.named_buffers())
    group_batch_norm(encoder, 4)
    assert dict(encoder.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in encoder.named_parameters())
    assert all(buffer is buffers[name] for name, buffer in encoder.named_buffers())
    assert list(encoder.state_dict()) == list(plain.state_dict())
    assert not any(module.training for module in encoder.modules())
    assert not any(head.neck.bias.requires_grad for head in encoder.heads.values())
    images = torch.randn(6, 3, 64, 32)
    assert all(torch.equal(one, other) for one, other in zip(encoder(images), plain(images), strict=True))
    group_batch_norm(encoder, 2)  # another size, the same modules and parameters
    assert all(parameter is parameters[name] for name, parameter in encoder.named_parameters())
    assert {m.samples_per_bn for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {2}
    assert copy.deepcopy(encoder).heads["global"].neck.samples_per_bn == 2


def test_the_mean_of_two_processes_running_statistics_is_that_of_one() -> None:
    images = torch.randn(16, 3, 64, 32)
    one = random_encoder().train()
    two = [random_encoder().train() for _ in range(2)]
    for encoder in (one, *two):
        group_batch_norm(encoder, 4)
    one(images)
    for encoder, half in zip(two, images.split(8), strict=True):
        encoder(half)
    for name, buffer in one.named_buffers():
        if "running" in name:
            mean = (two[0].get_buffer(name) + two[1].get_buffer(name)) / 2
            torch.testing.assert_close(mean, buffer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_equal_for_a_batch_in_parts(momentum: float | None) -> None:
    images = torch.randn(2, 12, 3, 64, 32)
    whole, split = random_encoder().train(), random_encoder().train()
    for encoder in (whole, split):
        group_batch_norm(encoder, 2)
        for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)):
            norm.momentum = momentum
    for batch in images:
        features = whole(batch)[0]
        for index, part in enumerate(batch.split(4)):
            with batch_part(split, index, 3):
                found = split(part)[0]
            torch.testing.assert_close(found, features[4 * index : 4 * index + 4], rtol=1e-4, atol=1e-5)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(split.get_buffer(name), buffer, rtol=1e-4, atol=1e-6)


def test_memory_layout_and_precision_are_preserved() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    group_batch_norm(network, 2)
    images = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(images)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    out.float().square().sum().backward()
    assert network[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("samples", [1, -1])
def test_invalid_group_sizes_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=r"0 \(the whole batch\) or at least 2"):
        group_batch_norm(random_encoder(), samples)
