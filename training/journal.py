"""What has been ingested into a growing store, and how far: a small SQLite file beside its index.

The index is the truth of which crops are there. The journal knows which sources were read to their end and with which
settings; and of one that was interrupted, from which frame on it has to be read again, with the boxes already found
from there on, since finding them is what takes the time.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resight.errors import StoreError
from resight.training.boxes import Boxes
from resight.training.claims import room
from resight.training.footage import START, Place
from resight.training.growing import JOURNAL_FILE

SCHEMA_VERSION = 1
BUSY_S = 30.0  # that a writer waits for another one; each holds the file for milliseconds
COLUMNS = 6  # of a box: left, top, right, bottom, score, given track
TABLES = """
CREATE TABLE source (
    key TEXT PRIMARY KEY, name TEXT NOT NULL, folder TEXT NOT NULL, settings TEXT NOT NULL, done INTEGER NOT NULL,
    number INTEGER NOT NULL, mark INTEGER NOT NULL, counts TEXT NOT NULL, changed_s REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE frame (
    key TEXT NOT NULL REFERENCES source (key) ON DELETE CASCADE, mark INTEGER NOT NULL, boxes BLOB NOT NULL,
    PRIMARY KEY (key, mark)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Entry:
    """One source.

    Attributes:
        key: of its content.
        name: where it was read from last.
        folder: of its crops in the store.
        settings: it was asked for with.
        done: whether it was read to its end.
        place: the frame to go on from.
        counts: of what came before that frame; once done, of all.
    """

    key: str
    name: str
    folder: str
    settings: Mapping[str, Any]
    done: bool = False
    place: Place = START
    counts: Mapping[str, Any] | None = None


class Journal:
    """The journal of one store; close it, or use it in a ``with``.

    Args:
        root: folder of the store.

    Raises:
        StoreError: the file is damaged, or of another version.
        StorageFullError: no room to make it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / JOURNAL_FILE
        with self._telling():
            self._db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA foreign_keys = ON")
            with self._transaction():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in TABLES.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                elif version != SCHEMA_VERSION:
                    raise StoreError(
                        f"{self._path} has version {version}, this program reads {SCHEMA_VERSION}: use the resight "
                        "that wrote it"
                    )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def entry(self, key: str) -> Entry | None:
        """What is known of a source."""
        with self._telling():
            row = self._db.execute(
                "SELECT name, folder, settings, done, number, mark, counts FROM source WHERE key = ?", (key,)
            ).fetchone()
            if row is None:
                return None
            name, folder, settings, done, number, mark, counts = row
            return Entry(key, name, folder, json.loads(settings), bool(done), Place(number, mark), json.loads(counts))

    def begin(self, entry: Entry) -> None:
        """Write a source down that is new, or is told from the beginning."""
        with self._telling(), self._transaction():
            self._db.execute("DELETE FROM source WHERE key = ?", (entry.key,))
            self._db.execute(
                "INSERT INTO source VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
                (entry.key, entry.name, entry.folder, json.dumps(entry.settings), *entry.place, "null", time.time()),
            )

    def advance(
        self, key: str, place: Place, counts: Mapping[str, Any], seen: Iterable[tuple[Place, Boxes]], *, done: bool
    ) -> None:
        """Write down how far a source was read; what was found before ``place`` is forgotten.

        Args:
            key: of the source.
            place: the frame to go on from.
            counts: of what came before it.
            seen: frames since the last time, with their boxes.
            done: whether that was all.
        """
        with self._telling(), self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO frame VALUES (?, ?, ?)", ((key, at.mark, _pack(boxes)) for at, boxes in seen)
            )
            self._db.execute(
                "UPDATE source SET done = ?, number = ?, mark = ?, counts = ?, changed_s = ? WHERE key = ?",
                (done, *place, json.dumps(counts), time.time(), key),
            )
            self._db.execute("DELETE FROM frame WHERE key = ? AND (? OR mark < ?)", (key, done, place.mark))

    def boxes(self, key: str) -> dict[int, Boxes]:
        """The boxes found from the place on, by the frames' marks."""
        with self._telling():
            found = self._db.execute("SELECT mark, boxes FROM frame WHERE key = ?", (key,))
            return {mark: _unpack(blob) for mark, blob in found}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell SQLite's errors as ours."""
        with room(self._path.parent):
            try:
                yield
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, ValueError) as error:
                raise StoreError(
                    f"{self._path} is damaged ({error}): remove it; footage is then read again, and crops that are "
                    "in the store are not added twice"
                ) from error


def _pack(boxes: Boxes) -> bytes:
    table = np.column_stack([boxes.xyxy, boxes.scores, boxes.given])  # (N, COLUMNS); tracks are far below 2^53
    return table.astype("<f8").tobytes()


def _unpack(blob: bytes) -> Boxes:
    table = np.frombuffer(blob, "<f8").reshape(-1, COLUMNS).astype(np.float64)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))
