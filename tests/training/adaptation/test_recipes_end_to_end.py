"""Every recipe on a synthetic site: training, resuming to the same weights, and failure cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import random_encoder, same_tensors, without_persons

from resight.encoder.checkpoint import Checkpoint, load_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import InitialWeights
from resight.errors import TrainingError
from resight.image import ImageSpec
from resight.training.adaptation import adapt as adapt_module
from resight.training.adaptation.adapt import adapt, train_epoch
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.recipe import Recipe, load_recipe
from resight.training.adaptation.run import RunLog, StageState, TrainingRun
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site

pytestmark = pytest.mark.long

METHODS = ("cluster-contrast", "purify", "o2cap", "selective", "purify-camera")
SOURCE = {"name": "random", "sha256": "00", "licence": "none"}


def short(name: str) -> Recipe:
    """Two epochs of two batches, with stripes that fit a feature map of four rows."""
    recipe = load_recipe(name).with_schedule(epochs=2, iters=2)
    return dataclasses.replace(recipe, parts=4, warmup=1) if name == "selective" else recipe


def run(
    store: CropStore, out: Path, recipe: Recipe, *, student: Encoder | None = None, resume: bool = False
) -> Checkpoint:
    start = InitialWeights(random_encoder(), SOURCE)
    smaller = None if student is None else InitialWeights(student, SOURCE | {"name": "small"})
    with RunLog(out.with_name("log"), console=Console(stderr=True, quiet=True), append=resume) as log:
        return adapt(Adaptation(TrainingRun(store, recipe, 1, "cpu", log), start, out, smaller), resume=resume)


@pytest.fixture(scope="module")
def store(tiny_site: Site) -> CropStore:
    return without_persons(tiny_site.train)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_gives_the_same_weights(
    store: CropStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = short(name)
    whole = run(store, tmp_path / "whole" / "model", recipe)
    out, last = tmp_path / "broken" / "model", "student" if recipe.student else "teacher"

    def interrupted(run: TrainingRun, state: StageState) -> dict[str, float]:
        if (state.stage, state.epoch) == (last, 1):
            raise KeyboardInterrupt
        return train_epoch(run, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapt_module, "train_epoch", interrupted)
        run(store, out, recipe)
    resumed = run(store, out, recipe, resume=True)
    assert same_tensors(whole.encoder, resumed.encoder)
    for mine, theirs in zip(whole.provenance.history, resumed.provenance.history, strict=True):
        timed = ("images_per_s", "label_s", "train_s")
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_finite_and_weights_change(store: CropStore, tmp_path: Path, name: str) -> None:
    recipe = short(name).with_schedule(epochs=1)
    found = run(store, tmp_path / "model", recipe)
    for row in found.provenance.history:
        assert all(np.isfinite(value) for key, value in row.items() if key != "stage"), row
        assert ("clusters" in row) == (recipe.labels == "clusters")
        assert ("guidance" in row) == (row["stage"] == "student")
    start = random_encoder()
    assert not all(
        (tensor == found.encoder.backbone.state_dict()[key]).all()
        for key, tensor in start.backbone.state_dict().items()
    )


@pytest.mark.parametrize("name", METHODS)
def test_one_camera_and_camera_numbers_that_do_not_count_from_zero(store: CropStore, tmp_path: Path, name: str) -> None:
    recipe = short(name).with_schedule(epochs=1, iters=1)
    names = tuple(f"camera {i}" for i in range(12))
    spread = dataclasses.replace(store, cameras=np.array([2, 7, 11])[store.cameras], camera_names=names)
    alone = dataclasses.replace(store, cameras=np.full(len(store), 9), camera_names=names)
    for case, crops in (("spread", spread), ("alone", alone)):
        found = run(crops, tmp_path / case / "model", recipe)
        assert np.isfinite([row["loss"] for row in found.provenance.history]).all()


def test_a_small_student_learns_from_a_large_teacher(store: CropStore, tmp_path: Path) -> None:
    """The student has another backbone, input and feature length; relations are distilled too."""
    recipe = short("cluster-contrast").with_student()
    small = Encoder(EncoderConfig("resnet18", "gem", 0, ImageSpec(128, 64))).eval()
    found = run(store, tmp_path / "model", recipe, student=small)
    teacher = load_checkpoint(tmp_path / "model-teacher").encoder
    assert (found.encoder.config.backbone, teacher.config.backbone) == ("resnet18", "osnet_x0_25")
    assert found.encoder.feature_dim == teacher.feature_dim and found.encoder.config.image == teacher.config.image
    assert found.provenance.initial_weights["name"] == "small"
    students = [row for row in found.provenance.history if row["stage"] == "student"]
    assert all(row["relation"] > 0 and row["guidance"] > 0 for row in students)
    assert students[-1]["guidance"] < students[0]["guidance"]


def test_fewer_proxies_than_negatives(tiny_site: Site, tmp_path: Path) -> None:
    """Two people of eight crops each under three cameras: six proxies, and a batch larger than all crops."""
    few = tiny_site.train.subset(np.r_[0:8, 30:38])
    recipe = dataclasses.replace(short("o2cap"), labels="persons").with_schedule(epochs=1)
    found = run(few, tmp_path / "model", recipe)
    assert found.provenance.history[-1]["clusters"] == 2 and np.isfinite(found.provenance.history[-1]["loss"])


def test_selective_needs_a_batch_of_crops(store: CropStore, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="16 crops do not fill a batch of 64"):
        run(store.subset(np.arange(16)), tmp_path / "model", short("selective"))
