"""Retention: rows, files and links are removed together, and the next purge completes an interrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_nights import add_night, end_of

from resight.errors import StoreError
from resight.training.store.copying import open_all_splits
from resight.training.store.crops import open_store
from resight.training.store.growing import PURGE_FILE, GrowingStore, NewCrop, NewTrack, purge
from resight.training.store.links import read_links, write_links


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nights") / "crops"
    for night in range(2):
        add_night(root, night, {"door": 2, "hall": 3}, each=2)
    paths = open_all_splits(root).paths
    write_links(root, [(paths[0], paths[1], True), (paths[1], paths[-1], False), (paths[-1], paths[-2], True)])
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "crops")
    return tmp_path / "crops"


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*.jpg")}


def test_old_crops_are_removed_with_files_and_links(root: Path) -> None:
    before = open_all_splits(root)
    old = before.times_s < end_of(0)
    assert purge(root, end_of(0)) == int(old.sum()) == 10
    after = open_all_splits(root)
    assert after.paths == before.subset(np.flatnonzero(~old)).paths and files(root) == set(after.paths)
    assert after.tracks.tolist() == before.tracks[~old].tolist()
    assert [tuple(pair) for pair in read_links(root)] == [(before.paths[-1], before.paths[-2], True)]
    assert not (root / "crops" / "door" / "0").exists() and not (root / PURGE_FILE).exists()
    assert purge(root, end_of(0)) == 0
    assert purge(root, end_of(5)) == 10 and open_store(root) == {} and files(root) == set()
    assert purge(root, end_of(5)) == 0 and purge(root.parent / "nowhere", end_of(5)) == 0


def test_crops_removed_from_the_source_are_removed_from_the_reference(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "reference")
    erased = open_all_splits(root).paths[3]
    GrowingStore(root).remove(lambda path: path == erased)
    assert purge(tmp_path / "reference", 0.0) == 0
    assert purge(tmp_path / "reference", 0.0, source=tmp_path / "nowhere") == 0
    assert purge(tmp_path / "reference", 0.0, source=root) == 1
    assert erased not in open_all_splits(tmp_path / "reference").paths and erased not in files(tmp_path / "reference")


def test_files_remain_in_stores_that_share_them(root: Path, tmp_path: Path) -> None:
    path = open_all_splits(root).paths[0]
    os.link(root / path, tmp_path / "shared.jpg")
    purge(root, end_of(5))
    assert (tmp_path / "shared.jpg").stat().st_size > 0


def test_crops_without_a_time_use_the_time_of_their_file(tmp_path: Path) -> None:
    store = GrowingStore(tmp_path)
    store.add([NewTrack("door", [NewCrop("crops/old.jpg", b"x", None), NewCrop("crops/new.jpg", b"x", None)])])
    os.utime(tmp_path / "crops" / "old.jpg", (end_of(0), end_of(0)))
    assert purge(tmp_path, end_of(1)) == 1 and open_all_splits(tmp_path).paths == ("crops/new.jpg",)


def die_at(step: int, root: Path) -> None:
    """Purge in a child process that kills itself before its n-th file system change."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    left = iter(range(step))

    def killing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in ("unlink", "replace", "rmdir"):
        setattr(Path, name, killing(getattr(Path, name)))
    purge(root, end_of(0))
    os._exit(0)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 12, 15])
def test_the_next_purge_completes_one_killed_at_any_step(root: Path, steps: int) -> None:
    whole = open_all_splits(root)
    young = {path for path, time_s in zip(whole.paths, whole.times_s, strict=True) if time_s > end_of(0)}
    die_at(steps, root)
    assert young <= set(open_all_splits(root).paths)
    purge(root, end_of(0))
    assert set(open_all_splits(root).paths) == young == files(root) and not (root / PURGE_FILE).exists()


def test_a_purge_list_that_is_damaged_or_leaves_the_store_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"x")
    (root / PURGE_FILE).write_text(json.dumps(["../mine.jpg"]))
    with pytest.raises(StoreError, match="leaves the store"):
        purge(root, 0.0)
    assert (tmp_path / "mine.jpg").exists()
    (root / PURGE_FILE).write_text("[")
    with pytest.raises(StoreError, match="is damaged"):
        purge(root, 0.0)
