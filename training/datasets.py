"""Folders of crops as sites: a crop store, the Market-1501 layout, or one sub-folder a camera.

    crop store     index.parquet (docs/crop-store.md)
    Market-1501    bounding_box_train/, query/, bounding_box_test/ with names PPPP_cCsS_FFFFFF_BB.jpg or PPPP_cC...
    plain          CAMERA/anything.jpg, CAMERA/PERSON/anything.jpg, or names of Market-1501's pattern in one folder

Symbolic links are not followed; other files are passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resight.errors import SiteError
from resight.training.crops import UNKNOWN, CropStore, is_store, open_store

MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_NAME = re.compile(r"^(?P<person>-?\d+)_c(?P<camera>\d+)(?:s(?P<sequence>\d+)_(?P<frame>\d+))?")
JUNK_PERSON = -1  # Market-1501's boxes that show nobody; dropped everywhere, as every published protocol does
FRAMES_PER_S = 25.0  # Market-1501's cameras (Zheng et al., ICCV 2015)
SEQUENCE_S = 1_000_000.0  # sequences of a camera follow each other; their distance in time is not published
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUTS = (
    "expected a crop store (index.parquet), a Market-1501 folder (bounding_box_train, query, bounding_box_test), or "
    "one sub-folder of JPEG, PNG or WebP crops for each camera"
)


@dataclass(frozen=True)
class Site:
    """Crops to adapt to and, where people are known, crops to measure with; one numbering of cameras for all."""

    root: Path
    train: CropStore
    query: CropStore | None = None
    gallery: CropStore | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name


class _Row(NamedTuple):
    path: str
    camera: str
    time_s: float
    person: int


def open_site(root: Path) -> Site:
    """Recognise a folder's layout and read it.

    Raises:
        SiteError: missing, empty, a file, or no layout that is known; with what was expected and found.
        StoreError: it is a crop store, and a damaged one.
    """
    if not root.exists():
        raise SiteError(f"no site at {root}: {LAYOUTS}")
    if not root.is_dir():
        raise SiteError(f"{root} is a file: {LAYOUTS}")
    if is_store(root):
        return _from_splits(root, open_store(root))
    if (root / MARKET_FOLDERS["train"]).is_dir():
        rows = {split: _market_rows(root, folder) for split, folder in MARKET_FOLDERS.items() if (root / folder).is_dir()}
        return _from_splits(root, _stores(root, rows))
    return _plain_site(root)


def _from_splits(root: Path, splits: dict[str, CropStore]) -> Site:
    """A site, if there is something to adapt to."""
    if "train" not in splits:
        raise SiteError(f"{root} has no crops to adapt to: {LAYOUTS}")
    return Site(root, splits["train"], splits.get("query"), splits.get("gallery"))


def _images(root: Path, folder: str = ".") -> list[str]:
    """Relative paths of all image files below a folder, sorted, links left out."""
    found = []
    for parent, folders, files in os.walk(root / folder, followlinks=False):
        folders.sort()
        for name in sorted(files):
            path = Path(parent) / name
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return found


def _market_rows(root: Path, folder: str) -> list[_Row]:
    """Crops of one Market-1501 folder.

    Raises:
        SiteError: no image, or one whose name tells no person and camera.
    """
    rows = []
    for path in _images(root, folder):
        row = _market_row(path)
        if row is None:
            raise SiteError(
                f"{root / path}: expected a name such as 0002_c1s1_000451_03.jpg (person, camera, sequence, frame) in a "
                "Market-1501 folder: rename it, or use one sub-folder for each camera"
            )
        if row.person != JUNK_PERSON:
            rows.append(row)
    if not rows:
        raise SiteError(f"{root / folder} holds no usable crop: expected names such as 0002_c1s1_000451_03.jpg")
    return rows


def _market_row(path: str) -> _Row | None:
    """Person, camera and time from a Market-1501 or MSMT17 name."""
    match = MARKET_NAME.match(path.rpartition("/")[2])
    if match is None:
        return None
    time_s = np.nan
    if match["frame"] is not None:
        time_s = int(match["sequence"]) * SEQUENCE_S + int(match["frame"]) / FRAMES_PER_S
    return _Row(path, f"c{int(match['camera'])}", time_s, int(match["person"]))


def _plain_site(root: Path) -> Site:
    """One sub-folder a camera, people in sub-folders of those or unknown; or telling names in one folder."""
    images = _images(root)
    if not images:
        raise SiteError(f"{root} holds no JPEG, PNG or WebP file: {LAYOUTS}")
    rows = [_plain_row(root, path) for path in images]
    rows = [row for row in rows if row.person != JUNK_PERSON or "/" in row.path]
    numbers = {name: number for number, name in enumerate(sorted(_person_folders(rows)), start=1)}
    store = _stores(root, {"train": [_number_person(row, numbers) for row in rows]})["train"]
    query, gallery = _split_for_measuring(store)
    return Site(root, store, query, gallery)


def _plain_row(root: Path, path: str) -> _Row:
    """A crop of a plain folder; its person is still UNKNOWN where a sub-folder names it."""
    folder = path.split("/")[0]
    if "/" in path:
        return _Row(path, folder, np.nan, UNKNOWN)
    row = _market_row(path)
    if row is None:
        raise SiteError(
            f"{root / path} does not tell its camera: put the crops of each camera into a sub-folder of its own (a site "
            "with one camera has one sub-folder), or use names such as 0002_c1s1_000451_03.jpg"
        )
    return row


def _person_folders(rows: Sequence[_Row]) -> set[str]:
    """Names of the folders between camera and file; none when some crops have no such folder."""
    nested = [row.path.split("/")[1] for row in rows if row.path.count("/") >= 2]
    return set(nested) if len(nested) == len(rows) else set()


def _number_person(row: _Row, numbers: dict[str, int]) -> _Row:
    """Put a person's number in the place of the folder's name."""
    parts = row.path.split("/")
    return row._replace(person=numbers[parts[1]]) if len(parts) >= 3 and parts[1] in numbers else row


def _split_for_measuring(store: CropStore) -> tuple[CropStore | None, CropStore | None]:
    """First crop of each (person, camera) as query where another camera has the person, the rest as gallery."""
    if not store.has_persons or len(store.camera_names) < 2:
        return None, None
    keys = np.stack([store.persons, store.cameras], 1)
    pairs, first = np.unique(keys, axis=0, return_index=True)
    cameras_of = dict(zip(*np.unique(pairs[:, 0], return_counts=True), strict=True))
    query = np.sort([row for row, (person, _) in zip(first, pairs, strict=True) if person > 0 and cameras_of[person] > 1])
    gallery = np.setdiff1d(np.arange(len(store)), query)
    if not len(query) or not len(gallery):
        return None, None
    return store.subset(query), store.subset(gallery)


def _stores(root: Path, rows: dict[str, list[_Row]]) -> dict[str, CropStore]:
    """Columns of each split, cameras numbered once over all of them."""
    names = sorted({row.camera for split in rows.values() for row in split}, key=_natural)
    number = {name: index for index, name in enumerate(names)}
    return {
        split: CropStore(
            root,
            tuple(row.path for row in part),
            np.array([number[row.camera] for row in part], np.int64),
            tuple(names),
            np.array([row.time_s for row in part], np.float64),
            np.full(len(part), UNKNOWN, np.int64),
            np.array([row.person for row in part], np.int64),
        )
        for split, part in rows.items()
    }


def _natural(name: str) -> tuple[str | int, ...]:
    """c2 before c10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))
