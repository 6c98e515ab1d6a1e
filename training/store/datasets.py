"""Reading folders of crops as sites: a crop store, the layouts of Market-1501 and MSMT17, or a sub-folder per camera.

    crop store     index.parquet (docs/crop-store.md)
    Market-1501    bounding_box_train/, query/, bounding_box_test/ with names PPPP_cCsS_FFFFFF_BB.jpg or PPPP_cC...
    MSMT17         list_train.txt, list_val.txt, list_query.txt, list_gallery.txt with lines
                   "0000/0000_000_01_0303morning_0008_0.jpg 0", and the folders train/ and test/, or mask_train_v2/ and
                   mask_test_v2/ (faces blurred) (Wei et al., CVPR 2018). The third field of a name is the camera, 1 to
                   15. MSMT17 re-packed in Market-1501's folders is read as Market-1501.
    plain          CAMERA/anything.jpg, CAMERA/PERSON/anything.jpg, or Market-1501 names in one folder

Symbolic links are not followed; hidden files and folders and other kinds of files are ignored.

`open_site(..., tracks_from_names=True)` adds the tracks of a perfect tracker, derived from person, camera and time in
the file names. It serves only to evaluate the judge, since a real site has no person labels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Ints
from resight.errors import SiteError
from resight.training.store.crops import (
    COLUMNS,
    SPLITS,
    UNKNOWN,
    CropStore,
    camera_order,
    is_store,
    open_store,
)

MSMT17_LISTS = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
MSMT17_FOLDERS = {
    "train": ("train", "mask_train_v2"),
    "query": ("test", "mask_test_v2"),
    "gallery": ("test", "mask_test_v2"),
}
MSMT17_LINE = re.compile(r"^(?P<path>\S+\.(?:jpg|jpeg|png)) (?P<person>\d{1,9})$", re.IGNORECASE)
MSMT17_NAME = re.compile(r"^\d+_\d+_(?P<camera>\d{1,9})_")


def is_msmt17(root: Path) -> bool:
    """Whether the folder has the list of its training crops."""
    return (root / MSMT17_LISTS["train"][0]).is_file()


def read_msmt17_lists(root: Path) -> dict[str, list[tuple[str, str, int]]]:
    """(path relative to the root, camera name, person) of every crop of every existing split.

    Training uses both list_train and list_val, as in every published protocol. Persons are numbered from 1, because 0
    is a normal person in the lists and an unknown one here.

    Raises:
        SiteError: a list or a folder is missing or cannot be read, or a line has no crop, person and camera.
    """
    splits = {}
    for split, names in MSMT17_LISTS.items():
        present = [root / name for name in names if (root / name).is_file()]
        if present:
            folder = _msmt17_folder(root, split)
            splits[split] = [row for path in present for row in _msmt17_rows(path, folder)]
    return splits


def _msmt17_folder(root: Path, split: str) -> str:
    """The folder with the crops of a split."""
    for name in MSMT17_FOLDERS[split]:
        if (root / name).is_dir():
            return name
    raise SiteError(
        f"{root} has MSMT17's lists but no folder {' or '.join(MSMT17_FOLDERS[split])}: unpack the crops there"
    )


def _msmt17_rows(path: Path, folder: str) -> list[tuple[str, str, int]]:
    """Crops of one list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} cannot be read ({error}): expected MSMT17's list of crops") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        parsed = MSMT17_LINE.match(line.strip())
        named = MSMT17_NAME.match(parsed["path"].rpartition("/")[2]) if parsed else None
        if line.strip() and (parsed is None or named is None):
            raise SiteError(
                f"{path}, line {number}: expected '0000/0000_000_01_0303morning_0008_0.jpg 0' (crop, with the "
                f"camera in its name, and person), found {line[:80]!r}"
            )
        if parsed and named:
            rows.append((f"{folder}/{parsed['path']}", f"c{int(named['camera'])}", int(parsed["person"]) + 1))
    if not rows:
        raise SiteError(f"{path} lists no crop: expected lines such as '0000/0000_000_01_0303morning_0008_0.jpg 0'")
    return rows


PASSAGE_GAP_S = 10.0  # crops of one person and camera further apart are two passages, as a tracker would drop them


def number_passages(persons: Ints, cameras: Ints, times_s: NDArray[np.float64]) -> Ints:
    """Number the passages: sequences of crops of one person and camera with gaps of at most `PASSAGE_GAP_S`.

    Args:
        persons: int64 (N,); values up to 0 are no person.
        cameras: int64 (N,).
        times_s: float64 (N,), NaN where unknown; sequences are far apart (`SEQUENCE_S`).

    Returns:
        int64 (N,), from 0, -1 where person or time is unknown.
    """
    known = np.flatnonzero((persons > 0) & np.isfinite(times_s))
    order = known[np.lexsort((times_s[known], cameras[known], persons[known]))]
    new = (np.diff(persons[order]) != 0) | (np.diff(cameras[order]) != 0) | (np.diff(times_s[order]) > PASSAGE_GAP_S)
    numbers = np.full(len(persons), UNKNOWN, np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(new)])[: len(order)]
    return numbers


MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_NAME = re.compile(
    r"^(?P<person>-1|\d{1,18})_c(?P<camera>\d{1,9})(?:s(?P<sequence>\d{1,9})(?:_(?P<frame>\d{1,9}))?)?(?![0-9A-Za-z])"
)
JUNK_PERSON = -1  # Market-1501's boxes without a person; dropped everywhere, as in every published protocol
FRAMES_PER_S = 25.0  # Market-1501's cameras (Zheng et al., ICCV 2015)
SEQUENCE_S = 1_000_000.0  # distance between the sequences of a camera; the real one is not published
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
EXPECTED_LAYOUTS = (
    "expected a crop store (index.parquet), a Market-1501 folder (bounding_box_train, query, bounding_box_test), an "
    "MSMT17 folder (list_train.txt), or one sub-folder of JPEG, PNG or WebP crops per camera"
)


@dataclass(frozen=True, eq=False)
class Site:
    """Crops for adaptation and, if persons are known, crops for evaluation; all share one numbering of cameras.

    Attributes:
        root: the site's folder.
        train: crops for adaptation.
        query: query crops; None if persons are unknown or there is only one camera. In a plain folder they are also in
            ``train``, so metrics compare models but do not measure generalisation to new people.
        gallery: gallery crops, disjoint from ``query``.
    """

    root: Path
    train: CropStore
    query: CropStore | None = None
    gallery: CropStore | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name


class _CropRow(NamedTuple):
    path: str
    camera: str
    time_s: float
    person: int


def open_site(root: Path, *, tracks_from_names: bool = False) -> Site:
    """Recognise a folder's layout and read it.

    Args:
        root: the folder.
        tracks_from_names: derive tracks from persons and times (`number_passages`), to evaluate a judge that relies on
            tracks. It uses person labels, so metrics of such a site are not label-free.

    Raises:
        SiteError: the folder is missing, empty, a file or of no known layout; or tracks are requested, but the names
            have no person and frame.
        StoreError: it is a damaged crop store.
    """
    site = _open_layout(root)
    return _with_passages(site) if tracks_from_names else site


def _open_layout(root: Path) -> Site:
    """Read a site without derived tracks."""
    if not root.exists():
        raise SiteError(f"no site at {root}: {EXPECTED_LAYOUTS}")
    if not root.is_dir():
        raise SiteError(f"{root} is a file: {EXPECTED_LAYOUTS}")
    if is_store(root):
        return _from_splits(root, open_store(root))
    if (root / MARKET_FOLDERS["train"]).is_dir():
        folders = {split: folder for split, folder in MARKET_FOLDERS.items() if (root / folder).is_dir()}
        rows = {split: _market_rows(root, folder) for split, folder in folders.items()}
        return _from_splits(root, _stores(root, rows))
    if is_msmt17(root):
        listed = read_msmt17_lists(root).items()
        rows = {
            split: [_CropRow(path, camera, np.nan, person) for path, camera, person in found] for split, found in listed
        }
        return _from_splits(root, _stores(root, rows))
    return _plain_site(root)


def _with_passages(site: Site) -> Site:
    """The site with tracks numbered over all splits, because a passage can be split between query and gallery."""
    splits = {name: part for name in SPLITS if (part := getattr(site, name)) is not None}
    columns = ("persons", "cameras", "times_s")
    tracks = number_passages(*(np.concatenate([getattr(part, name) for part in splits.values()]) for name in columns))
    if (tracks == UNKNOWN).all():
        raise SiteError(
            f"{site.root} has no crop with person and time: to derive tracks from names, expected names such as "
            "0002_c1s1_000451_03.jpg"
        )
    parts = np.split(tracks, np.cumsum([len(part) for part in splits.values()])[:-1])
    with_tracks = {name: replace(part, tracks=own) for (name, part), own in zip(splits.items(), parts, strict=True)}
    return replace(site, **with_tracks)


def _from_splits(root: Path, splits: dict[str, CropStore]) -> Site:
    """A site from its splits; refuses one without training crops."""
    if "train" not in splits:
        raise SiteError(f"{root} has no crops to adapt to: {EXPECTED_LAYOUTS}")
    return Site(root, splits["train"], splits.get("query"), splits.get("gallery"))


def _images(root: Path, folder: str = ".") -> list[str]:
    """Relative paths of all image files below a folder, sorted, without hidden files and links.

    Raises:
        SiteError: a folder is a link or cannot be listed.
    """
    if folder != "." and (root / folder).is_symlink():
        raise SiteError(f"{root / folder} is a link, and links are not followed: use the real folder as the site")
    found = []
    for parent, folders, files in os.walk(root / folder, onerror=_refuse_unlisted):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent) / name
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return found


def _refuse_unlisted(error: OSError) -> None:
    """Raise instead of skipping a folder, which would silently drop a camera."""
    raise SiteError(f"{error.filename} cannot be listed ({error.strerror}): grant read permission") from error


