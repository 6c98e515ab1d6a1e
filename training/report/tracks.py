"""The track sheet: the tracks of a store, one per row, as an HTML page or a JPEG.

It shows errors that no metric reveals at a glance: tracks of two people, of a wall, or of half a person.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from resight.errors import FootageError
from resight.files import write_atomic
from resight.image import ImageSpec, decode, fit
from resight.training.report.montage import CROPS_SHOWN
from resight.training.report.page import CropImage, Thumbnails, data_uri, templates
from resight.training.store.crops import UNKNOWN, CropStore

MAX_ROWS = 60  # tracks shown, spaced evenly over all: a page has about 2 MB
TILE = ImageSpec(128, 64)  # size of a crop in the JPEG
GAP = 4  # pixels between two tiles
SHEET_SUFFIXES = (".html", ".jpg", ".jpeg")


@dataclass(frozen=True)
class TrackRow:
    """One track: its number, camera, start time as text, number of crops, and the crops shown."""

    track: int
    camera: str
    moment: str
    size: int
    crops: list[CropImage]


def check_track_sheet(path: Path) -> Path:
    """Check the suffix of the sheet's path before anything is computed; returns the path.

    Raises:
        FootageError: another suffix.
    """
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise FootageError(
            f"--montage {path}: expected a name that ends in {', '.join(SHEET_SUFFIXES)}", field="montage"
        )
    return path


def write_track_sheet(path: Path, store: CropStore, *, title: str) -> int:
    """Write tracks of a store as HTML or JPEG, atomically.

    Args:
        path: with a suffix of `SHEET_SUFFIXES`.
        store: crops; those without a track are not shown.
        title: of the page.

    Returns:
        The number of tracks shown.

    Raises:
        FootageError: another suffix.
        OSError: the folder cannot be created or written.
    """
    check_track_sheet(path)
    thumbnails = Thumbnails()
    tracks = np.unique(store.tracks[store.tracks != UNKNOWN])
    shown = tracks[np.unique(np.linspace(0, len(tracks) - 1, min(MAX_ROWS, len(tracks))).astype(int))]
    rows = [_row(store, int(track), thumbnails) for track in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".html":
        summary = f"{len(store)} crops of {len(tracks)} tracks; {len(rows)} of them are shown."
        environment = templates()
        environment.filters["uri"] = data_uri
        page = environment.get_template("tracks.html.j2").render(
            title=title, summary=summary, notes=thumbnails.notes, rows=rows
        )  # fmt: skip
        write_atomic(path, page.encode())
    else:
        write_atomic(path, _picture(rows))
    return len(rows)


def _row(store: CropStore, track: int, thumbnails: Thumbnails) -> TrackRow:
    """The row of a track: crops ordered by time, evenly spaced if there are too many."""
    rows = np.flatnonzero(store.tracks == track)
    rows = rows[np.argsort(store.times_s[rows], kind="stable")]
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(CROPS_SHOWN, len(rows))).astype(int))]
    time_s = store.times_s[rows[0]]
    moment = datetime.fromtimestamp(float(time_s), UTC).isoformat(" ", "seconds") if np.isfinite(time_s) else ""
    return TrackRow(
        track, store.camera_names[store.cameras[rows[0]]], moment, len(rows), thumbnails.crops(store, chosen)
    )


def _picture(rows: list[TrackRow]) -> bytes:
    """A JPEG with one track per row on a grey background."""
    width = max((len(row.crops) for row in rows), default=1)
    canvas = np.full(
        (max(1, len(rows)) * (TILE.height + GAP) + GAP, max(1, width) * (TILE.width + GAP) + GAP, 3), 128, np.uint8
    )
    for number, row in enumerate(rows):
        top = GAP + number * (TILE.height + GAP)
        for column, crop in enumerate(row.crops):
            left = GAP + column * (TILE.width + GAP)
            canvas[top : top + TILE.height, left : left + TILE.width] = fit(decode(crop.image), TILE)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
