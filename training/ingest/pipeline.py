"""Footage into a growing store: frames, boxes, tracks and chosen crops, with a journal to continue after a kill.

The crops of a track are added when it has ended, and at most a minute of footage passes between two commits: files
first, then the index in one step, then the journal. The index defines which crops exist. The journal, a small SQLite
file beside it, records which sources were read to their end with which settings, and for an interrupted one the frame
to continue from, with the boxes already found after it, since detection takes most of the time. A run continues from
the last frame without anybody in the picture, and so makes the same tracks and crops as an uninterrupted one; crops
that are in the store already are skipped.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from resight.errors import FootageError, StoreError
from resight.image import MAX_BYTES
from resight.training.ingest.boxes import Boxes
from resight.training.ingest.footage import START, Footage, Frame, FramePosition
from resight.training.ingest.sampling import CropCandidate, CropSampler, SamplingSettings
from resight.training.ingest.tracks import TrackMode, make_tracker
from resight.training.store.growing import (
    JOURNAL_FILE,
    GrowingStore,
    NewCrop,
    NewTrack,
    storage_full_as_error,
)

if TYPE_CHECKING:
    from resight.training.ingest.boxes import Detector  # which loads torch, and boxes from elsewhere need none


@dataclass
class IngestCounts:
    """What was met and what became of it.

    Attributes:
        frames: looked at.
        unreadable: damaged ones.
        left_out: of a live stream, that nobody had time for.
        boxes: in the frames.
        tracks: passages.
        crops: kept.
        dropped: reason -> boxes of which no crop was made.
        tracks_without_crops: passages of which none was good enough.
    """

    frames: int = 0
    unreadable: int = 0
    left_out: int = 0
    boxes: int = 0
    tracks: int = 0
    crops: int = 0
    tracks_without_crops: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """A copy of plain values."""
        return {**vars(self), "dropped": dict(self.dropped)}

    @classmethod
    def of(cls, told: Mapping[str, Any] | None) -> IngestCounts:
        """What `to_json` gave."""
        return cls() if told is None else cls(**{**told, "dropped": Counter(told["dropped"])})


@dataclass(frozen=True)
class SourceResult:
    """What became of a source.

    Attributes:
        name: of it.
        camera: of it.
        status: "done", or "skipped" because it was done before.
        folder: of its crops in the store.
        counts: of all of it, over all runs.
    """

    name: str
    camera: str
    status: Literal["done", "skipped"]
    folder: str
    counts: IngestCounts


JOURNAL_VERSION = 1
BUSY_S = 30.0  # that a writer waits for another one; each holds the file for milliseconds
BOX_COLUMNS = 6  # of a box: left, top, right, bottom, score, given track
JOURNAL_TABLES = """
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
class SourceRecord:
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
    place: FramePosition = START
    counts: Mapping[str, Any] | None = None


class IngestJournal:
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
                    for statement in JOURNAL_TABLES.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {JOURNAL_VERSION}")
                elif version != JOURNAL_VERSION:
                    raise StoreError(
                        f"{self._path} has version {version}, this program reads {JOURNAL_VERSION}: use the resight "
                        "that wrote it"
                    )

    def __enter__(self) -> IngestJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def entry(self, key: str) -> SourceRecord | None:
        """What is known of a source."""
        with self._telling():
            row = self._db.execute(
                "SELECT name, folder, settings, done, number, mark, counts FROM source WHERE key = ?", (key,)
            ).fetchone()
            if row is None:
                return None
            name, folder, settings, done, number, mark, counts = row
            return SourceRecord(
                key, name, folder, json.loads(settings), bool(done), FramePosition(number, mark), json.loads(counts)
            )

    def begin(self, entry: SourceRecord) -> None:
        """Write a source down that is new, or is told from the beginning."""
        with self._telling(), self._transaction():
            self._db.execute("DELETE FROM source WHERE key = ?", (entry.key,))
            self._db.execute(
                "INSERT INTO source VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
                (entry.key, entry.name, entry.folder, json.dumps(entry.settings), *entry.place, "null", time.time()),
            )

    def advance(
        self,
        key: str,
        place: FramePosition,
        counts: Mapping[str, Any],
        seen: Iterable[tuple[FramePosition, Boxes]],
        *,
        done: bool,
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
                "INSERT OR REPLACE INTO frame VALUES (?, ?, ?)",
                ((key, at.mark, _pack_boxes(boxes)) for at, boxes in seen),
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
            return {mark: _unpack_boxes(blob) for mark, blob in found}

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
        with storage_full_as_error(self._path.parent):
            try:
                yield
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, ValueError) as error:
                raise StoreError(
                    f"{self._path} is damaged ({error}): remove it; footage is then read again, and crops that are "
                    "in the store are not added twice"
                ) from error


def _pack_boxes(boxes: Boxes) -> bytes:
    table = np.column_stack([boxes.xyxy, boxes.scores, boxes.given])  # (N, COLUMNS); tracks are far below 2^53
    return table.astype("<f8").tobytes()


def _unpack_boxes(blob: bytes) -> Boxes:
    table = np.frombuffer(blob, "<f8").reshape(-1, BOX_COLUMNS).astype(np.float64)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


log = logging.getLogger(__name__)

COMMIT_S = 60.0  # of footage between two commits: what a kill can cost of work
KEY_LENGTH = 16  # hexadecimal digits of a source's fingerprint: 2^32 sources meet by chance once


