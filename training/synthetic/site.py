"""Synthetic sites: synthetic people who walk past synthetic cameras, as a crop store.

They show no real people, so they can be shipped, shown and used for training. The same seed and library versions give
the same bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from resight.arrays import Pixels
from resight.errors import SiteError
from resight.training.store.crops import CropStore, write_store
from resight.training.store.datasets import Site, open_site
from resight.training.synthetic.camera import SimulatedCamera, make_cameras, take_crop
from resight.training.synthetic.people import Person, World, sample_people

FRAME_S = 0.4  # between crops of one visit
VISIT_S = 30.0  # between the starts of two visits
DISTRACTOR = 0  # person number of people without queries


@dataclass(frozen=True)
class SiteSettings:
    """Size and appearance of a synthetic site.

    Attributes:
        world: "source" or "site", see `camera`.
        train_persons: people for adaptation.
        test_persons: other people for evaluation.
        strangers: people only in the gallery, without queries.
        cameras: number of cameras.
        visits: minimum and maximum number of cameras each person passes.
        crops: crops per visit.
        height, width: size of a crop in pixels.
    """

    world: World = "site"
    train_persons: int = 160
    test_persons: int = 60
    strangers: int = 20
    cameras: int = 6
    visits: tuple[int, int] = (4, 6)
    crops: int = 3
    height: int = 128
    width: int = 64


@dataclass
class _IndexRows:
    """Columns of the index, filled crop by crop."""

    paths: list[str]
    cameras: list[int]
    times_s: list[float]
    tracks: list[int]
    persons: list[int]
    splits: list[str]


def demo_site(root: Path, *, seed: int) -> Site:
    """The site of `resight demo`: about 2,400 crops for adaptation and 60 other people for evaluation."""
    return render_site(root, SiteSettings(), seed=seed)


def render_site(root: Path, settings: SiteSettings, *, seed: int) -> Site:
    """Render a site into a new crop store.

    Args:
        root: folder to write; must be empty or missing.
        settings: see `SiteSettings`.
        seed: seed of everything random.

    Returns:
        The site, with a query and a gallery if there are test persons.

    Raises:
        SiteError: the folder is not empty.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise SiteError(f"{root} is not empty: choose another folder for the synthetic site, or empty it")
    rng = np.random.default_rng(seed)
    cameras = make_cameras(settings.cameras, rng, world=settings.world, height=settings.height, width=settings.width)
    count = settings.train_persons + settings.test_persons + settings.strangers
    people = sample_people(count, rng, world=settings.world)
    rows = _IndexRows([], [], [], [], [], [])
    for number, person in enumerate(people, start=1):
        _render_visits(root, rows, person, number, cameras, settings, rng)
    store = CropStore(
        root,
        tuple(rows.paths),
        np.array(rows.cameras, np.int64),
        tuple(f"cam{number}" for number in range(1, settings.cameras + 1)),
        np.array(rows.times_s),
        np.array(rows.tracks, np.int64),
        np.array(rows.persons, np.int64),
    )
    write_store(root, store, rows.splits)
    return open_site(root)


def _render_visits(
    root: Path,
    rows: _IndexRows,
    person: Person,
    number: int,
    cameras: tuple[SimulatedCamera, ...],
    settings: SiteSettings,
    rng: np.random.Generator,
) -> None:
    """Render the visits of one person; a test person's first crop at each camera is a query, the others gallery."""
    testing = number > settings.train_persons
    stranger = number > settings.train_persons + settings.test_persons
    passed = rng.permutation(len(cameras))[: int(rng.integers(settings.visits[0], settings.visits[1] + 1))]
    start_s = rng.uniform(0, 3600)
    for visit, camera in enumerate(sorted(passed.tolist())):
        heading = float(rng.choice(cameras[camera].turns)) + rng.normal(0, 0.3)
        track = rows.tracks[-1] + 1 if rows.tracks else 0
        for frame in range(settings.crops):
            image = take_crop(person, cameras[camera], heading, rng)
            split = "train" if not testing else "query" if frame == 0 and not stranger else "gallery"
            path = f"{split}/cam{camera + 1}/{number:04d}_{track:05d}_{frame:02d}.jpg"
            _save(root / path, image, cameras[camera].quality)
            rows.paths.append(path)
            rows.cameras.append(camera)
            rows.times_s.append(round(start_s + visit * VISIT_S + frame * FRAME_S, 3))
            rows.tracks.append(track)
            rows.persons.append(DISTRACTOR if stranger else number)
            rows.splits.append(split)


def _save(path: Path, image: Pixels, quality: int) -> None:
    """Write a JPEG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    path.write_bytes(buffer.getvalue())
