"""Grouped ("ghost") batch norm: statistics over a fixed number of samples, independent of the number of devices.

The papers trained on several GPUs that each normalised their own shard, 64 crops for LP and Cluster Contrast; the
number of GPUs was a hidden hyperparameter worth 20 mAP (cluster-contrast issue 16: 82.6 on four, 59.1 on one).
Here it is a setting of the recipe. Groups are contiguous, so that a group holds whole clusters as the shards did
(Hoffer et al., "Train longer, generalize better", NeurIPS 2017, algorithm 1).

Letters: B samples, C channels, G groups, M parts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_GROUP = 2  # samples per group: in a group of one, a neck has no variance


def group_count(batch: int, samples_per_bn: int) -> int:
    """G for a batch of B: groups of at most `samples_per_bn`, as equal as possible, none with a single sample.

    With groups of 64, 65 samples become 33 and 32; with groups of 2, 3 samples become one group. 0 means one group.
    """
    if samples_per_bn == 0:
        return 1
    return max(1, min(-(-batch // samples_per_bn), batch // MIN_GROUP))


def group_batch_norm(network: nn.Module, samples_per_bn: int) -> None:
    """Replace every batch norm of a network by one with training statistics per group, in place.

    Parameters and buffers remain the same objects under the same names, so optimizers, checkpoints and eval mode are
    not affected. Calling it again changes the group size.

    Args:
        network: any module, such as an `Encoder`.
        samples_per_bn: samples per group, in the order of the batch; 0 for the whole batch.

    Raises:
        ValueError: a group size of 1 or a negative one.
    """
    if samples_per_bn != 0 and samples_per_bn < MIN_GROUP:
        raise ValueError(f"samples_per_bn must be 0 (the whole batch) or at least {MIN_GROUP}, found {samples_per_bn}")
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
    """Context in which the network gets part `index` (from 0) of a batch that is split into `count` equal parts.

    The running statistics are updated as if the batch had been processed as a whole.
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
    """Base of the 1d and 2d variants."""

    samples_per_bn = 0
    part = (0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C) or (B, C, h, w) -> the same shape, each group normalised by its own mean and variance.

        Running statistics are updated with the mean of the groups' statistics. That is linear, so the mean of the
        running statistics of several processes equals that of one process with all groups.
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
                momentum=_momentum(momentum, index * groups + step, count * groups),
                eps=self.eps,
            )
            for step, chunk in enumerate(torch.split(input, _sizes(len(input), groups)))
        ]
        return normalised[0] if groups == 1 else torch.cat(normalised)


class GroupBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """Over (B, C)."""


class GroupBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """Over (B, C, h, w)."""


def _sizes(batch: int, groups: int) -> list[int]:
    """Group sizes, as equal as possible, the larger ones first; `split` copies their gradients only once."""
    return [batch // groups + (step < batch % groups) for step in range(groups)]


def _momentum(momentum: float, step: int, total: int) -> float:
    """Momentum of update t of T such that all T together equal one update with momentum p on the mean of their inputs.

    r <- (1 - a_t) r + a_t s_t with a_t = (p / T) / (1 - p (T - 1 - t) / T) results in (1 - p) r + (p / T) sum_t s_t:
    the later updates scale s_t by 1 - p (T - 1 - t) / T.
    """
    share = momentum / total
    return share / (1 - share * (total - 1 - step))


def _grouped_norm(kind: type[_Grouped], norm: nn.BatchNorm1d | nn.BatchNorm2d, samples_per_bn: int) -> _Grouped:
    """A grouped norm that shares the parameters and buffers of a plain one."""
    grouped = kind(
        norm.num_features, norm.eps, norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats
    )
    grouped.weight, grouped.bias = norm.weight, norm.bias
    grouped.running_mean, grouped.running_var = norm.running_mean, norm.running_var
    grouped.num_batches_tracked = norm.num_batches_tracked
    grouped.samples_per_bn = samples_per_bn
    return grouped.train(norm.training)
