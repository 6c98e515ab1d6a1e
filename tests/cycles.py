"""A site small enough for a cycle in seconds: synthetic people, a real server, two iterations of training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from serving import ServerProcess, make_bundle

from resight.client import Client, NewEntry
from resight.cycle.site import load_site
from resight.cycle.state_folder import StateFolder
from resight.training.store.crops import CropStore, open_store, write_store
from resight.training.synthetic.site import SiteSettings, render_site

PEOPLE = SiteSettings(
    world="source",
    train_persons=24,
    test_persons=0,
    strangers=0,
    cameras=3,
    visits=(2, 3),
    crops=5,
    height=64,
    width=32,
)
COLLECTION = "lobby"
ENTRIES = 24
SITE = """
name = "lobby"
[service]
address = "{address}"
model_root = "models"
bundle = "models/first"
[collect]
min_crops = 40
hold_out = 0.5
[adapt]
epochs = 1
iters = 2
set = ["batch=32"]
start_from = "base"
[gate]
allow_undecided = true
max_latency_ratio = 1000.0
[export]
precision = "fp32"
[shadow]
max_minutes = 0.0
[watch]
minutes = 0.0
[schedule]
nice = 0
idle_io = false
"""


def draw_night(store: Path, *, seed: int = 1, ago_s: float = 3600.0) -> CropStore:
    """Crops of an earlier night: people pass their cameras at about the same time, so that tracks overlap."""
    drawn = render_site(store, PEOPLE, seed=seed).train
    rng = np.random.default_rng(seed)
    began = rng.uniform(0, 8, drawn.tracks.max() + 1)
    first = np.array([np.flatnonzero(drawn.tracks == track)[0] for track in drawn.tracks])
    times = time.time() - ago_s + began[drawn.tracks] + drawn.times_s - drawn.times_s[first]
    unknown = np.full(len(drawn), -1, np.int64)
    made = replace(drawn, times_s=times, persons=unknown)
    write_store(store, made, ["train"] * len(made))
    return made


def write_site(folder: Path, address: str, *changes: tuple[str, str]) -> Path:
    """The site's file, with lines replaced."""
    text = SITE.format(address=address)
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "site.toml"
    path.write_text(text)
    return path


@contextmanager
def site_served(folder: Path, *changes: tuple[str, str]) -> Iterator[tuple[Path, Client]]:
    """A site with a night's crops, and a server with a collection of some of them; returns its file and a client."""
    bundle = make_bundle(folder / "models" / "first").path
    night = draw_night(folder / "state" / "crops")
    server = ServerProcess(bundle, folder / "data", "--models", str(folder / "models"))
    try:
        with Client(server.wait_ready()) as client:
            client.create_collection(COLLECTION, keep_crops=True, unlimited_retention=True)
            rows = np.linspace(0, len(night) - 1, ENTRIES).astype(int).tolist()
            client.enrol_batch(COLLECTION, [entry(night, row) for row in rows])
            yield write_site(folder, client.address, *changes), client
    finally:
        server.end()


def entry(store: CropStore, row: int) -> NewEntry:
    camera = store.camera_names[store.cameras[row]]
    when = datetime.fromtimestamp(float(store.times_s[row]), UTC)
    return NewEntry(store.read(row), camera_id=camera, track_id=str(store.tracks[row]), capture_time=when)


def cycle(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "resight", "cycle", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500", "NO_COLOR": "1"}


def once(site: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Run `resight cycle once` until it ends."""
    return subprocess.run(cycle("once", site, *more), capture_output=True, text=True, timeout=300, env=environment())


def logs(site: Path) -> str:
    """The logs of all stages of all runs."""
    runs = StateFolder(load_site(site).state).runs
    return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(runs.rglob("*.log")))


def crops(site: Path) -> CropStore:
    return open_store(StateFolder(load_site(site).state).crops)["train"]
