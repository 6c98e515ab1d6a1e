"""Ingesting footage: results, kills at every step, repetition, full disks and concurrent processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ingesting
import numpy as np
import pytest
from ingesting import read
from tiny import environment
from walkers import CROSSING, START_S, Walker, write_boxes, write_film

from resight.errors import FootageError, StorageFullError, StoreError
from resight.image import decode
from resight.training.ingest import pipeline as module
from resight.training.ingest.boxes import BoxFile
from resight.training.ingest.pipeline import IngestCounts, IngestJournal, SourceResult, ingest
from resight.training.ingest.sources import open_footage
from resight.training.store import growing
from resight.training.store.crops import CropStore, open_store
from resight.training.store.growing import GrowingStore, storage_full_as_error

pytestmark = pytest.mark.long

# 48 s: two who cross, frames without people, and from frame 85 on at least one person.
DAY = (*CROSSING, *(Walker(85 + 22 * n, 113 + 22 * n, 10, 250, top=40 + 8 * n) for n in range(6)))
FRAMES = 240
FIRST_BUSY = 85
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("day")
    write_film(folder / "door.mp4", DAY, FRAMES)
    write_boxes(folder / "door.jsonl", DAY, FRAMES)
    write_boxes(folder / "tracks.jsonl", DAY, FRAMES, tracks=True)
    return folder


def rows(root: Path) -> dict[str, tuple[str, float, bytes]]:
    """Path -> camera, time and file; checks that no other files exist."""
    store = open_store(root)["train"]
    files = {path.relative_to(root).as_posix() for path in (root / "crops").rglob("*") if path.is_file()}
    assert files == set(store.paths)
    return {
        path: (store.camera_names[store.cameras[row]], float(store.times_s[row]), store.read(row))
        for row, path in enumerate(store.paths)
    }


def tracks_as_sets(root: Path) -> set[frozenset[str]]:
    """The tracks as sets of paths."""
    store = open_store(root)["train"]
    of: dict[int, set[str]] = {}
    for path, track in zip(store.paths, store.tracks.tolist(), strict=True):
        of.setdefault(track, set()).add(path)
    return {frozenset(paths) for paths in of.values()}


@pytest.fixture(scope="module")
def whole(day: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SourceResult]:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("whole") / "store"
    return root, read(day, root)


def walker_of(store: CropStore, row: int) -> int:
    """The walker on a crop, from its frame and box."""
    frame = round((store.times_s[row] - START_S) * 5)
    height, width = decode(store.read(row)).shape[:2]
    assert abs(height - 96) <= 1 and abs(width - 48) <= 1
    there = [number for number, walker in enumerate(DAY) if walker.box(frame) is not None]
    return there[int(store.paths[row][-7:-4])]


def test_every_walker_is_one_track_with_camera_and_time(whole: tuple[Path, SourceResult]) -> None:
    root, outcome = whole
    store = open_store(root)["train"]
    assert store.camera_names == ("door",) and len(store) == outcome.counts.crops
    assert START_S <= store.times_s.min() and store.times_s.max() < START_S + FRAMES / 5
    of: dict[int, set[int]] = {}
    for row in range(len(store)):
        of.setdefault(int(store.tracks[row]), set()).add(walker_of(store, row))
    assert all(len(walkers) == 1 for walkers in of.values())  # no track shows two people
    assert set().union(*of.values()) == set(range(len(DAY)))
    assert max(Counter(next(iter(walkers)) for walkers in of.values()).values()) == 1


def test_counts_add_up(whole: tuple[Path, SourceResult], day: Path) -> None:
    _, outcome = whole
    counts = outcome.counts
    assert outcome.status == "done" and counts.frames == FRAMES and counts.unreadable == 0
    assert counts.boxes == len((day / "door.jsonl").read_text().splitlines())
    assert counts.crops + sum(counts.dropped.values()) == counts.boxes
    assert counts.tracks == len(DAY) and counts.tracks_without_crops == 0
    assert IngestCounts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


def test_given_tracks_are_used(day: Path, tmp_path: Path) -> None:
    outcome = read(day, tmp_path / "s", boxes="tracks.jsonl", tracks="given")
    assert outcome.counts.tracks == len(DAY) and "no track" not in outcome.counts.dropped


def test_a_finished_source_is_skipped_and_other_settings_are_refused(
    day: Path, whole: tuple[Path, SourceResult]
) -> None:
    root, outcome = whole
    before = rows(root)
    again = read(day, root)
    assert again.status == "skipped" and again.counts == outcome.counts and rows(root) == before
    (day / "copy.mp4").write_bytes((day / "door.mp4").read_bytes())
    assert read(day, root, name="copy.mp4").status == "skipped"  # identified by content
    for change in ({"boxes": "tracks.jsonl"}, {"camera": "hall"}, {"tracks": "given"}):
        with pytest.raises(FootageError, match=r"ingested with other settings \(.*--again"):
            read(day, root, **change)


def test_again_replaces_earlier_crops(day: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    read(day, root)
    before = rows(root)
    outcome = read(day, root, boxes="tracks.jsonl", tracks="given", camera="hall", again=True)
    after = rows(root)
    assert outcome.status == "done" and not before.keys() & after.keys()
    assert {camera for camera, *_ in after.values()} == {"hall"} and not (root / "crops" / "door").exists()


KILLS = [
    "file:3",
    "file-written:9",
    "index:2",
    "index-written:3",
    "journal:1",
    "journal:5",
    "journal-written:7",
    "frame:230",
]


@pytest.fixture(scope="module")
def killed(day: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of processes that were killed at different steps."""
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(HERE / "ingesting.py"), "kill", str(day), str(root), *KILLS]
    subprocess.run(command, env=environment(), check=True, timeout=200)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLS)
