"""A crop store that grows: crops are added to it, and taken out, while others read it.

Every change is one replacement of the index under a lock, made on what the index is at that moment, so that several
processes (one a live camera, say) add to one store. Files are written before rows name them and removed after none
does; a program killed in between leaves files that no row names, which `sweep` removes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from resight.atomic import sync
from resight.errors import StoreError
from resight.training.claims import claimed, room, waiting
from resight.training.crops import INDEX_FILE, SCHEMA, UNKNOWN, check_path, is_store
from resight.training.tables import read_table, write_table

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
        if root.exists() and (not root.is_dir() or not _ours(root)):
            raise StoreError(f"{root} holds other things than a crop store: name a new folder, or a store")
        self.root = root
        with room(root):
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
        with room(self.root), self._locked():
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
        with room(self.root), self._locked():
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
            for file in (self.root / folder).rglob("*"):
                if not file.is_dir() and file.relative_to(self.root).as_posix() not in known:
                    file.unlink()
                    count += 1
            for emptied in (self.root / folder, (self.root / folder).parent):
                if emptied.is_dir() and not any(emptied.iterdir()):
                    emptied.rmdir()
            return count

    def claimed(self, key: str) -> AbstractContextManager[None]:
        """Alone with one source of crops; see `claims.claimed`."""
        return claimed(self.root / f".{key}.lock", f"adds the same to {self.root}")

    def _locked(self) -> AbstractContextManager[None]:
        return waiting(self.root / LOCK_FILE)

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


def _ours(root: Path) -> bool:
    """Whether a folder is a store, was begun to be one, or is empty but for locks."""
    return (
        is_store(root) or (root / JOURNAL_FILE).is_file() or all(path.name.startswith(".") for path in root.iterdir())
    )
