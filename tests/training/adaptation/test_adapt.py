"""The adaptation loop on a synthetic site: outputs, reproducibility, resuming and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import CONFIG, environment, random_encoder, same_tensors, without_persons

from resight.encoder.checkpoint import Checkpoint, load_checkpoint
from resight.encoder.model import Encoder
from resight.encoder.weights import InitialWeights, load_weights
from resight.errors import CheckpointError, SiteError, TrainingError
from resight.training.adaptation import epoch as epoch_module
from resight.training.adaptation import objective as objective_module
from resight.training.adaptation.adapt import adapt, train_epoch
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.distill import Teacher
from resight.training.adaptation.objective import ClusterObjective, Objective
from resight.training.adaptation.recipe import Recipe, load_recipe
from resight.training.adaptation.run import RunLog, Stage, StageState, TrainingRun, make_optimizer
from resight.training.store.crops import CropStore, usable_crops
from resight.training.store.datasets import Site, open_site

pytestmark = pytest.mark.long

SHARED = Path(__file__).parents[4] / "shared"
SOURCE = {"name": "random", "sha256": "00", "licence": "none"}
PURIFY = load_recipe("purify").with_schedule(epochs=2, iters=2)
GROUPED = dataclasses.replace(PURIFY, samples_per_bn=16, accumulate=2)  # two parts of two groups per batch
SUPERVISED = load_recipe("supervised").with_schedule(epochs=2, iters=2)


def silent_console() -> Console:
    return Console(stderr=True, quiet=True)


def initial(encoder: Encoder | None = None, **source: str) -> InitialWeights:
    return InitialWeights(encoder or random_encoder(), {**SOURCE, **source})


def run_adapt(
    store: CropStore,
    out: Path,
    recipe: Recipe = PURIFY,
    *,
    seed: int = 1,
    start: InitialWeights | None = None,
    resume: bool = False,
) -> Checkpoint:
    with RunLog(out.with_name(f"{out.name}-log"), console=silent_console(), append=resume) as log:
        return adapt(Adaptation(TrainingRun(store, recipe, seed, "cpu", log), start or initial(), out), resume=resume)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        file.relative_to(folder).as_posix(): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()
    }


@pytest.fixture(scope="module")
def store(tiny_site: Site) -> CropStore:
    return without_persons(tiny_site.train)


@pytest.fixture(scope="module")
def uninterrupted(store: CropStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a complete run with PURIFY, seed 1 and random initial weights."""
    out = tmp_path_factory.mktemp("uninterrupted") / "model"
    run_adapt(store, out)
    return out


def history(folder: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in load_checkpoint(folder).provenance.history]


def test_teacher_and_student_are_written_to_their_folders(uninterrupted: Path, store: CropStore) -> None:
    student, teacher = load_checkpoint(uninterrupted), load_checkpoint(uninterrupted.with_name("model-teacher"))
    assert (student.provenance.stage, teacher.provenance.stage) == ("student", "teacher")
    assert student.encoder.config == teacher.encoder.config == CONFIG
    assert not same_tensors(student.encoder, teacher.encoder)
    for found in (student, teacher):
        assert found.provenance.epoch == 1 and not found.resume
        assert found.provenance.store_fingerprint == store.fingerprint
        assert found.provenance.initial_weights == SOURCE
        assert found.provenance.recipe["seed"] == 1 and found.provenance.recipe["epochs"] == 2
    assert [(row["stage"], row["epoch"]) for row in history(uninterrupted)] == [
        ("teacher", 0),
        ("teacher", 1),
        ("student", -1),
        ("student", 0),
        ("student", 1),
    ]
    assert not [left for left in uninterrupted.parent.iterdir() if left.name.startswith(".")]


def test_learning_rate_follows_the_recipe_in_each_stage(uninterrupted: Path) -> None:
    """A step at 0.7 of 2 epochs is taken before round 1; the student's epoch -1 is its round 0."""
    lr = PURIFY.lr
    assert [row["lr"] for row in history(uninterrupted)] == pytest.approx([lr, lr / 10, lr, lr / 10, lr / 10])


