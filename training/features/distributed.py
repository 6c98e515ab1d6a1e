"""Training in several processes: `torchrun --nproc-per-node N -m resight adapt ...`.

Every process draws the same batches and computes its own slice of each; gradients are summed, so that the step equals
that of the whole batch in one process and all processes hold the same weights. In a single process each function
is the identity. Gradients are reduced in one message after `backward` instead of by DistributedDataParallel: losses
are sums over samples rather than means of means, a batch computed in parts is reduced once, and heads without a loss
in a recipe need no search for unused parameters.

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
TIMEOUT = timedelta(hours=2)  # the others wait while the first clusters; torchrun ends them if it dies


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Context in which this process belongs to the group started by torchrun; without torchrun it runs alone.

    Args:
        device: "cpu", or "cuda", which becomes the GPU with this process's local rank.

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
        logging.getLogger("resight").setLevel(logging.ERROR)  # only the first process logs
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local_slice(count: int) -> slice:
    """This process's contiguous slice of `count` items: as equal as possible, the larger slices first."""
    ends = np.cumsum([0, *_slice_sizes(count)])
    return slice(int(ends[rank()]), int(ends[rank() + 1]))


def _slice_sizes(count: int) -> list[int]:
    return [count // world_size() + (number < count % world_size()) for number in range(world_size())]


def gather_slices(part: Tensor, count: int) -> Tensor:
    """Concatenate the results of all processes for their `local_slice`, in order.

    Args:
        part: (rows of this slice, ...), without gradient.
        count: N, rows of all slices.

    Returns:
        (N, ...), the same in every process.
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
    """Copy the weights and statistics of the first process to all others."""
    if world_size() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_batch_norm(network: nn.Module) -> None:
    """Replace the running statistics of batch norms by their mean over processes."""
    if world_size() == 1:
        return
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for statistics in (norm.running_mean, norm.running_var):
                if statistics is not None:
                    all_reduce_sum(statistics).div_(world_size())


def on_first_process(compute: Callable[[], T]) -> T:
    """Compute in the first process and return the result, or raise the error, in all."""
    with shared_errors():
        result = [compute() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


@contextmanager
def shared_errors() -> Iterator[None]:
    """Context for work without communication: an error in one process is raised in all.

    So no process waits for one that has failed.

    Raises:
        ReIDError: the error of the first process that failed; the other processes raise another kind of error as
            `TrainingError`.
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
    errors: list[ReIDError | None] = [None] * world_size()
    dist.all_gather_object(errors, own if isinstance(own, ReIDError) else _portable_error(own))
    first, shared = next((number, error) for number, error in enumerate(errors) if error is not None)
    raise own if own is not None and first == rank() else shared


def _portable_error(error: Exception | None) -> TrainingError | None:
    """An error of another library as one that every process can unpickle."""
    if error is None:
        return None
    return TrainingError(f"process {rank()} of {world_size()} failed: {type(error).__name__}: {error}")
