"""A small synthetic site, an encoder small enough to adapt within seconds, and the command line in a process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from resight.encoder.checkpoint import Provenance, write_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.image import ImageSpec
from resight.training.store.crops import CropStore, write_store
from resight.training.store.datasets import Site, open_site

CONFIG = EncoderConfig(embedding_dim=32, image=ImageSpec(64, 32))
PERSONS, STRANGERS = range(1, 9), range(9, 15)


def draw_site(root: Path, *, cameras: int = 3, seed: int = 3, test_noise: float = 60) -> Site:
    """240 crops of 8 people to adapt to, 6 other people for evaluation, as a crop store.

    Each person is a field of colours and each camera a tint, so that even random weights find the people;
    30 crops a person suit the recipe's k1. For the evaluation, shots differ enough for some mistakes,
    unless ``test_noise`` (grey levels) is small.
    """
    rng = np.random.default_rng(seed)
    fields = rng.integers(40, 216, (len(PERSONS) + len(STRANGERS) + 1, 8, 4, 3)).astype(np.float64)
    tints = rng.normal(0, 6, (cameras, 3))
    rows = [(person, shot % cameras, "train") for person in PERSONS for shot in range(30)]
    rows += [
        (person, shot % cameras, "query" if shot < cameras else "gallery")
        for person in STRANGERS
        for shot in range(5 * cameras)
    ]
    paths = []
    for number, (person, camera, split) in enumerate(rows):
        noise = rng.normal(0, 6 if split == "train" else test_noise, fields[person].shape)
        small = (fields[person] + tints[camera] + noise).clip(0, 255).astype(np.uint8)
        path = root / split / f"cam{camera}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((32, 64), Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(path.relative_to(root).as_posix())
    persons, seen, splits = zip(*rows, strict=True)
    names = tuple(f"cam{camera}" for camera in range(cameras))
    unknown = np.full(len(rows), -1, np.int64)
    store = CropStore(
        root, tuple(paths), np.array(seen), names, np.full(len(rows), np.nan), unknown, np.array(persons, np.int64)
    )
    write_store(root, store, splits)
    return open_site(root)


def random_encoder(seed: int = 0) -> Encoder:
    """An encoder with random weights."""
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
    """Run a command as a subprocess."""
    return subprocess.run(
        [sys.executable, "-m", "resight", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        cwd=cwd,
    )


def resight_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves the seconds of importing torch."""
    from resight.cli.main import main

    command, status = ["resight", *map(str, arguments)], 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, environment()),
    ):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that failed as expected: status 1, one `error:`, no traceback."""
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output, output
    found = re.findall(r"^error: (.+)$", done.stderr, re.MULTILINE)
    assert len(found) == 1, output
    return str(found[0])