def test_eps_is_chosen_in_the_first_epoch_and_reused(uninterrupted: Path) -> None:
    assert load_checkpoint(uninterrupted).provenance.recipe["cluster"]["eps"] == "auto"
    assert len({row["eps"] for row in history(uninterrupted)}) == 1


def test_metrics_are_finite_and_only_the_student_is_distilled(uninterrupted: Path) -> None:
    for row in history(uninterrupted):
        assert all(np.isfinite(value) for name, value in row.items() if name != "stage"), row
        assert (row.get("guidance", 0) > 0) == (row["stage"] == "student")
        assert row["clusters"] >= 2 and "nmi" not in row


def test_log_equals_the_history_in_the_checkpoint(uninterrupted: Path, store: CropStore) -> None:
    log = uninterrupted.with_name("model-log")
    assert [json.loads(line) for line in (log / "epochs.jsonl").read_text().splitlines()] == history(uninterrupted)
    for stage in ("teacher", "student"):
        labels = np.load(log / f"{stage}-labels.npy")
        assert labels.shape == (len(store),)
        assert labels.max() + 1 == [row for row in history(uninterrupted) if row["stage"] == stage][-1]["clusters"]


def test_student_stage_does_not_modify_teacher_files_or_initial_weights(
    store: CropStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    seen: list[dict[str, tuple[bytes, int]]] = []
    real = train_epoch

    def recording(run: TrainingRun, state: StageState) -> dict[str, float]:
        if state.stage == "student":
            seen.append(contents(tmp_path / "model-teacher"))
        return real(run, state)

    monkeypatch.setattr("resight.training.adaptation.adapt.train_epoch", recording)
    start = initial()
    before = copy.deepcopy(start.encoder)
    run_adapt(store, out, PURIFY.with_schedule(epochs=1), start=start)
    assert seen and all(state == seen[0] == contents(tmp_path / "model-teacher") for state in seen)
    assert same_tensors(start.encoder, before) and not start.encoder.training


def test_first_student_epoch_uses_labels_and_frozen_memories_of_the_teacher(
    store: CropStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[ClusterObjective, ClusterObjective]] = []
    real = epoch_module.make_objective

    def recording(*arguments: Any) -> Objective:
        objective = real(*arguments)
        assert isinstance(objective, ClusterObjective)
        made.append((objective, copy.deepcopy(objective)))
        return objective

    monkeypatch.setattr("resight.training.adaptation.adapt.make_objective", recording)
    teacher, student = random_encoder(5), random_encoder(6)
    labels, centres = [], []
    with RunLog(tmp_path / "log", console=silent_console()) as log:
        run = TrainingRun(store, PURIFY, 1, "cpu", log)
        for number, encoder, source in ((0, copy.deepcopy(teacher), None), (-1, student, Teacher(teacher))):
            stage: Stage = "student" if source else "teacher"
            state = StageState(stage, encoder, make_optimizer(encoder, PURIFY), source, number)
            metrics = train_epoch(run, state)
            labels.append(np.load(tmp_path / "log" / f"{stage}-labels.npy"))
            after, before = ([memory.centroids for memory in objective.memories] for objective in made[-1])
            centres.append(before[0])
            assert len(after) == 3
            moved = any(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
            assert moved == (source is None)
            batches = metrics["images_per_s"] * metrics["train_s"] / PURIFY.batch
            assert round(batches) == PURIFY.iters * (2 if source else 1)
    assert np.array_equal(*labels)  # both are the labels of the untrained teacher
    assert torch.equal(*centres)


def test_a_run_depends_only_on_its_seed(store: CropStore, uninterrupted: Path, tmp_path: Path) -> None:
    again = run_adapt(store, tmp_path / "again")
    other = run_adapt(store, tmp_path / "other", seed=2)
    first = load_checkpoint(uninterrupted)
    assert same_tensors(first.encoder, again.encoder)
    assert not same_tensors(first.encoder, other.encoder)


ADAPT_PRINTING_EPOCHS = """
import sys
from resight.training.adaptation import run
real = run.RunLog.epoch
def printing(self, stage, epoch, metrics):
    real(self, stage, epoch, metrics)
    print(stage, epoch, flush=True)
run.RunLog.epoch = printing
from resight.cli.main import main
sys.argv = ["resight", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_killed_and_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    tiny_site: Site, tiny_init: Path, tmp_path: Path, cli_run: Path
) -> None:
    out, last = tmp_path / "model", "student 0"
    command = [sys.executable, "-c", ADAPT_PRINTING_EPOCHS, "adapt", "--site", tiny_site.root, "--init", tiny_init]
    command += ["--out", out, "--recipe", "purify", "--epochs", "2", "--iters", "2"]
    command += ["--set", "samples_per_bn=16", "--set", "accumulate=2"]
    child = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.strip() == last:  # printed just before its checkpoint is written
                wait_for_checkpoint(out, *last.split())
                os.kill(child.pid, signal.SIGKILL)
                break
    assert child.wait(60) == -signal.SIGKILL
    done = subprocess.run(
        [str(part) for part in [*command, "--resume"]], capture_output=True, text=True, env=environment(), timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["student 1"]  # resumed, not restarted
    assert same_tensors(load_checkpoint(cli_run).encoder, load_checkpoint(out).encoder)
    assert history(out)[-1]["loss"] == history(cli_run)[-1]["loss"]
    assert [(row["stage"], row["epoch"]) for row in history(out)] == [
        (row["stage"], row["epoch"]) for row in history(cli_run)
    ]


@pytest.mark.parametrize("stage, number", [("teacher", 1), ("student", -1), ("student", 0)])
def test_a_run_interrupted_before_any_epoch_resumes(
    store: CropStore, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int
) -> None:
    def interrupted(run: TrainingRun, state: StageState) -> dict[str, float]:
        if (state.stage, state.epoch) == (stage, number):
            raise KeyboardInterrupt
        return train_epoch(run, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("resight.training.adaptation.adapt.train_epoch", interrupted)
        run_adapt(store, tmp_path / "model")
    found = run_adapt(store, tmp_path / "model", resume=True)
    assert same_tensors(found.encoder, load_checkpoint(uninterrupted).encoder)
    lines = (tmp_path / "model-log" / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [row["loss"] for row in history(uninterrupted)]


def wait_for_checkpoint(out: Path, stage: str, number: str) -> None:
    folder = out if stage == "student" else out.with_name(f"{out.name}-teacher")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            found = json.loads((folder / "checkpoint.json").read_text())["provenance"]
        except FileNotFoundError:
            continue
        if (found["stage"], found["epoch"]) == (stage, int(number)):
            return
    raise AssertionError(f"no checkpoint of {stage} {number}")


@pytest.fixture(scope="module")
def cli_run(tiny_site: Site, tiny_init: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the same command in this process."""
    out = tmp_path_factory.mktemp("cli") / "model"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the child processes
    try:
        run_adapt(usable_crops(open_site(tiny_site.root).train), out, GROUPED, start=load_weights(str(tiny_init)))
    finally:
        torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda call: call | {"seed": 9}, r"recipe \(seed 1, now 9\)"),
        (
            lambda call: (
                call | {"recipe": dataclasses.replace(PURIFY, cluster=dataclasses.replace(PURIFY.cluster, k1=20))}
            ),
            r"recipe \(cluster.k1 30, now 20\)",
        ),
        (lambda call: call | {"store": call["store"].subset(range(200))}, "store fingerprint"),
        (lambda call: call | {"start": initial(name="another")}, r"initial weights \(name 'random', now 'another'\)"),
    ],
)
def test_resuming_with_other_arguments_is_refused_and_names_the_difference(
    store: CropStore, uninterrupted: Path, change: Callable[[dict[str, Any]], dict[str, Any]], named: str
) -> None:
    kept = contents(uninterrupted)
    with pytest.raises(CheckpointError, match=named):
        run_adapt(out=uninterrupted, resume=True, **change({"store": store}))
    assert contents(uninterrupted) == kept


