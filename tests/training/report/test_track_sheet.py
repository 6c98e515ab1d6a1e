"""The track sheet as a page and as an image."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import jpeg

from resight.errors import FootageError
from resight.training.report.montage import CROPS_SHOWN
from resight.training.report.tracks import GAP, MAX_ROWS, TILE, write_track_sheet
from resight.training.store.crops import CropStore, open_store
from resight.training.store.growing import GrowingStore, NewCrop, NewTrack


@pytest.fixture
def store(tmp_path: Path) -> CropStore:
    made = GrowingStore(tmp_path / "s")
    sizes = [3, CROPS_SHOWN + 4, 1]
    made.add(
        [
            NewTrack(
                "<door>",
                [NewCrop(f"t{track}/{shot}.jpg", jpeg(track, shot), 1772402400.0 + shot) for shot in range(size)],
            )
            for track, size in enumerate(sizes)
        ]
    )
    made.add([NewTrack("<door>", [NewCrop("loose.jpg", jpeg(7), None)], numbered=False)])
    return open_store(tmp_path / "s")["train"]


def test_a_page_shows_each_track_in_a_row(store: CropStore, tmp_path: Path) -> None:
    assert write_track_sheet(tmp_path / "deep" / "t.html", store, title="Tracks of <b>") == 3
    page = (tmp_path / "deep" / "t.html").read_text()
    assert [int(number) for number in re.findall(r'<section class="card" aria-label="track (\d+)"', page)] == [0, 1, 2]
    assert (
        page.count("<img ") == 3 + CROPS_SHOWN + 1
        and "&lt;door&gt;" in page
        and "<door>" not in page
        and "&lt;b&gt;" in page
    )
    assert "2026-03-01 22:00:00+00:00" in page and "http" not in re.sub(r"http-equiv", "", page)


def test_an_image_shows_tracks_below_each_other(store: CropStore, tmp_path: Path) -> None:
    assert write_track_sheet(tmp_path / "t.jpg", store, title="") == 3
    with Image.open(tmp_path / "t.jpg") as image:
        assert image.size == (CROPS_SHOWN * (TILE.width + GAP) + GAP, 3 * (TILE.height + GAP) + GAP)
        pixels = np.asarray(image).astype(int)
    last = pixels[GAP + 2 * (TILE.height + GAP) :, :]
    assert np.abs(last[20:100, GAP + TILE.width + 32 :] - 128).max() < 12  # one crop, grey next to it


def test_many_tracks_are_sampled_evenly(tmp_path: Path) -> None:
    made = GrowingStore(tmp_path / "s")
    made.add([NewTrack("door", [NewCrop(f"{track}.jpg", jpeg(track), float(track))]) for track in range(3 * MAX_ROWS)])
    assert write_track_sheet(tmp_path / "t.html", open_store(tmp_path / "s")["train"], title="many") == MAX_ROWS
    shown = [int(number) for number in re.findall(r'aria-label="track (\d+)"', (tmp_path / "t.html").read_text())]
    assert shown[0] == 0 and shown[-1] == 3 * MAX_ROWS - 1 and max(np.diff(shown)) <= 4


def test_a_missing_crop_is_noted_on_the_page(store: CropStore, tmp_path: Path) -> None:
    (store.root / "t0" / "1.jpg").unlink()
    write_track_sheet(tmp_path / "t.html", store, title="")
    assert "1 selected crops cannot be read" in (tmp_path / "t.html").read_text()


def test_other_suffixes_are_rejected(store: CropStore, tmp_path: Path) -> None:
    with pytest.raises(FootageError, match=r"expected a name that ends in \.html"):
        write_track_sheet(tmp_path / "t.png", store, title="")
