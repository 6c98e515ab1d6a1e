"""Training in several processes, started by torchrun on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import environment

from resight.encoder.checkpoint import Checkpoint, Provenance, load_checkpoint, write_checkpoint
from resight.encoder.model import Encoder, with_parts
from resight.encoder.weights import load_weights
from resight.errors import RecipeError
from resight.image import ImageSpec
from resight.training.adaptation.adapt import adapt, require_even_slices
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.recipe import Recipe, load_recipe
from resight.training.adaptation.run import RunLog, TrainingRun
from resight.training.features import distributed
from resight.training.store.crops import CropStore, usable_crops
from resight.training.store.datasets import Site, open_site

pytestmark = pytest.mark.long

TESTS = Path(__file__).resolve().parents[2]


def torchrun(*arguments: object, processes: int = 2, timeout_s: float = 250) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes with a time limit; torchrun ends remaining processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PYTHONPATH": str(TESTS)},
    ) as agent:
        try:
            out, err = agent.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            agent.terminate()  # on SIGTERM, unlike on SIGKILL, torchrun ends its processes too
            raise
    return subprocess.CompletedProcess(agent.args, agent.returncode, out, err)


def fake_world_size(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr("resight.training.adaptation.adapt.world_size", lambda: processes)


@pytest.mark.parametrize(
    "processes, accumulate, batch, samples",
    [(1, 1, 50, 64), (1, 1, 64, 0), (2, 1, 128, 64), (1, 4, 64, 16), (2, 2, 96, 8), (4, 1, 256, 64)],
)
def test_batches_of_complete_groups_can_be_divided(
    monkeypatch: pytest.MonkeyPatch, processes: int, accumulate: int, batch: int, samples: int
) -> None:
    fake_world_size(monkeypatch, processes)
    require_even_slices(Recipe("r", batch=batch, samples_per_bn=samples, accumulate=accumulate))


@pytest.mark.parametrize(
    "processes, accumulate, batch, samples, advice",
    [
        (2, 1, 64, 64, r"multiple of 128 \(next: 128\), or samples_per_bn to a divisor of 32"),
        (3, 1, 100, 8, r"multiple of 24 \(next: 120\)"),
        (1, 3, 64, 0, r"samples_per_bn to a value for which 3 \* samples_per_bn divides the batch of 64"),
        (2, 1, 64, 0, r"samples_per_bn = 0 normalises over the whole batch"),
    ],
)
def test_batches_that_split_groups_are_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, processes: int, accumulate: int, batch: int, samples: int, advice: str
) -> None:
    fake_world_size(monkeypatch, processes)
    recipe = Recipe("r", batch=batch, samples_per_bn=samples, accumulate=accumulate)
    with pytest.raises(RecipeError, match=advice):
        require_even_slices(recipe)


@pytest.mark.slow
def test_helpers_equal_one_process_and_errors_of_one_end_both(tiny_site: Site, tmp_path: Path) -> None:
    done = torchrun(Path(__file__).with_name("processes.py"), tiny_site.root, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    assert [one.pop("rank") for one in found] == [0, 1]
    assert [one.pop("share") for one in found] == [[0, 4], [4, 7]]
    foreign = [one.pop("foreign") for one in found]
    assert foreign == ["TrainingError: process 1 of 2 failed: MemoryError: full", "MemoryError: full"]
    refused = {name: [one.pop(name) for one in found] for name in ("uneven", "collapsed", "unreadable", "runaway")}
    for name, message in {
        "uneven": "RecipeError: 2 processes with accumulate = 1 divide a batch into 2 slices",
        "collapsed": "TrainingError: no cluster",
        "unreadable": "StoreError: crop",
        "runaway": "TrainingError:",
    }.items():
        assert refused[name][0] == refused[name][1] and refused[name][0].startswith(message), refused[name]
    assert not list(tmp_path.glob("*/checkpoint.json"))
    expected = {
        "world": 2,
        "gathered": [0, 10, 20, 30, 40, 50, 60],
        "nothing": [0, 3],
        "sum": [2, 1],
        "from_first": {"rank": 0},
        "ours": "TrainingError: lower lr",
        "refused": "TrainingError: clusters collapsed",
        "after": 2,
    }
    assert found == [expected, expected]


# SGD: Adam divides by the gradient's size and would turn rounding differences into full steps.
CHANGES = {
    "batch": 32,
    "instances": 4,
    "samples_per_bn": 8,
    "optimizer": "sgd",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "epochs": 1,
    "iters": 3,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights for small images: batch norm amplifies rounding errors in a random network's dead channels."""
    trained = load_weights("builtin").encoder
    small = Encoder(replace(trained.config, image=ImageSpec(64, 32)))
    small.load_state_dict(trained.state_dict())
    folder = tmp_path_factory.mktemp("init") / "small"
    write_checkpoint(folder, small, Provenance(initial_weights={"name": "small", "licence": "none"}))
    return folder