def test_resuming_a_finished_run_changes_nothing(store: CropStore, uninterrupted: Path) -> None:
    kept = contents(uninterrupted)
    run_adapt(store, uninterrupted, resume=True)
    assert contents(uninterrupted) == kept


def test_an_existing_folder_is_refused_and_its_log_is_unchanged(
    store: CropStore, uninterrupted: Path, tmp_path: Path
) -> None:
    log = contents(uninterrupted.with_name("model-log"))
    with pytest.raises(CheckpointError, match=r"--resume"):
        run_adapt(store, uninterrupted)
    assert contents(uninterrupted.with_name("model-log")) == log
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"choose another --out"):
            run_adapt(store, tmp_path / "mine", resume=resume)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert not (tmp_path / "mine-teacher").exists()


def test_the_supervised_recipe_trains_with_persons(tiny_site: Site, tmp_path: Path) -> None:
    found = run_adapt(tiny_site.train, tmp_path / "model", SUPERVISED)
    assert found.provenance.stage == "teacher" and not (tmp_path / "model-teacher").exists()
    last = found.provenance.history[-1]
    assert last["clusters"] == 8 and last["nmi"] == pytest.approx(1) and last["outlier_share"] == 0


def test_the_supervised_recipe_needs_at_least_two_persons(tiny_site: Site, store: CropStore, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"use recipe 'purify'"):
        run_adapt(store, tmp_path / "none", SUPERVISED)
    alone = tiny_site.train.subset(np.flatnonzero(tiny_site.train.persons == tiny_site.train.persons[0]))
    with pytest.raises(SiteError, match=r"one person"):
        run_adapt(alone, tmp_path / "alone", SUPERVISED)
    assert not list(tmp_path.glob("*/checkpoint.json"))


