"""MSMT17 in its original layout, with generated folders and lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resight.errors import SiteError, StoreError
from resight.training.store.datasets import open_site

LINES = {
    "list_train.txt": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0000/0000_001_15_0302noon_1_1.jpg 0"],
    "list_val.txt": ["0001/0001_000_05_0303morning_0008_0.jpg 1"],
    "list_query.txt": ["0000/0000_003_02_0303morning_0008_0.jpg 0"],
    "list_gallery.txt": ["0000/0000_004_15_0303morning_0008_0.jpg 0", "0001/0001_000_02_0303morning_0008_0.jpg 1"],
}


def pack(root: Path, train: str = "train", test: str = "test") -> Path:
    for name, lines in LINES.items():
        folder = root / (train if name in ("list_train.txt", "list_val.txt") else test)
        for line in lines:
            crop = folder / line.split()[0]
            crop.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 64)).save(crop)
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_versions_are_read_train_and_val_as_one(tmp_path: Path, folders: tuple[str, str]) -> None:
    site = open_site(pack(tmp_path / "msmt", *folders))
    assert site.train.camera_names == ("c1", "c2", "c5", "c15")  # one numbering for all splits
    assert site.train.cameras.tolist() == [0, 3, 2] and site.train.persons.tolist() == [1, 1, 2]
    assert site.query is not None and site.gallery is not None
    assert site.query.persons.tolist() == [1] and site.gallery.persons.tolist() == [1, 2]
    assert np.isnan(site.train.times_s).all()
    assert site.train.paths[0] == f"{folders[0]}/0000/0000_000_01_0303morning_0008_0.jpg"
    assert site.train.read(0)[:2] == b"\xff\xd8"


def test_query_and_gallery_are_optional(tmp_path: Path) -> None:
    root = pack(tmp_path)
    (root / "list_query.txt").unlink()
    (root / "list_gallery.txt").unlink()
    (root / "list_val.txt").unlink()
    site = open_site(root)
    assert len(site.train) == 2 and site.query is None and site.gallery is None


@pytest.mark.parametrize(
    "line", ["0000/0000_000_01_x.jpg", "0000/0000_000_01_x.jpg zero", "0000/nobody.jpg 0", "0000/0_1_1_x.txt 0"]
)
def test_an_incomplete_line_is_named(tmp_path: Path, line: str) -> None:
    root = pack(tmp_path)
    (root / "list_train.txt").write_text(LINES["list_train.txt"][0] + "\n" + line + "\n")
    with pytest.raises(SiteError, match="line 2: expected"):
        open_site(root)


def test_empty_lists_missing_folders_and_foreign_bytes_are_refused(tmp_path: Path) -> None:
    root = pack(tmp_path)
    (root / "list_train.txt").write_text("\n")
    with pytest.raises(SiteError, match="lists no crop"):
        open_site(root)
    (root / "list_train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SiteError, match="cannot be read"):
        open_site(root)
    (root / "list_train.txt").write_text(LINES["list_train.txt"][0])
    (root / "train").rename(root / "elsewhere")
    with pytest.raises(SiteError, match="no folder train or mask_train_v2"):
        open_site(root)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    root = pack(tmp_path / "msmt")
    (root / "list_train.txt").write_text("../../0000_000_01_x.jpg 0\n")
    with pytest.raises(StoreError):
        open_site(root)
