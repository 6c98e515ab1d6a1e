"""Growing store: complete tracks with unique numbers, consistent files and rows, other folders unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import jpeg

from resight.errors import StoreError
from resight.training.store.crops import UNKNOWN, open_store
from resight.training.store.growing import GrowingStore, NewCrop, NewTrack


def track(name: str, count: int = 2, *, camera: str = "door", **more) -> NewTrack:
    crops = [NewCrop(f"crops/{camera}/{name}/{number}.jpg", jpeg(1, number), 10.0 + number) for number in range(count)]
    return NewTrack(camera, crops, **more)


def test_tracks_are_added_completely_and_numbered_consecutively(tmp_path: Path) -> None:
    store = GrowingStore(tmp_path / "s")
    assert store.add([]) == [] and open_store(tmp_path / "s") == {}
    assert store.add([track("a"), track("b", 3, camera="hall")]) == [0, 1]
    assert store.add([track("a"), track("c"), track("d", numbered=False), track("e", number=9)]) == [None, 10, None, 9]
    assert GrowingStore(tmp_path / "s").add([track("f")]) == [11]
    found = open_store(tmp_path / "s")["train"]
    assert found.camera_names == ("door", "hall") and len(found) == 13
    assert found.tracks.tolist() == [0, 0, 1, 1, 1, 10, 10, UNKNOWN, UNKNOWN, 9, 9, 11, 11]
    assert found.read(2) == jpeg(1, 0) and found.times_s[3] == 11.0


def test_crops_are_removed_with_their_files_and_unlisted_files_are_swept(tmp_path: Path) -> None:
    store = GrowingStore(tmp_path)
    store.add([track("a"), track("b")])
    assert store.remove(lambda path: "/a/" in path) == 2
    assert not (tmp_path / "crops/door/a/0.jpg").exists()
    (tmp_path / "crops/door/b/stray.jpg").write_bytes(b"left by a kill")
    (tmp_path / "crops/door/bb").mkdir()
    (tmp_path / "crops/door/bb/other.jpg").write_bytes(b"another source's")
    assert store.sweep("crops/door/b") == 1 and store.sweep("crops/door/a") == 0
    assert sorted(path.name for path in (tmp_path / "crops/door").iterdir()) == ["b", "bb"]
    assert [row["path"][-5:] for row in store.rows("crops/door/b")] == ["0.jpg", "1.jpg"]
    assert store.rows("crops/door/b")[1] | {"path": ""} == {"path": "", "camera": "door", "time_s": 11.0, "track": 1}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(StoreError, match="is not a crop store and not empty"):
        GrowingStore(tmp_path)
    with pytest.raises(StoreError, match="is not a crop store"):
        GrowingStore(tmp_path / "thesis.txt")


@pytest.mark.parametrize("path", ["../a.jpg", "/a.jpg", "crops/../../a.jpg"])
def test_paths_outside_the_store_are_refused(tmp_path: Path, path: str) -> None:
    store = GrowingStore(tmp_path / "s")
    with pytest.raises(StoreError, match="leaves the store"):
        store.add([NewTrack("door", [NewCrop(path, b"x", None)])])
    assert not (tmp_path / "a.jpg").exists()


def test_a_damaged_index_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    store = GrowingStore(tmp_path)
    store.add([track("a")])
    (tmp_path / "index.parquet").write_bytes(b"no table")
    with pytest.raises(StoreError, match="is damaged"):
        store.add([track("b")])
    assert not (tmp_path / "crops/door/b").exists()