def ingest(
    footage: Footage,
    detector: Detector,
    store: GrowingStore,
    journal: IngestJournal,
    *,
    sampling: SamplingSettings | None = None,
    tracks: TrackMode = "own",
    again: bool = False,
    on_frame: Callable[[IngestCounts], None] = lambda counts: None,
) -> SourceResult:
    """Read one source into a store.

    Args:
        footage: the source.
        detector: finds people in it.
        store: where crops go; split "train".
        journal: of that store.
        sampling: which boxes become crops.
        tracks: "own", or "given" with a detector that hands tracks out.
        again: read it anew, with its earlier crops removed, whether it was done or not.
        on_frame: is told the counts after each frame.

    Raises:
        FootageError: nothing in it can be decoded, or it was asked for with other settings before.
        StorageFullError: no room; what was committed stands, and the next run goes on from there.
        StoreError: the store or its journal is damaged, or another process reads the same source into it.
    """
    chosen = SamplingSettings() if sampling is None else sampling
    key = footage.fingerprint()[:KEY_LENGTH]
    asked = {
        "camera": footage.camera,
        "fps": footage.fps,
        "start_s": footage.start_s,
        "tracks": tracks,
        **detector.identity,
        **asdict(chosen),
    }
    with store.exclusive(key):
        entry = _source_record(
            SourceRecord(key, footage.name, f"crops/{footage.camera}/{key}", asked), store, journal, again=again
        )
        if entry.done:
            return SourceResult(footage.name, footage.camera, "skipped", entry.folder, IngestCounts.of(entry.counts))
        store.sweep(entry.folder)
        reading = _SourceReader(footage, store, journal, entry, chosen, tracks)
        reading.run(detector, on_frame)
        return SourceResult(footage.name, footage.camera, "done", entry.folder, reading.counts)


def _source_record(asked: SourceRecord, store: GrowingStore, journal: IngestJournal, *, again: bool) -> SourceRecord:
    """What the journal says of a source, or the beginning of it."""
    known = journal.entry(asked.key)
    if known is not None and again:
        earlier = known.folder
        store.remove(lambda path: path.startswith(f"{earlier}/"))
        store.sweep(earlier)
        known = None
    if known is None:
        journal.begin(asked)
        return asked
    changed = [
        f"{name} {known.settings.get(name)!r} instead of {value!r}"
        for name, value in asked.settings.items()
        if known.settings.get(name) != value
    ]
    if changed:
        raise FootageError(
            f"{asked.name} was ingested with other settings ({', '.join(changed)}): ask with those, or add --again to "
            "replace its crops",
            field="settings",
        )
    return known


class _SourceReader:
    """One source being read from where its entry stands."""

    def __init__(
        self,
        footage: Footage,
        store: GrowingStore,
        journal: IngestJournal,
        entry: SourceRecord,
        sampling: SamplingSettings,
        mode: TrackMode,
    ) -> None:
        self._footage, self._store, self._journal, self._entry = footage, store, journal, entry
        self._tracks = make_tracker(mode, fps=footage.fps, start_score=sampling.start_score)
        self._sampler = CropSampler(sampling)
        self.counts = IngestCounts.of(entry.counts)
        self._sampler.dropped = self.counts.dropped
        self._unreadable_before = self.counts.unreadable
        self._place, self._counts_there = entry.place, self.counts.to_json()
        self._known = journal.boxes(entry.key)
        self._seen: list[tuple[FramePosition, Boxes]] = []
        self._ended: list[NewTrack] = []
        self._committed_s: float | None = None

    def run(self, detector: Detector, on_frame: Callable[[IngestCounts], None]) -> None:
        """Read to the end."""
        last: Frame | None = None
        for frame in self._footage.frames(self._entry.place):
            self._look(frame, detector)
            on_frame(self.counts)
            last = frame
            if self._committed_s is None:
                self._committed_s = frame.time_s
            if frame.time_s - self._committed_s >= COMMIT_S:
                self._commit(done=False)
                self._committed_s = frame.time_s
        for candidates in self._sampler.close_all():
            self._end(candidates)
        if last is not None:
            self._place = last.place
        self._commit(done=True)
        if self.counts.frames and not self.counts.boxes:
            log.warning("%s: no box in any of its %d frames", self._footage.name, self.counts.frames)

    def _look(self, frame: Frame, detector: Detector) -> None:
        """One frame: boxes, tracks, candidates."""
        if self._tracks.quiet:
            self._place, self._counts_there = frame.place, self.counts.to_json()
        boxes = self._known.pop(frame.place.mark, None)
        if boxes is None:
            boxes = detector.find(frame)
            if not self._footage.live:  # which cannot be read again
                self._seen.append((frame.place, boxes))
        self._sampler.see(frame, boxes, self._tracks.update(boxes, frame.time_s))
        for track in self._tracks.ended():
            self._end(self._sampler.close(track))
        self.counts.frames += 1
        self.counts.boxes += len(boxes)
        self.counts.unreadable = self._unreadable_before + self._footage.unreadable
        self.counts.left_out = self._footage.left_out

    def _end(self, candidates: list[CropCandidate]) -> None:
        """A track that will not be seen again: its crops wait for the next commit."""
        crops = []
        for candidate in candidates:
            data = candidate.jpeg()
            if len(data) > MAX_BYTES:
                self.counts.dropped["too large"] += 1
                continue
            path = f"{self._entry.folder}/{candidate.place.mark:012d}_{candidate.row:03d}.jpg"
            crops.append(NewCrop(path, data, candidate.time_s))
        self.counts.tracks += 1
        self.counts.crops += len(crops)
        if crops:
            self._ended.append(NewTrack(self._footage.camera, crops))
        else:
            self.counts.tracks_without_crops += 1

    def _commit(self, *, done: bool) -> None:
        """Files, index, journal: in this order."""
        self._store.add(self._ended)
        self._ended.clear()
        counts = self.counts.to_json() if done else self._counts_there
        self._journal.advance(self._entry.key, self._place, counts, self._seen, done=done)
        self._seen.clear()
