"""The judge's reference: added and kept crops, and that it is a sample of all nights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_nights import add_night, end_of

from resight.errors import SiteError
from resight.training.curation.reference import add_to_reference
from resight.training.store.copying import copy_crops, open_all_splits
from resight.training.store.crops import open_store, write_store
from resight.training.store.links import read_links, write_links

NIGHTS = 4


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites of several runs, each with one held-out night, one training crop and links."""
    root = tmp_path_factory.mktemp("runs")
    add_night(root / "crops", 9, {"door": 1}, each=1)
    for night in range(NIGHTS):
        add_night(root / "crops", night, {"door": 6, "hall": 8}, each=2)
    whole = open_all_splits(root / "crops")
    for night in range(NIGHTS):
        rows = np.flatnonzero((whole.times_s < end_of(night)) & (whole.times_s > end_of(night - 1)))
        made = copy_crops(whole.subset([0, *rows]), root / f"site{night}")
        write_store(root / f"site{night}", made, ["train"] + ["gallery"] * len(rows))
        write_links(
            root / f"site{night}", [(made.paths[1], made.paths[-1], False), (made.paths[0], made.paths[1], True)]
        )
    return root


def test_only_held_out_crops_are_added(drawn: Path, tmp_path: Path) -> None:
    found = add_to_reference(drawn / "site0", tmp_path / "reference", most=1000)
    back, reference = open_store(drawn / "site0")["gallery"], open_all_splits(tmp_path / "reference")
    assert found == {"joined": 28, "left": 0, "crops": 28}
    assert set(reference.paths) == set(back.paths) and list(open_store(tmp_path / "reference")) == ["train"]
    assert [tuple(pair) for pair in read_links(tmp_path / "reference")] == [(back.paths[0], back.paths[-1], False)]
    assert sorted(reference.tracks) == sorted(back.tracks) and reference.read(3)


def test_adding_twice_changes_nothing_and_nights_accumulate(drawn: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    add_to_reference(drawn / "site0", reference, most=1000)
    inode = reference.stat().st_ino
    assert add_to_reference(drawn / "site0", reference, most=1000) == {"joined": 0, "left": 0, "crops": 28}
    assert reference.stat().st_ino == inode
    assert add_to_reference(drawn / "site1", reference, most=1000)["crops"] == 56 and len(read_links(reference)) == 2
    found = add_to_reference(drawn / "site2", reference, most=1000, before_s=end_of(0))
    assert found == {"joined": 28, "left": 28, "crops": 56} and (open_all_splits(reference).times_s > end_of(0)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_its_size_is_limited_by_complete_tracks_of_all_nights_and_cameras(drawn: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    for night in range(NIGHTS):
        before = set(open_all_splits(reference).paths) if night else set()
        found = add_to_reference(drawn / f"site{night}", reference, most=60)
        held = open_all_splits(reference)
        assert 50 < found["crops"] == len(held) <= 60 or night < 2
        if night > 2:
            assert len(before & set(held.paths)) > 30  # a night changes little
    _, sizes = np.unique(held.tracks, return_counts=True)
    assert set(sizes) == {2} and np.ptp(np.bincount(held.cameras)) <= 8
    assert len({path.split("/")[2] for path in held.paths}) >= 3
    other = tmp_path / "other"
    for night in (2, 0, 3, 1):  # the order of nights matters little, because ranks depend only on the track
        add_to_reference(drawn / f"site{night}", other, most=60)
    assert len(set(held.paths) & set(open_all_splits(other).paths)) > 30


def test_a_kill_between_the_two_renames_loses_nothing(drawn: Path, tmp_path: Path) -> None:
    add_to_reference(drawn / "site0", tmp_path / "reference", most=1000)
    (tmp_path / "reference").rename(tmp_path / ".reference.old")
    assert add_to_reference(drawn / "site1", tmp_path / "reference", most=1000)["crops"] == 56
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_a_run_without_held_out_crops_is_an_error(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "site0", tmp_path / "site")
    write_store(tmp_path / "site", open_store(tmp_path / "site")["train"], ["train"])
    with pytest.raises(SiteError, match="has no held-out crops"):
        add_to_reference(tmp_path / "site", tmp_path / "reference", most=10)
