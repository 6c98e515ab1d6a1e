"""Grouped ("ghost") batch norm: statistics over a fixed number of samples, whatever machine trains.

The papers trained on several GPUs whose shards were normalised apart, 64 crops each for LP and Cluster Contrast;
the number of GPUs was a hidden setting worth 20 mAP (cluster-contrast issue 16: 82.6 on four, 59.1 on one).
Here it is a value of the recipe. Groups are contiguous, so that a shard holds whole clusters as theirs did
(Hoffer et al., "Train longer, generalize better", NeurIPS 2017, algorithm 1).

Letters: B samples, C channels, G groups, M parts a batch is handed over in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_GROUP = 2  # samples a group: of one, a neck sees no variance at all


def group_count(batch: int, samples_per_bn: int) -> int:
    """G for a batch of B: groups of at most `samples_per_bn`, as equal as possible, none of a single sample.

    65 samples in groups of 64 are 33 and 32; 3 in groups of 2 are one group of 3. With 0 all B are one group.
    """
    if samples_per_bn == 0:
        return 1
    return max(1, min(-(-batch // samples_per_bn), batch // MIN_GROUP))


def group_batch_norm(network: nn.Module, samples_per_bn: int) -> None:
    """Let every batch norm of a network take its training statistics over groups, in place.

    Parameters and buffers are the same objects under the same names as before: optimizers, checkpoints and eval
    mode do not notice. Calling it again changes the size.

    Args:
        network: any module, an `Encoder` for one.
        samples_per_bn: samples a group, in the order of the batch; 0 takes the whole batch.

    Raises:
        ValueError: a group of one sample, or of a negative number.
    """
    if samples_per_bn != 0 and samples_per_bn < MIN_GROUP:
        raise ValueError(f"samples_per_bn must be 0 (the whole batch) or from {MIN_GROUP}, found {samples_per_bn}")
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GroupBatchNorm1d | GroupBatchNorm2d):
                child.samples_per_bn = samples_per_bn
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _grouped_norm(GroupBatchNorm2d, child, samples_per_bn))
            elif isinstance(child, nn.BatchNorm1d):
                setattr(parent, name, _grouped_norm(GroupBatchNorm1d, child, samples_per_bn))


@contextmanager
def batch_part(network: nn.Module, index: int, count: int) -> Iterator[None]:
    """Within: the network sees part `index` (from 0) of a batch handed over in `count` equal parts.

    Running statistics then move once a batch, as if it had come whole.
    """
    norms = [norm for norm in network.modules() if isinstance(norm, _Grouped)]
    for norm in norms:
        norm.part = (index, count)
    try:
        yield
    finally:
        for norm in norms:
            norm.part = (0, 1)


class _Grouped(nn.modules.batchnorm._BatchNorm):
    """What both kinds share."""

    samples_per_bn = 0
    part = (0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C) or (B, C, h, w) -> the same shape, each group normalised by its own mean and variance.

        Running statistics move towards the mean over groups of what one group measures. That is linear, so the
        mean of the running statistics of several processes is that of one process that saw all groups.
        """
        groups = group_count(len(input), self.samples_per_bn)
        if not self.training or (groups == 1 and self.part == (0, 1)):
            return super().forward(input)
        index, count = self.part
        if index == 0 and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
        normalised = [
            functional.batch_norm(
                chunk,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=_momentum(momentum, index * groups + turn, count * groups),
                eps=self.eps,
            )
            for turn, chunk in enumerate(torch.split(input, _sizes(len(input), groups)))
        ]
        return normalised[0] if groups == 1 else torch.cat(normalised)


class GroupBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """Over (B, C)."""


class GroupBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """Over (B, C, h, w)."""


def _sizes(batch: int, groups: int) -> list[int]:
    """Sizes as equal as possible, the larger ones first; `split` takes their gradients in one copy."""
    return [batch // groups + (turn < batch % groups) for turn in range(groups)]


def _momentum(whole: float, turn: int, turns: int) -> float:
    """Momentum of one of several updates in a row that together move by `whole` towards the mean of what they saw.

    r <- (1 - a_t) r + a_t s_t with a_t = (p / T) / (1 - p (T - 1 - t) / T) leaves (1 - p) of r and p / T of each s:
    the share that later updates keep of s_t is 1 - p (T - 1 - t) / T.
    """
    share = whole / turns
    return share / (1 - share * (turns - 1 - turn))


def _grouped_norm(kind: type[_Grouped], norm: nn.BatchNorm1d | nn.BatchNorm2d, samples_per_bn: int) -> _Grouped:
    """A grouped norm around the very parameters and buffers of a plain one."""
    grouped = kind(
        norm.num_features, norm.eps, norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats
    )
    grouped.weight, grouped.bias = norm.weight, norm.bias
    grouped.running_mean, grouped.running_var = norm.running_mean, norm.running_var
    grouped.num_batches_tracked = norm.num_batches_tracked
    grouped.samples_per_bn = samples_per_bn
    return grouped.train(norm.training)