def test_person_labels_are_used_for_metrics_and_not_for_training(
    tiny_site: Site, uninterrupted: Path, tmp_path: Path
) -> None:
    """Purify gives the same weights if persons are known; only the metrics differ."""
    found = run_adapt(tiny_site.train, tmp_path / "model")
    assert same_tensors(found.encoder, load_checkpoint(uninterrupted).encoder)
    assert "nmi" in found.provenance.history[0]


def made_store(root: Path, images: list[np.ndarray], cameras: list[int]) -> CropStore:
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / f"{number}.png")
    names = tuple(f"{number}.png" for number in range(len(images)))
    unknown = np.full(len(images), -1, np.int64)
    return CropStore(
        root, names, np.array(cameras), ("a", "b", "c"), np.full(len(images), np.nan), unknown, unknown.copy()
    )


def test_identical_crops_are_one_cluster_which_is_refused(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
    same = made_store(tmp_path, [image] * 60, [0, 1, 2] * 20)
    with pytest.raises(TrainingError, match=r"one cluster.*(lower eps|different people)"):
        run_adapt(same, tmp_path / "model")


def test_crops_without_any_cluster_are_refused(store: CropStore, tmp_path: Path) -> None:
    strict = dataclasses.replace(PURIFY, cluster=dataclasses.replace(PURIFY.cluster, eps=0.001))
    with pytest.raises(TrainingError, match=r"no cluster.*add crops"):
        run_adapt(store, tmp_path / "model", strict)


def test_a_collapse_leaves_the_last_checkpoint_to_resume_from(
    store: CropStore, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "model", epoch_module.cluster
    calls: list[int] = []

    def collapses_at_third(views: Any, settings: Any, **given: Any) -> Any:
        calls.append(1)
        return real(views if len(calls) != 3 else [np.ones_like(view) / 32**0.5 for view in views], settings, **given)

    monkeypatch.setattr(epoch_module, "cluster", collapses_at_third)
    with pytest.raises(TrainingError, match=r"one cluster"):
        run_adapt(store, out)
    assert load_checkpoint(tmp_path / "model-teacher").provenance.epoch == 1 and not out.exists()
    found = run_adapt(store, out, resume=True)
    assert same_tensors(found.encoder, load_checkpoint(uninterrupted).encoder)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = objective_module.weigh_views

    def nan_loss(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(objective_module, "weigh_views", nan_loss)
    with pytest.raises(TrainingError, match=r"teacher epoch 1: the loss is nan: lower lr"):
        run_adapt(tiny_site.train, tmp_path / "model", SUPERVISED)
    kept = load_checkpoint(tmp_path / "model")
    assert kept.provenance.epoch == 0 and kept.resume


def test_weights_that_diverge_in_the_last_step_are_not_written(
    tiny_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.optim.Adam.step

    def diverging_step(self: torch.optim.Adam, *arguments: Any) -> Any:
        real(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(float("inf"))

    monkeypatch.setattr(torch.optim.Adam, "step", diverging_step)
    with pytest.raises(TrainingError, match=r"not finite"):
        run_adapt(tiny_site.train, tmp_path / "model", SUPERVISED.with_schedule(iters=1))
    assert not (tmp_path / "model").exists()


def test_initial_weights_that_are_not_finite_are_refused(store: CropStore, tmp_path: Path) -> None:
    broken = random_encoder()
    broken.state_dict()["backbone.conv1.conv.weight"][0] = float("nan")
    with pytest.raises(TrainingError, match=r"initial weights: 1 tensors.*backbone.conv1.conv.weight"):
        run_adapt(store, tmp_path / "model", start=initial(broken))


def test_too_few_crops_are_refused(store: CropStore, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"7 usable crops.*at least 8"):
        run_adapt(store.subset(range(7)), tmp_path / "model")


def test_one_camera_is_enough_to_adapt(tiny_site: Site, tmp_path: Path) -> None:
    alone = tiny_site.train.subset(np.flatnonzero(tiny_site.train.cameras == 0))
    assert run_adapt(alone, tmp_path / "model", SUPERVISED).provenance.epoch == 1


def test_persons_with_a_single_crop_are_trained_with(tiny_site: Site, tmp_path: Path) -> None:
    _, first = np.unique(tiny_site.train.persons, return_index=True)
    found = run_adapt(tiny_site.train.subset(first), tmp_path / "model", SUPERVISED)
    assert found.provenance.history[-1]["clusters"] == 8


def test_corrupt_crops_are_left_out(tiny_site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(tiny_site.root, tmp_path / "site")
    store = open_site(tmp_path / "site").train
    whole = (store.root / store.paths[5]).read_bytes()
    (store.root / store.paths[5]).write_bytes(whole[: len(whole) // 2])
    (store.root / store.paths[9]).write_text("no image")
    with caplog.at_level("WARNING"):
        left = usable_crops(store)
    assert len(left) == len(store) - 2
    assert all(store.paths[row] in caplog.text for row in (5, 9))
    found = run_adapt(left, tmp_path / "model", PURIFY.with_schedule(epochs=1))
    assert found.provenance.store_fingerprint == left.fingerprint != store.fingerprint


def test_batch_norm_statistics_are_restored_for_folded_onnx_weights(store: CropStore, tmp_path: Path) -> None:
    """With identity norms train mode differs from eval mode; with restored statistics they nearly agree."""
    from resight.training.adaptation.adapt import _restore_statistics

    encoder = random_encoder()
    for module in encoder.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as folding leaves them
            module.weight.data.fill_(1)
            module.running_mean.fill_(0)
            module.running_var.fill_(1 - module.eps)
    before = copy.deepcopy(encoder)
    with RunLog(tmp_path / "log", console=silent_console()) as log:
        _restore_statistics(encoder, TrainingRun(store, PURIFY, 1, "cpu", log))
    images = torch.rand(8, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(encoder(images)[0], before(images)[0], atol=1e-4)
    assert not torch.equal(encoder.backbone.conv1.bn.running_var, before.backbone.conv1.bn.running_var)
    folded = InitialWeights(before, SOURCE, statistics_missing=True)
    found = run_adapt(store, tmp_path / "model", PURIFY.with_schedule(epochs=1), start=folded)
    plain = run_adapt(store, tmp_path / "plain", PURIFY.with_schedule(epochs=1), start=initial(before))
    assert not same_tensors(found.encoder, plain.encoder)


@pytest.mark.real
def test_real_folded_onnx_weights_can_be_trained(tiny_site: Site, tmp_path: Path) -> None:
    files = sorted((SHARED / "weights").glob("osnet_x0_25*.onnx"))
    if not files:
        pytest.skip(f"no OSNet .onnx under {SHARED / 'weights'}")
    start = load_weights(str(files[0]))
    assert start.statistics_missing
    recipe = dataclasses.replace(SUPERVISED.with_schedule(epochs=1, iters=1), batch=16)
    found = run_adapt(tiny_site.train.subset(range(0, 240, 5)), tmp_path / "model", recipe, start=start)
    assert np.isfinite(found.provenance.history[-1]["loss"])
