"""A site that is drawn in half a second and an encoder small enough to adapt to it in another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from resight.checkpoint import Provenance, write_checkpoint
from resight.image import ImageSpec
from resight.model import Encoder, EncoderConfig
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.synthetic import SiteSettings, render_site

CONFIG = EncoderConfig(embedding_dim=32, image=ImageSpec(64, 32))
SETTINGS = SiteSettings(
    train_persons=16, test_persons=6, strangers=1, cameras=3, visits=(3, 3), crops=4, height=64, width=32
)


def draw_site(root: Path, *, seed: int = 3) -> Site:
    """192 crops of 16 people to adapt to, 18 queries and 66 gallery crops; three cameras."""
    return render_site(root, SETTINGS, seed=seed)


def random_encoder(seed: int = 0) -> Encoder:
    """Weights by chance: its clusters are the cameras, which is enough to train on."""
    torch.manual_seed(seed)
    return Encoder(CONFIG).eval()


def write_random_checkpoint(path: Path, seed: int = 0) -> Path:
    write_checkpoint(path, random_encoder(seed), Provenance(initial_weights={"name": "random", "licence": "none"}))
    return path


def without_persons(store: CropStore) -> CropStore:
    return CropStore(
        store.root,
        store.paths,
        store.cameras,
        store.camera_names,
        store.times_s,
        store.tracks,
        np.full(len(store), -1, np.int64),
    )


def same_tensors(one: Encoder, other: Encoder) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def environment() -> dict[str, str]:
    """For child processes: one thread, and lines that rich does not break."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500", "NO_COLOR": "1"}


def resight(*arguments: object, timeout_s: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "resight.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        cwd=cwd,
    )


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that failed as it should: status 1, one `error:`, no traceback."""
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    assert "Traceback" not in told, told
    found = re.findall(r"^error: (.+)$", done.stderr, re.MULTILINE)
    assert len(found) == 1, told
    return str(found[0])