def run(store: CropStore, out: Path, recipe: Recipe, init: Path) -> Checkpoint:
    """Train in this process."""
    with RunLog(out.with_name(f"{out.name}-log"), console=Console(stderr=True, quiet=True)) as log:
        return adapt(Adaptation(TrainingRun(store, recipe, 1, "cpu", log), load_weights(str(init)), out))


def flat(encoder: Encoder) -> torch.Tensor:
    """All trainable parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters() if parameter.requires_grad])


def assert_same_step(one: Encoder, other: Encoder, start: Encoder) -> None:
    """The difference of two runs is below a hundredth of the change from the start."""
    change, difference = (flat(one) - flat(start)).norm(), (flat(one) - flat(other)).norm()
    assert change > 0 and difference < 0.01 * change, (float(change), float(difference))


def assert_same_run(one: Path, other: Path, start: Encoder) -> None:
    """Weights agree to 1e-3 and a hundredth of their change, labels exactly, losses to 1e-4."""
    for suffix in ("", "-teacher"):
        first, second = (load_checkpoint(path.with_name(path.name + suffix)) for path in (one, other))
        assert_same_step(first.encoder, second.encoder, start)
        for name, tensor in first.encoder.state_dict().items():
            torch.testing.assert_close(second.encoder.state_dict()[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
        for one_row, other_row in zip(first.provenance.history, second.provenance.history, strict=True):
            names = [name for name in ("loss", "contrast", "eps", "clusters", "guidance") if name in one_row]
            assert [one_row[name] for name in names] == pytest.approx(
                [other_row[name] for name in names], rel=1e-4, abs=1e-6
            )
    for stage in ("teacher", "student"):
        labels = [np.load(path.with_name(f"{path.name}-log") / f"{stage}-labels.npy") for path in (one, other)]
        assert np.array_equal(*labels)


@pytest.mark.slow
def test_two_processes_equal_one(tiny_site: Site, init: Path, tmp_path: Path) -> None:
    """The command under torchrun with 16 crops per process, against 32 in this one, and in two parts."""
    settings = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = ["-m", "resight", "adapt", "--site", tiny_site.root, "--init", init, "--recipe", "purify"]
    done = torchrun(*command, "--out", tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("student epoch") == 2  # one process logs: epochs -1 and 0
    recipe = replace(load_recipe("purify"), **CHANGES)
    store = usable_crops(open_site(tiny_site.root).train)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(store, tmp_path / "one", recipe, init)
        run(store, tmp_path / "parts", replace(recipe, accumulate=2), init)
    finally:
        torch.set_num_threads(threads)
    start = load_weights(str(init)).encoder
    assert_same_run(tmp_path / "one", tmp_path / "two", start)
    assert_same_run(tmp_path / "one", tmp_path / "parts", start)


@pytest.mark.parametrize("name", ["o2cap", "selective", "purify-camera"])
def test_a_batch_in_parts_trains_like_the_whole(tiny_site: Site, init: Path, tmp_path: Path, name: str) -> None:
    recipe = replace(load_recipe(name), **CHANGES | {"parts": 4 if name == "selective" else 2, "warmup": 0})
    recipe = replace(recipe, student=False, selective=replace(recipe.selective, warmup_epochs=1))
    losses, found = [], []
    for count in (1, 4):
        done = run(tiny_site.train, tmp_path / str(count), replace(recipe, accumulate=count, epochs=2), init)
        losses.append([row["loss"] for row in done.provenance.history])
        found.append(done.encoder)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for key, tensor in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[key], tensor, rtol=2e-3, atol=2e-3, msg=key)
    assert_same_step(*found, with_parts(load_weights(str(init)).encoder, recipe.parts, recipe.local_share))


def test_half_precision_needs_a_gpu(tiny_site: Site, init: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"fp16 needs a GPU, found device cpu: use auto, bf16 or fp32"):
        run(tiny_site.train, tmp_path / "model", replace(load_recipe("purify"), precision="fp16"), init)
