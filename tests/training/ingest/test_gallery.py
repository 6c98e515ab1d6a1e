"""Synchronising a collection: new, unchanged, changed and removed crops, links, and unusual names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from serving import jpeg

from resight.training.ingest.gallery import (
    BATCH,
    EntryCrops,
    collection_folder,
    forget_gallery,
    sync_gallery,
)
from resight.training.store.crops import UNKNOWN, CropStore, open_store
from resight.training.store.growing import GrowingStore, NewCrop, NewTrack
from resight.training.store.links import read_links, write_links

ENTRIES = [
    EntryCrops("a1", "door", "t1", 10.0, [jpeg(1, 0), jpeg(1, 1)]),
    EntryCrops("a2", "door", "t1", 11.0, [jpeg(1, 2)]),
    EntryCrops("b", "hall", "t1", 12.0, [jpeg(2)]),
    EntryCrops("c", "", "", None, [jpeg(3)]),
    EntryCrops("d", "", "", None, [jpeg(4)]),
]


@pytest.fixture
def store(tmp_path: Path) -> GrowingStore:
    """A store with a track of footage."""
    made = GrowingStore(tmp_path / "s")
    made.add(
        [
            NewTrack(
                "door", [NewCrop("crops/door/x/0.jpg", jpeg(9), 1.0), NewCrop("crops/door/x/1.jpg", jpeg(9, 1), 2.0)]
            )
        ]
    )
    return made


def train(store: GrowingStore) -> CropStore:
    found = open_store(store.root)["train"]
    files = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*.jpg") if path.is_file()}
    assert files == set(found.paths)
    return found


def test_entries_become_rows_with_camera_time_and_track(store: GrowingStore) -> None:
    counts = sync_gallery(store, "lobby", ENTRIES, [("a1", "b", True), ("c", "d", False), ("a1", "gone", True)])
    assert (counts.entries, counts.crops, counts.added, counts.confirmed, counts.rejected) == (5, 6, 6, 1, 1)
    found = train(store)
    rows = {path: row for row, path in enumerate(found.paths) if path.startswith("gallery/lobby/")}
    assert [path.removeprefix("gallery/lobby/") for path in rows] == [
        "a1_00.jpg",
        "a1_01.jpg",
        "a2_00.jpg",
        "b_00.jpg",
        "c_00.jpg",
        "d_00.jpg",
    ]
    tracks = [int(found.tracks[row]) for row in rows.values()]
    assert tracks == [1, 1, 1, 2, UNKNOWN, UNKNOWN]  # one number per track of one camera, after that of the footage
    assert [found.camera_names[found.cameras[row]] for row in rows.values()] == ["door"] * 3 + [
        "hall",
        "gallery",
        "gallery",
    ]
    assert found.times_s[rows["gallery/lobby/a2_00.jpg"]] == 11.0
    assert found.read(rows["gallery/lobby/b_00.jpg"]) == jpeg(2)
    assert {tuple(pair) for pair in read_links(store.root)} == {
        ("gallery/lobby/a1_00.jpg", "gallery/lobby/b_00.jpg", True),
        ("gallery/lobby/c_00.jpg", "gallery/lobby/d_00.jpg", False),
    }


def test_synchronising_again_changes_nothing(store: GrowingStore) -> None:
    sync_gallery(store, "lobby", ENTRIES, [])
    before = (store.root / "index.parquet").read_bytes()
    counts = sync_gallery(store, "lobby", ENTRIES, [])
    assert (counts.added, counts.changed, counts.removed) == (0, 0, 0)
    assert (store.root / "index.parquet").read_bytes() == before


def test_changed_crops_are_replaced_and_new_entries_join_their_tracks(store: GrowingStore) -> None:
    sync_gallery(store, "lobby", ENTRIES, [])
    changed = [
        replace(ENTRIES[0], images=[jpeg(1, 0), jpeg(1, 7)]),  # another image
        replace(ENTRIES[1], time_s=99.0),
        replace(ENTRIES[2], camera="yard"),
        replace(ENTRIES[3], track="t9"),
        ENTRIES[4],
        EntryCrops("a3", "door", "t1", 13.0, [jpeg(1, 3)]),
    ]
    counts = sync_gallery(store, "lobby", changed, [])
    assert (counts.added, counts.changed, counts.removed) == (1, 4, 0)
    found = train(store)
    of = {path[14:]: row for row, path in enumerate(found.paths) if path.startswith("gallery")}
    assert found.read(of["a1_01.jpg"]) == jpeg(1, 7) and found.times_s[of["a2_00.jpg"]] == 99.0
    assert {int(found.tracks[of[name]]) for name in ("a1_00.jpg", "a1_01.jpg", "a2_00.jpg", "a3_00.jpg")} == {1}
    assert found.camera_names[found.cameras[of["b_00.jpg"]]] == "yard" and found.tracks[of["c_00.jpg"]] > 1


def test_entries_deleted_in_the_service_are_removed(store: GrowingStore) -> None:
    sync_gallery(store, "lobby", ENTRIES, [("a1", "b", True), ("c", "d", False)])
    sync_gallery(store, "yard", [EntryCrops("a1", "door", "", 1.0, [jpeg(5)])], [])
    write_links(store.root, [*read_links(store.root), ("crops/door/x/0.jpg", "crops/door/x/1.jpg", True)])
    counts = sync_gallery(store, "lobby", ENTRIES[1:4], [("c", "d", False)])
    assert counts.removed == 3
    found = train(store)
    assert not any(path.startswith(("gallery/lobby/a1", "gallery/lobby/d")) for path in found.paths)
    assert "gallery/yard/a1_00.jpg" in found.paths and len(found) == 6
    assert [tuple(pair) for pair in read_links(store.root)] == [("crops/door/x/0.jpg", "crops/door/x/1.jpg", True)]
    assert forget_gallery(store, "lobby") == 3
    assert not (store.root / collection_folder("lobby")).exists() and len(train(store)) == 3


def test_an_interrupted_stream_removes_nothing_and_keeps_received_entries(store: GrowingStore) -> None:
    sync_gallery(store, "lobby", ENTRIES[:2], [])
    many = [
        EntryCrops(f"m{number}", "door", f"m{number // 3}", float(number), [jpeg(number)]) for number in range(BATCH)
    ]

    def breaks() -> Iterator[EntryCrops]:
        yield from many
        raise ConnectionError("the server went away")

    with pytest.raises(ConnectionError):
        sync_gallery(store, "lobby", breaks(), [])
    assert len(train(store)) == 2 + 3 + BATCH
    counts = sync_gallery(store, "lobby", [*ENTRIES, *many], [])
    found = train(store)
    assert (counts.added, counts.removed) == (3, 0)
    tracks = {}
    for row, path in enumerate(found.paths):
        if path.startswith("gallery/lobby/m"):
            tracks.setdefault(int(path[15:-7]) // 3, set()).add(int(found.tracks[row]))
    assert all(len(numbers) == 1 for numbers in tracks.values())
    assert len(set().union(*tracks.values())) == len(tracks)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", ".", "..", ".hidden", "x" * 128, "ü" * 128, "a\\b", "a b", "0001.jpg", "%2E"]
)
def test_unusual_ids_become_distinct_files(store: GrowingStore, name: str) -> None:
    entries = [EntryCrops(name, "door", name, 1.0, [jpeg(1)]), EntryCrops(f"{name}'", "door", "", 1.0, [jpeg(2)])]
    assert sync_gallery(store, name, entries, [(name, f"{name}'", False)]).added == 2
    found = train(store)
    assert len(found) == 4 and len(read_links(store.root)) == 1
    assert all(not Path(path).name.startswith(".") and len(Path(path).name.encode()) < 255 for path in found.paths)
    assert sync_gallery(store, name, entries, []).added == 0


def test_invalid_images_are_refused_and_counted(store: GrowingStore) -> None:
    entries = [
        EntryCrops("a", "door", "", 1.0, [b"no image", jpeg(1)[:200], jpeg(1)]),
        EntryCrops("b", "door", "", 1.0, [b""]),
    ]
    counts = sync_gallery(store, "lobby", entries, [])
    assert (counts.entries, counts.refused, counts.added) == (2, 3, 1)
    assert "gallery/lobby/a_02.jpg" in train(store).paths
