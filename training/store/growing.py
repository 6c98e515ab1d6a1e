"""A crop store that grows: adding and removing crops while other processes use it, and purging by retention time.

Every change replaces the index once, under a lock, based on its current content, so several processes (for instance
one per live camera) can add to one store. Files are written before the index lists them and removed afterwards; a
program killed in between leaves unlisted files, which `sweep` removes.

A purge first records what it will remove, so that the next one completes it if it is interrupted. It also removes the
links of these crops.
"""

from __future__ import annotations

import errno
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from resight.errors import StorageFullError, StoreError
from resight.files import files_below, sync, write_atomic
from resight.training.store.copying import open_all_splits
from resight.training.store.crops import (
    INDEX_FILE,
    SCHEMA,
    UNKNOWN,
    CropStore,
    check_path,
    is_store,
    open_store,
    read_table,
    write_table,
)
from resight.training.store.links import LINKS_FILE, read_links, write_links

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def exclusive_lock(path: Path, does: str) -> Iterator[None]:
    """Alone with work that takes long; the lock file is removed when it is done.

    Args:
        path: of the lock file.
        does: what another process does that has it, for the message.

    Raises:
        StoreError: another process has it.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(f"another process {does}: wait until it is done") from error
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def storage_full_as_error(root: Path) -> Iterator[None]:
    """Convert errors of a full disk.

    Raises:
        StorageFullError: instead of the error of the system, Arrow or SQLite.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) in DISK_FULL or "disk is full" in str(error):
            raise StorageFullError(
                f"no space left for {root} ({error}): committed data is intact; free some space and run the same again"
            ) from error
        raise


JOURNAL_FILE = "ingest.sqlite3"
LOCK_FILE = ".index.lock"


@dataclass(frozen=True)
class NewCrop:
    """A crop to add: its path in the store, its encoded image, and its capture time (Unix seconds, or None)."""

    path: str
    data: bytes
    time_s: float | None


@dataclass(frozen=True)
class NewTrack:
    """Crops of one camera to add as one track, or without a track if not ``numbered``.

    Attributes:
        camera: name of the camera.
        crops: one or more crops.
        numbered: whether the crops are one track.
        number: an existing track number; None for the next free one.
    """

    camera: str
    crops: Sequence[NewCrop]
    numbered: bool = True
    number: int | None = None


class GrowingStore:
    """A store of split "train", created if it does not exist.

    Args:
        root: folder of the store.

    Raises:
        StoreError: ``root`` is something else than a store or an empty folder.
        StorageFullError: no space for the folder.
    """

    def __init__(self, root: Path) -> None:
        if root.exists() and (not root.is_dir() or not _is_store_or_empty(root)):
            raise StoreError(f"{root} is not a crop store and not empty: choose a new folder, or a store")
        self.root = root
        with storage_full_as_error(root):
            root.mkdir(parents=True, exist_ok=True)

    def add(self, tracks: Sequence[NewTrack]) -> list[int | None]:
        """Add tracks in one atomic step; a track whose first crop is already in the store is skipped.

        Args:
            tracks: the paths of their crops must be unique.

        Returns:
            The number of each track; None for skipped tracks and for crops without a track.

        Raises:
            StorageFullError: no space; nothing was added.
            StoreError: the index is damaged, or a path is invalid.
        """
        with storage_full_as_error(self.root), self._locked():
            index = self._read()
            known = set(index["path"].to_pylist())
            highest = pc.max(index["track"]).as_py()  # None if no crop has a track
            given = (track.number for track in tracks if track.number is not None)
            free = max([UNKNOWN if highest is None else highest, *given])
            rows: list[dict[str, object]] = []
            numbers: list[int | None] = []
            for track in tracks:
                if track.crops[0].path in known:
                    numbers.append(None)
                    continue
                number = track.number
                if track.numbered and number is None:
                    free += 1
                    number = free
                numbers.append(number)
                for crop in track.crops:
                    self._write(crop)
                    rows.append(
                        {
                            "path": crop.path,
                            "camera": track.camera,
                            "time_s": crop.time_s,
                            "track": number,
                            "split": "train",
                        }
                    )
            if rows or not is_store(self.root):
                self._replace(pa.concat_tables([index, pa.Table.from_pylist(rows, schema=SCHEMA)]))
            return numbers

    def remove(self, selected: Callable[[str], bool]) -> int:
        """Remove the crops whose path is ``selected``, rows first; returns their number.

        Raises:
            StorageFullError: no space for the new index; nothing was removed.
            StoreError: the index is damaged.
        """
        with storage_full_as_error(self.root), self._locked():
            index = self._read()
            paths = index["path"].to_pylist()
            removed = [path for path in paths if selected(path)]
            if removed:
                self._replace(index.filter(pa.array([not selected(path) for path in paths])))
            for path in removed:
                (self.root / path).unlink(missing_ok=True)
            return len(removed)

    def rows(self, folder: str) -> list[dict[str, Any]]:
        """Path, camera, time_s and track of the crops below a folder of the store; None where unknown.

        Raises:
            StoreError: the index is damaged.
        """
        index = self._read()
        below = index.filter(pc.starts_with(index["path"], f"{folder}/"))
        found: list[dict[str, Any]] = below.select(["path", "camera", "time_s", "track"]).to_pylist()
        return found

    def sweep(self, folder: str) -> int:
        """Remove the files below a folder that no row lists, then the folder and its parent if they are empty."""
        with self._locked():
            known, count = {row["path"] for row in self.rows(folder)}, 0
            for file in files_below(self.root / folder):
                if file.relative_to(self.root).as_posix() not in known:
                    file.unlink()
                    count += 1
            for parent in (self.root / folder, (self.root / folder).parent):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            return count

    def exclusive(self, key: str) -> AbstractContextManager[None]:
        """Lock one source of crops for this process; raises StoreError if another one holds the lock."""
        return exclusive_lock(self.root / f".{key}.lock", f"adds the same to {self.root}")

    def _locked(self) -> AbstractContextManager[object]:
        return FileLock(self.root / LOCK_FILE)

    def _read(self) -> pa.Table:
        if not is_store(self.root):
            return SCHEMA.empty_table()
        return read_table(self.root / INDEX_FILE, SCHEMA, remedy="restore it from a backup")

    def _replace(self, index: pa.Table) -> None:
        write_table(self.root / INDEX_FILE, index.replace_schema_metadata(SCHEMA.metadata))

    def _write(self, crop: NewCrop) -> None:
        check_path(crop.path)
        path = self.root / PurePosixPath(crop.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crop.data)
        sync(path)
        sync(path.parent)


