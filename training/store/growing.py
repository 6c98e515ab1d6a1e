"""A crop store that grows: crops are added and removed while others read it, and leave it when their retention ends.

Every change replaces the index once, under a lock, based on the index at that moment, so that several processes (one
for each live camera, say) add to one store. Files are written before rows name them and removed after no row does; a
program killed in between leaves files that no row names, which `sweep` removes.

A purge first writes down what it will remove, so that the next one finishes it after a kill. Links of such crops go
too.
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
        with lock:
            yield
            path.unlink(missing_ok=True)
    except Timeout as error:
        raise StoreError(f"another process {does}: wait until it is done") from error


@contextmanager
def storage_full_as_error(root: Path) -> Iterator[None]:
    """Tell a full disk as what it is.

    Raises:
        StorageFullError: instead of the system's, Arrow's or SQLite's own error.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) in DISK_FULL or "disk is full" in str(error):
            raise StorageFullError(
                f"no room left for {root} ({error}): what was committed stands; free some and run the same again"
            ) from error
        raise


JOURNAL_FILE = "ingest.sqlite3"
LOCK_FILE = ".index.lock"


@dataclass(frozen=True)
class NewCrop:
    """A crop to add: where it shall stand below the store, its file, and when it was taken (Unix seconds, or None)."""

    path: str
    data: bytes
    time_s: float | None


@dataclass(frozen=True)
class NewTrack:
    """Crops of one camera that get one number; without ``numbered``, crops of which nobody knows a track.

    Attributes:
        camera: its name.
        crops: one or more.
        numbered: whether they are one track.
        number: that they have already; None = the next that is free.
    """

    camera: str
    crops: Sequence[NewCrop]
    numbered: bool = True
    number: int | None = None


class GrowingStore:
    """A store of split "train", made where there is none.

    Args:
        root: its folder.

    Raises:
        StoreError: there is something else at ``root``.
        StorageFullError: no room for the folder.
    """

    def __init__(self, root: Path) -> None:
        if root.exists() and (not root.is_dir() or not _is_store_or_empty(root)):
            raise StoreError(f"{root} holds other things than a crop store: name a new folder, or a store")
        self.root = root
        with storage_full_as_error(root):
            root.mkdir(parents=True, exist_ok=True)

    def add(self, tracks: Sequence[NewTrack]) -> list[int | None]:
        """Add tracks whole, all in one step; one whose first crop is in the store already is passed over.

        Args:
            tracks: their crops must have paths of their own.

        Returns:
            The number of each track: of one passed over None, as of crops without a track.

        Raises:
            StorageFullError: no room; nothing was added.
            StoreError: the index is damaged, or a path is none.
        """
        with storage_full_as_error(self.root), self._locked():
            index = self._read()
            known = set(index["path"].to_pylist())
            highest = pc.max(index["track"]).as_py()  # None where no crop has a track
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

    def remove(self, gone: Callable[[str], bool]) -> int:
        """Take out the crops whose path ``gone`` names, rows first; how many.

        Raises:
            StorageFullError: no room for the new index; nothing was removed.
            StoreError: the index is damaged.
        """
        with storage_full_as_error(self.root), self._locked():
            index = self._read()
            paths = index["path"].to_pylist()
            leaving = [path for path in paths if gone(path)]
            if leaving:
                self._replace(index.filter(pa.array([not gone(path) for path in paths])))
            for path in leaving:
                (self.root / path).unlink(missing_ok=True)
            return len(leaving)

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
        """Remove the files below a folder that no row names, and the folder and the one above where nothing is left."""
        with self._locked():
            known, count = {row["path"] for row in self.rows(folder)}, 0
            for file in files_below(self.root / folder):
                if file.relative_to(self.root).as_posix() not in known:
                    file.unlink()
                    count += 1
            for emptied in (self.root / folder, (self.root / folder).parent):
                if emptied.is_dir() and not any(emptied.iterdir()):
                    emptied.rmdir()
            return count

    def claimed(self, key: str) -> AbstractContextManager[None]:
        """Alone with one source of crops; see `claims.claimed`."""
        return exclusive_lock(self.root / f".{key}.lock", f"adds the same to {self.root}")

    def _locked(self) -> AbstractContextManager[object]:
        return FileLock(self.root / LOCK_FILE)

    def _read(self) -> pa.Table:
        if not is_store(self.root):
            return SCHEMA.empty_table()
        return read_table(self.root / INDEX_FILE, SCHEMA, mend="restore it from a backup")

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
    """Whether a folder is a store, was begun to be one, or is empty but for locks."""
    return (
        is_store(root) or (root / JOURNAL_FILE).is_file() or all(path.name.startswith(".") for path in root.iterdir())
    )


log = logging.getLogger(__name__)

PURGE_FILE = ".purge.json"


def capture_times(store: CropStore) -> NDArray[np.float64]:
    """When each crop was taken: float64 (N,), Unix seconds.

    Where nobody knows it is when its file was written; NaN if that is gone.
    """
    times = store.times_s.copy()
    for row in np.flatnonzero(np.isnan(times)):
        try:
            times[row] = (store.root / store.paths[row]).stat().st_mtime
        except OSError:
            continue
    return times


def purge(root: Path, before_s: float, *, source: Path | None = None) -> int:
    """Remove the crops that were taken before a time; how many.

    Args:
        root: folder of a store; one that is not there holds nothing to remove.
        before_s: Unix seconds.
        source: folder of the store whose crops these are: what it has not any more, since somebody was erased say,
            goes as well. One that is not there says nothing.

    Raises:
        StoreError: the index or the list of an interrupted purge is damaged.
        StorageFullError: no room for the new index; nothing was removed.
    """
    if not is_store(root):
        return 0
    removed = _finish_purge(root)
    if open_store(root):
        store = open_all_splits(root)
        gone = capture_times(store) < before_s
        if source is not None and is_store(source):
            left = {path for part in open_store(source).values() for path in part.paths}
            gone |= np.array([path not in left for path in store.paths])
        old = [store.paths[row] for row in np.flatnonzero(gone)]
        if old:
            write_atomic(root / PURGE_FILE, json.dumps(old).encode())
            removed += _finish_purge(root)
    if removed:
        log.info("removed %d crops of %s that may not be kept any more", removed, root)
    return removed


def _finish_purge(root: Path) -> int:
    """Do what is written down; how many rows that took."""
    told = root / PURGE_FILE
    if not told.exists():
        return 0
    try:
        old = [str(path) for path in json.loads(told.read_bytes())]
    except (ValueError, TypeError) as error:
        raise StoreError(f"{told} is damaged ({error}): remove it, and purge again") from error
    gone = set(old)
    removed = GrowingStore(root).remove(gone.__contains__)
    for path in old:
        check_path(path)
        (root / path).unlink(missing_ok=True)
    for folder in {(root / path).parent for path in old} - {root}:
        with suppress(OSError):  # not empty, or gone already
            folder.rmdir()
    kept = [pair for pair in read_links(root) if pair.path_a not in gone and pair.path_b not in gone]
    if (root / LINKS_FILE).exists():
        write_links(root, kept)
    told.unlink()
    sync(root)
    return removed