def test_a_run_killed_at_any_step_resumes_to_the_same_result(
    killed: Path, day: Path, whole: tuple[Path, SourceResult], tmp_path: Path, where: str
) -> None:
    root = tmp_path / "s"
    shutil.copytree(killed / where, root)
    outcome = read(day, root)
    assert rows(root) == rows(whole[0]) and tracks_as_sets(root) == tracks_as_sets(whole[0])
    assert outcome.counts == whole[1].counts


def test_boxes_in_the_journal_are_not_detected_again(killed: Path, day: Path, tmp_path: Path) -> None:
    """A run resumes from the last frame without open tracks with the boxes in the journal."""
    shutil.copytree(killed / "journal-written:7", tmp_path / "s")

    class Counting(BoxFile):
        calls = 0

        def find(self, frame):
            self.calls += 1
            return super().find(frame)

    detector, seen = Counting(day / "door.jsonl", 5), []
    store = GrowingStore(tmp_path / "s")
    with IngestJournal(store.root) as journal:
        footage = open_footage(str(day / "door.mp4"), camera="door", fps=5)
        ingest(footage, detector, store, journal, on_frame=lambda counts: seen.append(counts.frames))
    committed = round(7 * ingesting.COMMIT_S * 5)
    assert detector.calls == FRAMES - committed - 1  # the frame of the commit had been processed
    assert seen[0] == FIRST_BUSY + 1  # only frames since the last one without open tracks are read again


def failing_writes(errors: list[int]) -> Callable[..., None]:
    real = growing.write_table

    def write(*args: Any, **kwargs: Any) -> None:
        if errors and (code := errors.pop(0)):
            raise OSError(code, os.strerror(code))
        real(*args, **kwargs)

    return write


def test_a_full_disk_is_an_error_and_committed_data_is_kept(
    day: Path, whole: tuple[Path, SourceResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMIT_S", ingesting.COMMIT_S)
    monkeypatch.setattr(growing, "write_table", failing_writes([0, 0, errno.ENOSPC]))
    with pytest.raises(StorageFullError, match="committed data is intact; free some space and run the same again"):
        read(day, tmp_path / "s")
    committed = set(open_store(tmp_path / "s")["train"].paths)
    assert committed and committed < set(rows(whole[0]))
    assert read(day, tmp_path / "s").counts == whole[1].counts
    assert rows(tmp_path / "s") == rows(whole[0])


def test_a_full_disk_is_a_storage_full_error(tmp_path: Path) -> None:
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(StorageFullError), storage_full_as_error(tmp_path), device.open("wb", buffering=0) as file:
        file.write(b"x")


def test_a_source_is_read_by_one_process_at_a_time(day: Path, tmp_path: Path) -> None:
    store = GrowingStore(tmp_path / "s")
    key = open_footage(str(day / "door.mp4"), camera="door", fps=5).fingerprint()[: module.KEY_LENGTH]
    with store.exclusive(key), pytest.raises(StoreError, match="another process adds the same"):
        read(day, tmp_path / "s")


def test_several_processes_fill_one_store(day: Path, tmp_path: Path) -> None:
    """Three cameras at a time: all crops are stored, and track numbers are unique."""
    for number in range(3):
        walkers = (Walker(0, 30, 10, 250), Walker(40, 70, 250, 10 + number))
        write_film(tmp_path / f"c{number}.mp4", walkers, 80)
        write_boxes(tmp_path / f"c{number}.jsonl", walkers, 80)
    command = [sys.executable, str(HERE / "ingesting.py"), "read", str(tmp_path), str(tmp_path / "s")]
    running = [subprocess.Popen([*command, f"c{number}"], env=environment()) for number in range(3)]
    assert [process.wait(120) for process in running] == [0] * 3
    store = open_store(tmp_path / "s")["train"]
    rows(tmp_path / "s")
    cameras = {track: set(store.cameras[store.tracks == track]) for track in np.unique(store.tracks)}
    assert len(cameras) == 6 and all(len(seen) == 1 for seen in cameras.values())


def test_a_damaged_journal_is_an_error_and_without_it_no_crop_is_added_twice(
    day: Path, whole: tuple[Path, SourceResult], tmp_path: Path
) -> None:
    read(day, tmp_path / "s")
    before = rows(tmp_path / "s")
    (tmp_path / "s" / "ingest.sqlite3").write_bytes(b"no journal" * 500)
    with pytest.raises(StoreError, match="remove it; footage is then read again"):
        read(day, tmp_path / "s")
    (tmp_path / "s" / "ingest.sqlite3").unlink()
    assert read(day, tmp_path / "s").status == "done" and rows(tmp_path / "s") == before


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(tmp_path / "ingest.sqlite3")) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="has version 7"):
        IngestJournal(tmp_path)


def test_boxes_of_other_footage_cause_a_warning(day: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "late.jsonl").write_text('{"frame": 5000, "box": [0, 0, 50, 90]}\n')
    store = GrowingStore(tmp_path / "s")
    with IngestJournal(store.root) as journal:
        footage = open_footage(str(day / "door.mp4"), camera="door", fps=1)
        outcome = ingest(footage, BoxFile(tmp_path / "late.jsonl", 1), store, journal)
    assert outcome.counts.crops == 0 and "no box in any of its 48 frames" in caplog.text
