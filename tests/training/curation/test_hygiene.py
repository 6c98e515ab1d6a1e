"""Valid crops have no problems, and each fault is found in the camera that has it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from resight.arrays import Pixels
from resight.training.curation.hygiene import (
    THUMBNAIL,
    CameraHygiene,
    check_hygiene,
    neighbour_correlation,
    read_thumbnails,
)
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, join_splits, open_site
from resight.training.synthetic.site import SiteSettings, render_site

SHARED = Path(__file__).parents[4] / "shared"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Site:
    people = SiteSettings(train_persons=40, test_persons=0, strangers=0, cameras=3, visits=(2, 3), height=64, width=32)
    return render_site(tmp_path_factory.mktemp("hygiene") / "site", people, seed=2)


@pytest.fixture(scope="module")
def small(drawn: Site) -> Pixels:
    return read_thumbnails(drawn.train)


def of(store: CropStore, camera: str) -> np.ndarray:
    return np.flatnonzero(store.cameras == store.camera_names.index(camera))


def noise(rows: Pixels, rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, rows.shape, np.uint8)


def frozen(rows: Pixels, rng: np.random.Generator) -> Pixels:
    """Three people in a frozen image, with the sensor noise that remains after shrinking."""
    still = rows[rng.integers(3, size=len(rows))].astype(float)
    return (still + rng.normal(0, 2.5, rows.shape)).clip(0, 255).astype(np.uint8)


def covered(rows: Pixels, rng: np.random.Generator) -> Pixels:
    return (12 + rng.normal(0, 1.5, rows.shape)).clip(0, 255).astype(np.uint8)


def glaring(rows: Pixels, rng: np.random.Generator) -> Pixels:
    return (rows.astype(float) * 4 + 120).clip(0, 255).astype(np.uint8)


FAULTS: list[tuple[Callable[[Pixels, np.random.Generator], Pixels], str]] = [
    (noise, "noise"), (frozen, "repeat"), (covered, "have no content"), (glaring, "black or white"),
]  # fmt: skip


def test_synthetic_crops_are_valid_and_all_statistics_serialise(drawn: Site, small: Pixels) -> None:
    found = check_hygiene(drawn.train)
    assert found.passed and found.messages() == []
    assert set(found.figures) == {"cam1", "cam2", "cam3"}
    report = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert report["figures"]["cam1"]["repeated_share"] == 0 and report["figures"]["cam1"]["correlation"] > 0.8
    assert found.to_json() == check_hygiene(drawn.train, thumbnails=small).to_json()


@pytest.mark.parametrize("fault, words", FAULTS)
def test_a_dead_camera_is_named_and_the_others_are_not(
    drawn: Site, small: Pixels, fault: Callable[[Pixels, np.random.Generator], Pixels], words: str
) -> None:
    damaged, rows = small.copy(), of(drawn.train, "cam2")
    damaged[rows] = fault(small[rows], np.random.default_rng(1))
    found = check_hygiene(drawn.train, thumbnails=damaged)
    assert list(found.problems_by_camera) == ["cam2"] and words in found.problems_by_camera["cam2"]
    assert not found.problems and not found.passed
    assert found.messages()[0].startswith("camera cam2: ")
    rest = np.flatnonzero(drawn.train.cameras != 1)
    assert check_hygiene(drawn.train.subset(rest), thumbnails=damaged[rest]).passed


def test_a_site_with_at_most_one_valid_camera_is_a_problem(drawn: Site, small: Pixels) -> None:
    rng = np.random.default_rng(1)
    damaged = small.copy()
    for name in ("cam1", "cam3"):
        rows = of(drawn.train, name)
        damaged[rows] = noise(small[rows], rng)
    [problem] = check_hygiene(drawn.train, thumbnails=damaged).problems
    assert problem.startswith("only one of 3 cameras has valid crops")
    [none] = check_hygiene(drawn.train, thumbnails=noise(small, rng)).problems
    assert none.startswith("none of 3 cameras")


def test_repeated_crops_are_found_with_and_without_tracks(drawn: Site, small: Pixels) -> None:
    store = drawn.train.subset(np.tile(np.arange(3), 334)[:1000])
    copies = replace(store, tracks=np.arange(1000), cameras=np.arange(1000) % 3)
    for one in (copies, replace(copies, tracks=np.full(1000, -1))):
        found = check_hygiene(one, thumbnails=small[np.tile(np.arange(3), 334)[:1000]])
        assert len(found.problems_by_camera) == 3 and found.problems


def test_one_track_for_most_crops_and_too_few_tracks(drawn: Site, small: Pixels) -> None:
    one = replace(drawn.train, tracks=np.where(np.arange(len(small)) % 5 < 3, 0, drawn.train.tracks + 1))
    alone = replace(one, cameras=np.zeros(len(small), np.int64))
    assert any("one track has" in words for words in check_hygiene(alone, thumbnails=small).problems)
    few = replace(drawn.train, tracks=drawn.train.tracks % 2)
    assert any(words.startswith("6 tracks") for words in check_hygiene(few, thumbnails=small).problems)
    unknown = replace(drawn.train, tracks=np.full(len(small), -1))
    assert (
        check_hygiene(unknown, thumbnails=small).passed
        and check_hygiene(unknown, thumbnails=small).largest_track_share is None
    )


def test_an_unreadable_crop_counts_as_blank(drawn: Site, small: Pixels) -> None:
    rows = of(drawn.train, "cam1")
    paths = tuple(f"gone/{path}" if row in rows else path for row, path in enumerate(drawn.train.paths))
    found = check_hygiene(replace(drawn.train, paths=paths))
    assert found.figures["cam1"].blank_share == 1 and found.figures["cam1"].correlation is None
    assert list(found.problems_by_camera) == ["cam1"]


def test_neighbour_correlation_equals_the_loop_implementation(small: Pixels) -> None:
    grey = small[0].mean(2, dtype=np.float32)
    flat = (grey - grey.mean()) / grey.std()
    height, width = grey.shape
    across = [flat[y, x] * flat[y, x + 1] for y in range(height) for x in range(width - 1)]
    down = [flat[y, x] * flat[y + 1, x] for y in range(height - 1) for x in range(width)]
    slow = (np.mean(across) + np.mean(down)) / 2
    assert neighbour_correlation(grey[None])[0] == pytest.approx(slow, abs=1e-4)


@pytest.mark.real
def test_real_crops_are_valid_by_a_wide_margin() -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip("no real crops: ../shared/data is not there")
    site = open_site(SHARED / "data/market-subset", tracks_from_names=True)
    store = join_splits(site).subset(np.arange(0, 9000, 5))
    found = check_hygiene(store)
    assert found.passed
    for figures in found.figures.values():
        assert figures.contrast > 30 and figures.blank_share == 0 and figures.clipped_share == 0
        assert figures.correlation is not None and figures.correlation > 0.7 and figures.repeated_share < 0.02
    assert check_hygiene(replace(store, tracks=np.full(len(store), -1))).passed


def test_every_statistic_is_documented() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/judging.md").read_text()
    assert {entry.name for entry in fields(CameraHygiene)} <= set(re.findall(r"`(\w+)`", page))
    assert (THUMBNAIL.height, THUMBNAIL.width) == (32, 16)
