"""Models trained on corrupted crops are refused by the command; one trained on sound crops is promoted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import resight_here, without_persons

from resight.encoder.checkpoint import Provenance, write_checkpoint
from resight.encoder.model import Encoder
from resight.encoder.weights import load_weights
from resight.image import ImageSpec, decode
from resight.training.adaptation.adapt import adapt
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.recipe import load_recipe
from resight.training.adaptation.run import RunLog, TrainingRun
from resight.training.store.crops import CropStore, write_store
from resight.training.store.datasets import open_site
from resight.training.synthetic.site import SiteSettings, render_site

pytestmark = pytest.mark.long

PEOPLE, EARLIER = 75, 40  # people of the night, a third of them held out, and of earlier nights
LOOKS = SiteSettings(
    train_persons=PEOPLE + EARLIER, test_persons=0, strangers=0, cameras=3, visits=(2, 3), crops=4, height=64, width=32
)
NOISE = 0.2  # of each tensor's deviation: leaves room for improvement
Spoil = Callable[[Path, CropStore, np.random.Generator], None]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A night's store with held-out tracks, and a reference store of the same cameras; people overlap in time."""
    root = tmp_path_factory.mktemp("nights") / "site"
    whole = render_site(root, LOOKS, seed=5).train
    begins = {track: whole.times_s[whole.tracks == track].min() for track in np.unique(whole.tracks)}
    begin = np.array([begins[track] for track in whole.tracks])
    people, store = whole.persons, without_persons(replace(whole, times_s=begin / 300 + whole.times_s - begin))
    now = np.flatnonzero(people <= PEOPLE)
    reference = root.with_name("reference")
    shutil.copytree(root, reference)
    write_store(root, store.subset(now), np.where(people[now] % 3 == 0, "gallery", "train").tolist())
    before = store.subset(np.flatnonzero(people > PEOPLE))
    write_store(reference, replace(before, root=reference), ["train"] * len(before))
    return root, reference


@pytest.fixture(scope="module")
def active(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in encoder for small crops, degraded by noise."""
    given = load_weights("builtin").encoder
    encoder, rng = Encoder(replace(given.config, image=ImageSpec(64, 32))), torch.Generator().manual_seed(0)
    encoder.load_state_dict(given.state_dict())
    with torch.no_grad():
        for tensor in encoder.parameters():
            if tensor.ndim > 1:
                tensor += NOISE * tensor.std() * torch.randn(tensor.shape, generator=rng)
    path = tmp_path_factory.mktemp("active") / "model"
    write_checkpoint(path, encoder.eval(), Provenance(initial_weights={"name": "noisy", "licence": "none"}))
    return path


def trained(site: Path, active: Path, out: Path, *, epochs: int, iters: int) -> Path:
    """A few batches of training on the store's crops, starting from the active model."""
    recipe = load_recipe("purify-camera")
    short = replace(
        recipe,
        student=False,
        batch=32,
        samples_per_bn=32,
        instances=4,
        cluster=replace(recipe.cluster, k1=12, k2=3),
    ).with_schedule(epochs=epochs, iters=iters)
    with RunLog(out.with_name(f"{out.name}-log"), console=Console(stderr=True, quiet=True)) as log:
        adapt(Adaptation(TrainingRun(open_site(site).train, short, 1, "cpu", log), load_weights(str(active)), out))
    return out


def run_judge(model: Path, active: Path, site: Path, reference: Path, *more: object) -> dict[str, Any]:
    out = model.with_name(f"{model.name}.json")
    done = resight_here(
        "judge", "--model", model, "--against", active, "--site", site, "--reference", reference, "--json", out, *more
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert f"{found['verdict']['decision']} by {found['verdict']['evidence']}" in done.stdout
    return found


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=80)


def dead_camera(root: Path, store: CropStore, rng: np.random.Generator) -> None:
    """A frozen image with sensor noise."""
    still = decode(store.read(0)).astype(float)
    for row in np.flatnonzero(store.cameras == 1):
        save(root / store.paths[row], still + rng.normal(0, 10, still.shape))


def noise(root: Path, store: CropStore, rng: np.random.Generator) -> None:
    for path in store.paths:
        save(root / path, rng.integers(0, 256, (64, 32, 3)))


def one_person(root: Path, store: CropStore, rng: np.random.Generator) -> None:
    """The same few crops of one person in place of all others, in different tracks."""
    files = [decode(store.read(row)) for row in range(4)]
    for row, path in enumerate(store.paths):
        save(root / path, files[row % 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, words",
    [(dead_camera, "camera cam2: "), (noise, "its crops are noise"), (one_person, "repeat one of another track")],
)
def test_a_model_trained_on_corrupted_crops_is_refused(
    nights: tuple[Path, Path], active: Path, tmp_path: Path, spoil: Spoil, words: str
) -> None:
    site = tmp_path / "site"
    shutil.copytree(nights[0], site)
    opened, rng = open_site(site), np.random.default_rng(0)
    assert opened.gallery is not None
    for part in (opened.train, opened.gallery):
        spoil(site, part, rng)
    model = trained(site, active, tmp_path / "model", epochs=1, iters=6)
    found = run_judge(model, active, site, nights[1])
    assert (found["verdict"]["decision"], found["verdict"]["evidence"]) == ("refuse", "crops")
    assert any(words in reason for reason in found["verdict"]["reasons"])
    assert found["hygiene"]["crops adapted to"]["problems_by_camera"]


@pytest.mark.slow
def test_a_model_trained_on_sound_crops_is_promoted_and_the_page_shows_why(
    nights: tuple[Path, Path], active: Path, tmp_path: Path
) -> None:
    model = trained(nights[0], active, tmp_path / "model", epochs=3, iters=10)
    page = tmp_path / "deep" / "page.html"
    found = run_judge(model, active, *nights, "--page", page, "--latency", "--max-latency-ratio", 20)
    assert found["verdict"]["decision"] == "promote", found["verdict"]
    assert found["model"]["crops"] == len(open_site(nights[0]).gallery or ())  # held-out tracks, not those adapted to
    assert found["latency"]["ratio"] > 0 and found["latency"]["limit"] == 20
    assert not any(part["problems_by_camera"] or part["problems"] for part in found["hygiene"].values())
    assert found["reference"]["model"]["tracks"]["auc"] is not None
    text = page.read_text()
    assert "promote, by tracks" in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 2 and text.count("data:image/jpeg") > 30
    for name, figure in found["model"]["tracks"].items():
        if isinstance(figure, dict) and "value" in figure:
            assert name in text and f"{figure['value']:.4f}" in text
    for words in ("Two persons it finds most similar", "One track it finds least similar", "cam3", "reference.auc"):
        assert words in text


def test_options_for_two_models_require_both(nights: tuple[Path, Path], active: Path, tmp_path: Path) -> None:
    done = resight_here("judge", "--model", active, "--site", nights[0], "--page", tmp_path / "page.html")
    assert done.returncode == 1 and "add --against OTHER" in done.stderr
    assert not (tmp_path / "page.html").exists()
