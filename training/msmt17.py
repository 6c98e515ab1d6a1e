"""MSMT17 as its authors pack it (Wei et al., CVPR 2018): list files beside folders of crops.

    list_train.txt, list_val.txt, list_query.txt, list_gallery.txt   lines "0000/0000_000_01_0303morning_0008_0.jpg 0"
    train/, test/                                                   or mask_train_v2/, mask_test_v2/ (faces blurred)

A name's third field is the camera, 1 to 15. A re-packed MSMT17 in Market-1501's folders needs none of this.
"""

from __future__ import annotations

import re
from pathlib import Path

from resight.errors import SiteError

LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}
FOLDERS = {"train": ("train", "mask_train_v2"), "query": ("test", "mask_test_v2"), "gallery": ("test", "mask_test_v2")}
LINE = re.compile(r"^(?P<path>\S+\.(?:jpg|jpeg|png)) (?P<person>\d{1,9})$", re.IGNORECASE)
NAME = re.compile(r"^\d+_\d+_(?P<camera>\d{1,9})_")


def is_msmt17(root: Path) -> bool:
    """Whether the folder has the list of its training crops."""
    return (root / LISTS["train"][0]).is_file()


def read_lists(root: Path) -> dict[str, list[tuple[str, str, int]]]:
    """(path below the root, camera's name, person) of every crop of every split there is.

    Training takes both list_train and list_val, as every published protocol does. People count from 1: 0 stands for
    a stranger here, and is somebody in the lists.

    Raises:
        SiteError: a list or a folder is missing or cannot be read, or a line tells no crop, person and camera.
    """
    splits = {}
    for split, names in LISTS.items():
        present = [root / name for name in names if (root / name).is_file()]
        if present:
            folder = _folder(root, split)
            splits[split] = [row for path in present for row in _rows(path, folder)]
    return splits


def _folder(root: Path, split: str) -> str:
    """The folder a split's crops are in."""
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return name
    raise SiteError(f"{root} has MSMT17's lists and no folder {' or '.join(FOLDERS[split])}: unpack the crops there")


def _rows(path: Path, folder: str) -> list[tuple[str, str, int]]:
    """Crops of one list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} cannot be read ({error}): expected MSMT17's list of crops") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        told = LINE.match(line.strip())
        named = NAME.match(told["path"].rpartition("/")[2]) if told else None
        if line.strip() and (told is None or named is None):
            raise SiteError(
                f"{path}, line {number}: expected '0000/0000_000_01_0303morning_0008_0.jpg 0' (crop, whose name tells "
                f"its camera, and person), found {line[:80]!r}"
            )
        if told and named:
            rows.append((f"{folder}/{told['path']}", f"c{int(named['camera'])}", int(told["person"]) + 1))
    if not rows:
        raise SiteError(f"{path} lists no crop: expected lines such as '0000/0000_000_01_0303morning_0008_0.jpg 0'")
    return rows
