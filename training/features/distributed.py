"""Several processes that train as one: `torchrun --nproc-per-node N -m resight adapt ...`.

Every process draws the same batches and computes its own slice of each; gradients are summed, so that the step is
that of the whole batch in one process, and everything learned from it is the same everywhere. Nothing here asks
how many there are: alone, each function is the identity. Gradients are reduced in one piece after `backward`
instead of by DistributedDataParallel: losses are sums over samples and not means of means, a batch handed over in
parts is reduced once, and heads that a recipe leaves without a loss need no search for unused parameters.

Letters: B batch, W processes ("world"), N rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resight.errors import ReIDError, TrainingError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # how long others wait while the first clusters; torchrun ends them when it dies


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Within: this process is one of those torchrun started, or alone where it was not.

    Args:
        device: "cpu", or "cuda", which becomes the GPU of this process's number on its machine.

    Yields:
        The device to compute on.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT)
    if rank():
        logging.getLogger("resight").setLevel(logging.ERROR)  # the first process tells for all
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local_slice(count: int) -> slice:
    """This process's contiguous part of `count` things: as equal as can be, the larger parts first."""
    ends = np.cumsum([0, *_slice_sizes(count)])
    return slice(int(ends[rank()]), int(ends[rank() + 1]))


def _slice_sizes(count: int) -> list[int]:
    return [count // world_size() + (number < count % world_size()) for number in range(world_size())]


def gather_slices(part: Tensor, count: int) -> Tensor:
    """Put together what each process computed of its `local_slice`, in order.

    Args:
        part: (rows of this share, ...), without gradient.
        count: N, rows of all shares.

    Returns:
        (N, ...), the same everywhere.
    """
    if world_size() == 1:
        return part
    sizes = _slice_sizes(count)
    padded = part.new_zeros((sizes[0], *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([found[:size] for found, size in zip(parts, sizes, strict=True)])


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(network: nn.Module) -> None:
    """Replace every gradient by its sum over processes, in one message."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def broadcast_weights(network: nn.Module) -> None:
    """Give every process the first one's weights and statistics, to the last bit."""
    if world_size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_batch_norm(network: nn.Module) -> None:
    """Replace running statistics of batch norms by their mean over processes: those of one that saw all groups."""
    if world_size() == 1:
        return
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for statistics in (norm.running_mean, norm.running_var):
                if statistics is not None:
                    all_reduce_sum(statistics).div_(world_size())


def on_first_process(compute: Callable[[], T]) -> T:
    """Let the first process compute and all have the result, or the error."""
    with shared_errors():
        answer = [compute() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]


@contextmanager
def shared_errors() -> Iterator[None]:
    """Within: work that each process does without the others. An error of one becomes the error of all.

    Nobody is left waiting for one that has stopped: all leave at the same place.

    Raises:
        ReIDError: of the first process that failed, everywhere; what is no `ReIDError` is told as `TrainingError` by
            the others.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        own = error
    if world_size() == 1 or not all_reduce_sum(torch.tensor(float(own is not None))):
        return
    told: list[ReIDError | None] = [None] * world_size()
    dist.all_gather_object(told, own if isinstance(own, ReIDError) else _portable_error(own))
    first, shared = next((number, error) for number, error in enumerate(told) if error is not None)
    raise own if own is not None and first == rank() else shared


def _portable_error(error: Exception | None) -> TrainingError | None:
    """An error of another library, for processes that do not have it."""
    if error is None:
        return None
    return TrainingError(f"process {rank()} of {world_size()} failed: {type(error).__name__}: {error}")