def _market_rows(root: Path, folder: str) -> list[_CropRow]:
    """Crops of one Market-1501 folder.

    Raises:
        SiteError: no image, or a name without person and camera.
    """
    rows = []
    for path in _images(root, folder):
        row = _market_row(path)
        if row is None:
            raise SiteError(
                f"{root / path}: expected a name such as 0002_c1s1_000451_03.jpg (person, camera, sequence, frame) in "
                "a Market-1501 folder: rename it, or use one sub-folder per camera"
            )
        if row.person != JUNK_PERSON:
            rows.append(row)
    if not rows:
        raise SiteError(f"{root / folder} has no usable crop: expected names such as 0002_c1s1_000451_03.jpg")
    return rows


def _market_row(path: str) -> _CropRow | None:
    """Person, camera and time from a Market-1501 or MSMT17 name."""
    match = MARKET_NAME.match(path.rpartition("/")[2])
    if match is None:
        return None
    time_s = np.nan
    if match["frame"] is not None:  # never without a sequence
        time_s = int(match["sequence"]) * SEQUENCE_S + int(match["frame"]) / FRAMES_PER_S
    return _CropRow(path, f"c{int(match['camera'])}", time_s, int(match["person"]))


def _plain_site(root: Path) -> Site:
    """One sub-folder per camera, with optional sub-folders per person; or Market-1501 names in one folder."""
    images = _images(root)
    if not images:
        raise SiteError(f"{root} has no JPEG, PNG or WebP file: {EXPECTED_LAYOUTS}")
    rows = [_plain_row(root, path) for path in images]
    rows = [row for row in rows if row.person != JUNK_PERSON or "/" in row.path]  # in sub-folders -1 means UNKNOWN
    if not rows:
        raise SiteError(f"all {len(images)} crops of {root} are marked as junk (person -1): expected crops of people")
    numbers = {name: number for number, name in enumerate(sorted(_person_folders(rows)), start=1)}
    store = _stores(root, {"train": [_number_person(row, numbers) for row in rows]})["train"]
    query, gallery = _query_gallery_split(store)
    return Site(root, store, query, gallery)


def _plain_row(root: Path, path: str) -> _CropRow:
    """A crop of a plain folder; a person given by a sub-folder is still UNKNOWN."""
    folder = path.split("/")[0]
    if "/" in path:
        return _CropRow(path, folder, np.nan, UNKNOWN)
    row = _market_row(path)
    if row is None:
        raise SiteError(
            f"{root / path} has no camera: put the crops of each camera into a separate sub-folder (one sub-folder "
            "for a site with one camera), or use names such as 0002_c1s1_000451_03.jpg"
        )
    return row


def _person_folders(rows: Sequence[_CropRow]) -> set[str]:
    """Names of the folders between camera and file; empty if some crops have no such folder."""
    nested = [row.path.split("/")[1] for row in rows if row.path.count("/") >= 2]
    return set(nested) if len(nested) == len(rows) else set()


def _number_person(row: _CropRow, numbers: dict[str, int]) -> _CropRow:
    """Set the person's number from the name of its folder."""
    parts = row.path.split("/")
    return row._replace(person=numbers[parts[1]]) if len(parts) >= 3 and parts[1] in numbers else row


def _query_gallery_split(store: CropStore) -> tuple[CropStore | None, CropStore | None]:
    """Query and gallery of a folder without such a split; None if persons are unknown or there is one camera.

    For a person seen by several cameras, the first crop of each camera with several crops is a query, or only the
    first crop if every camera has one. So each query has a match in the gallery.
    """
    if not store.has_persons or len(store.camera_names) < 2:
        return None, None
    pairs, first, counts = np.unique(
        np.stack([store.persons, store.cameras], 1), axis=0, return_index=True, return_counts=True
    )
    query: list[int] = []
    for person in np.unique(pairs[pairs[:, 0] > 0, 0]):  # 0 matches no query
        own = pairs[:, 0] == person
        if own.sum() > 1:
            several = first[own & (counts > 1)]
            query.extend(several if len(several) else [first[own].min()])
    if not query:
        return None, None
    query.sort()
    return store.subset(query), store.subset(np.setdiff1d(np.arange(len(store)), query))


def _stores(root: Path, rows: dict[str, list[_CropRow]]) -> dict[str, CropStore]:
    """A store for each split, with cameras numbered over all splits."""
    names = sorted({row.camera for split in rows.values() for row in split}, key=camera_order)
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


def held_out_crops(site: Site) -> CropStore | None:
    """The crops of tracks held out from adaptation: a gallery without queries; None if there are none."""
    return site.gallery if site.query is None else None


def join_splits(site: Site) -> CropStore:
    """All crops of a site in one store, because a track can be split between query and gallery."""
    parts = [part for part in (site.train, site.query, site.gallery) if part is not None]
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    joined = replace(site.train, paths=tuple(path for part in parts for path in part.paths), **columns)
    _, first = np.unique(joined.paths, return_index=True)  # in a plain folder queries are also training crops
    return joined.subset(np.sort(first))
