"""Script of the processes in test_distributed.py, run by torchrun: `processes.py SITE OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tiny import random_encoder

from resight.encoder.weights import InitialWeights
from resight.errors import TrainingError
from resight.training.adaptation.adapt import adapt
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.ghost_batch_norm import group_batch_norm
from resight.training.adaptation.recipe import Recipe, load_recipe
from resight.training.adaptation.run import RunLog, TrainingRun
from resight.training.features.distributed import (
    all_reduce_sum,
    average_batch_norm,
    gather_slices,
    local_slice,
    on_first_process,
    process_group,
    rank,
    shared_errors,
    sum_gradients,
    world_size,
)
from resight.training.store.crops import CropStore
from resight.training.store.datasets import open_site


def error_text(work: Callable[[], object]) -> str:
    """The error raised by `work`, as text."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fails_on_last(error: Exception) -> object:
    with shared_errors():
        if rank() == world_size() - 1:
            raise error
    return None


def refused() -> object:
    raise TrainingError("clusters collapsed")


def helpers() -> dict[str, object]:
    """Every helper with values that differ between processes, and a step in slices compared with the whole batch."""
    rows = torch.arange(7.0)
    found: dict[str, object] = {
        "rank": rank(),
        "world": world_size(),
        "share": [local_slice(7).start, local_slice(7).stop],
        "gathered": gather_slices(rows[local_slice(7)] * 10, 7).tolist(),
        "nothing": list(gather_slices(torch.zeros(0, 3), 0).shape),
        "sum": all_reduce_sum(torch.tensor([1.0, float(rank())])).tolist(),
        "from_first": on_first_process(lambda: {"rank": rank()}),
        "ours": error_text(lambda: fails_on_last(TrainingError("lower lr"))),
        "foreign": error_text(
            lambda: fails_on_last(TrainingError("out of memory") if not rank() else MemoryError("full"))
        ),
        "refused": error_text(lambda: on_first_process(refused)),
        "after": all_reduce_sum(torch.tensor(1.0)).item(),  # no process is left waiting
    }
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 3, 64, 32)).astype(np.float32))
    whole, part = random_encoder().train(), random_encoder().train()
    for encoder, seen in ((whole, images), (part, images[local_slice(16)])):
        group_batch_norm(encoder, 4)
        encoder.zero_grad()
        encoder(seen)[0][:, :3].sum().backward()  # the local heads get no gradient
    sum_gradients(part)
    average_batch_norm(part)
    for (name, one), two in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            assert (two.grad - one.grad).norm() < 1e-3 * one.grad.norm() + 1e-4, name
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(part.get_buffer(name), buffer, rtol=1e-4, atol=1e-6, msg=name)
    return found


def refusals(site: Path, out: Path) -> dict[str, object]:
    """Runs that fail do so in all processes, with the same error, and write no checkpoint."""
    whole, start = open_site(site).train, InitialWeights(random_encoder(), {"name": "random"})

    def run(recipe: Recipe, store: CropStore, name: str) -> str:
        with RunLog(out / f"{name}-log", console=Console(stderr=True, quiet=True), silent=rank() > 0) as log:
            return error_text(lambda: adapt(Adaptation(TrainingRun(store, recipe, 1, "cpu", log), start, out / name)))

    purify = replace(load_recipe("purify"), batch=32, samples_per_bn=8, epochs=1, iters=1, student=False)
    lost = replace(
        whole, paths=tuple("lost.jpg" if rank() and row > 200 else path for row, path in enumerate(whole.paths))
    )
    return {
        "uneven": run(replace(purify, samples_per_bn=32), whole, "uneven"),
        "collapsed": run(replace(purify, cluster=replace(purify.cluster, eps=0.001)), whole, "collapsed"),
        "unreadable": run(purify, lost, "unreadable"),
        "runaway": run(replace(purify, lr=0.99, optimizer="sgd", weight_decay=1e30, iters=3), whole, "runaway"),
    }


def main() -> None:
    site, out = Path(sys.argv[1]), Path(sys.argv[2])
    with process_group("cpu") as device:
        assert device == "cpu"
        found = helpers() | refusals(site, out)
        (out / f"found.{rank()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
