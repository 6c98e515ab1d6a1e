"""How much of a bare training step's speed the real loop keeps.

The real loop reads crops, augments them, computes the losses of the method and updates its memories; a bare step
is the forward and backward passes and the optimizer alone, on the same batches, read beforehand. A student's bare
step has its teacher's forward pass, without which there is no student. Both run in turns in one process, with the
same precision and threads. Goal: 0.90.

    python benchmarks/bench_training.py --iters 20 --repeats 2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from resight.encoder.model import Encoder
from resight.encoder.weights import load_weights
from resight.training.adaptation.adapt import train_epoch
from resight.training.adaptation.batches import erase, shift_and_flip
from resight.training.adaptation.distill import Teacher
from resight.training.adaptation.epoch import draw_batches
from resight.training.adaptation.ghost_batch_norm import group_batch_norm
from resight.training.adaptation.recipe import load_recipe, views_used
from resight.training.adaptation.run import RunLog, Stage, StageState, TrainingRun, make_optimizer
from resight.training.features.extract import autocast, read_batches, to_input
from resight.training.synthetic.site import SiteSettings, render_site

SITE = SiteSettings(train_persons=32, test_persons=2, strangers=0)  # crops of 128 x 64, as Market-1501's


def same_batches(run: TrainingRun, stage: Stage, encoder: Encoder) -> list[Tensor]:
    """The inputs of `train_epoch`'s epoch 0, drawn with the same chance and ready in memory."""
    recipe, store = run.recipe, run.store
    sampling, moving, erasing, *_ = run.random_streams(stage, 0)
    rows = draw_batches(run, store.persons, sampling)
    read = read_batches(
        store,
        itertools.islice(rows, recipe.iters),
        encoder.config.image,
        transform=lambda pixels: shift_and_flip(pixels, recipe.augment, moving),
    )
    return [erase(to_input(encoder, pixels, run.device), recipe.augment, erasing) for _, pixels in read]


def bare_steps(run: TrainingRun, state: StageState, batches: list[Tensor]) -> float:
    """Seconds of forward, backward and step over all batches, for a loss that costs nothing."""
    state.encoder.train()
    if state.teacher is not None:
        state.teacher.encoder.train(run.recipe.teacher_batch_norm == "batch")
    started = time.perf_counter()
    for images in batches:
        with autocast(run.device, run.recipe.precision):
            views = state.encoder(images)
            if state.teacher is not None:
                state.teacher.views(images)
        state.optimizer.zero_grad(set_to_none=True)
        torch.stack([view[:, 0].sum() for view in views[: views_used(run.recipe)]]).sum().backward()
        state.optimizer.step()
    if run.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(run: TrainingRun, stage: Stage, repeats: int) -> tuple[float, float]:
    """Images a second of the loop and of bare steps, in turns."""
    initial = load_weights("builtin").encoder.to(memory_format=torch.channels_last).to(run.device)
    group_batch_norm(initial, run.recipe.samples_per_bn)
    teacher = Teacher(copy.deepcopy(initial)) if stage == "student" else None
    states = []
    for _ in range(2):
        encoder = copy.deepcopy(initial)
        states.append(StageState(stage, encoder, make_optimizer(encoder, run.recipe), teacher))
    batches = same_batches(run, stage, initial)
    images = repeats * run.recipe.iters * run.recipe.batch
    seconds = {"loop": 0.0, "bare": 0.0}
    bare_steps(run, states[1], batches[:2])  # both sides find warm caches
    for _ in range(repeats):
        seconds["loop"] += train_epoch(run, states[0])["train_s"]
        seconds["bare"] += bare_steps(run, states[1], batches)
    return images / seconds["loop"], images / seconds["bare"]


def main() -> None:
    """Draw a site, run both stages and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--recipe", default="purify")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(load_recipe(arguments.recipe), labels="persons", iters=arguments.iters, batch=arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        store = render_site(Path(folder) / "site", SITE, seed=1).train
        with RunLog(Path(folder) / "log", console=Console(stderr=True)) as log:
            run = TrainingRun(store, recipe, 1, arguments.device, log)
            print(f"{recipe.name}, {arguments.device}, {torch.get_num_threads()} threads, batches of {recipe.batch}")
            for stage in ("teacher", "student"):
                loop, bare = compare(run, stage, arguments.repeats)
                print(f"{stage}: loop {loop:.1f} images/s, bare {bare:.1f} images/s: ratio {loop / bare:.3f}")


if __name__ == "__main__":
    main()