def _is_store_or_empty(root: Path) -> bool:
    """Whether a folder is a store, an unfinished one, or empty except for lock files."""
    return (
        is_store(root) or (root / JOURNAL_FILE).is_file() or all(path.name.startswith(".") for path in root.iterdir())
    )


log = logging.getLogger(__name__)

PURGE_FILE = ".purge.json"


def capture_times(store: CropStore) -> NDArray[np.float64]:
    """Capture time of each crop: float64 (N,), Unix seconds.

    If it is unknown, the modification time of the file; NaN if the file is missing.
    """
    times = store.times_s.copy()
    for row in np.flatnonzero(np.isnan(times)):
        try:
            times[row] = (store.root / store.paths[row]).stat().st_mtime
        except OSError:
            continue
    return times


def purge(root: Path, before_s: float, *, source: Path | None = None) -> int:
    """Remove the crops captured before a time; returns their number.

    Args:
        root: folder of a store; nothing is removed if it does not exist.
        before_s: Unix seconds.
        source: folder of the store the crops were copied from: crops that it no longer has, for instance because a
            person was erased, are removed too. Ignored if it does not exist.

    Raises:
        StoreError: the index or the list of an interrupted purge is damaged.
        StorageFullError: no space for the new index; nothing was removed.
    """
    if not is_store(root):
        return 0
    removed = _finish_purge(root)
    if open_store(root):
        store = open_all_splits(root)
        expired = capture_times(store) < before_s
        if source is not None and is_store(source):
            remaining = {path for part in open_store(source).values() for path in part.paths}
            expired |= np.array([path not in remaining for path in store.paths])
        old = [store.paths[row] for row in np.flatnonzero(expired)]
        if old:
            write_atomic(root / PURGE_FILE, json.dumps(old).encode())
            removed += _finish_purge(root)
    if removed:
        log.info("removed %d crops of %s: retention time over or removed from the source", removed, root)
    return removed


def _finish_purge(root: Path) -> int:
    """Remove the crops listed in the purge file; returns the number of removed rows."""
    journal = root / PURGE_FILE
    if not journal.exists():
        return 0
    try:
        old = [str(path) for path in json.loads(journal.read_bytes())]
    except (ValueError, TypeError) as error:
        raise StoreError(f"{journal} is damaged ({error}): remove it and purge again") from error
    listed = set(old)
    removed = GrowingStore(root).remove(listed.__contains__)
    for path in old:
        check_path(path)
        (root / path).unlink(missing_ok=True)
    for folder in {(root / path).parent for path in old} - {root}:
        with suppress(OSError):  # not empty, or removed already
            folder.rmdir()
    remaining = [pair for pair in read_links(root) if pair.path_a not in listed and pair.path_b not in listed]
    if (root / LINKS_FILE).exists():
        write_links(root, remaining)
    journal.unlink()
    sync(root)
    return removed
