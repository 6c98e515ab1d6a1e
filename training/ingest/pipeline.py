"""Ingesting footage into a growing store: frames, boxes, tracks and crops, with a journal for resuming after a kill.

The crops of a track are added when it has ended, with at most a minute of footage between two commits: files first,
then the index atomically, then the journal. The index defines which crops exist. The journal, a small SQLite file next
to it, records which sources were read to their end with which settings, and for an interrupted one the frame to resume
from, with the boxes already detected after it, since detection takes most of the time. A run resumes at the last frame
without open tracks and therefore gives the same tracks and crops as an uninterrupted one; crops that are already in
the store are skipped.
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
    from resight.training.ingest.boxes import (
        Detector,
    )  # importing a detector loads torch, which given boxes do not need


@dataclass
class IngestCounts:
    """Counts of one source.

    Attributes:
        frames: processed frames.
        unreadable: damaged frames.
        left_out: frames of a live stream that were dropped because processing was too slow.
        boxes: boxes in the frames.
        tracks: finished tracks.
        crops: crops added to the store.
        dropped: reason -> number of boxes that did not become crops.
        tracks_without_crops: tracks without any usable box.
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
        """A copy as plain values."""
        return {**vars(self), "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> IngestCounts:
        """The counts written by `to_json`; zeros if there are none."""
        return cls() if values is None else cls(**{**values, "dropped": Counter(values["dropped"])})


@dataclass(frozen=True)
class SourceResult:
    """Result of ingesting a source.

    Attributes:
        name: name of the source.
        camera: name of its camera.
        status: "done", or "skipped" if it was ingested before.
        folder: folder of its crops in the store.
        counts: counts of the whole source, over all runs.
    """

    name: str
    camera: str
    status: Literal["done", "skipped"]
    folder: str
    counts: IngestCounts


JOURNAL_VERSION = 1
BUSY_S = 30.0  # time a writer waits for another one; transactions take milliseconds
BOX_COLUMNS = 6  # left, top, right, bottom, score, given track
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
    """The journal's record of a source.

    Attributes:
        key: derived from its content.
        name: path or address it was last read from.
        folder: folder of its crops in the store.
        settings: settings of the ingest.
        done: whether it was read to its end.
        position: the frame to resume from.
        counts: counts up to that frame; of the whole source once it is done.
    """

    key: str
    name: str
    folder: str
    settings: Mapping[str, Any]
    done: bool = False
    position: FramePosition = START
    counts: Mapping[str, Any] | None = None


class IngestJournal:
    """The journal of one store; a context manager that closes the database.

    Args:
        root: folder of the store.

    Raises:
        StoreError: the file is damaged or of another version.
        StorageFullError: no space to create it.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / JOURNAL_FILE
        with self._translated_errors():
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
        """The record of a source, or None."""
        with self._translated_errors():
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
        """Insert a source, replacing its earlier record."""
        with self._translated_errors(), self._transaction():
            self._db.execute("DELETE FROM source WHERE key = ?", (entry.key,))
            self._db.execute(
                "INSERT INTO source VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
                (entry.key, entry.name, entry.folder, json.dumps(entry.settings), *entry.position, "null", time.time()),
            )

    def advance(
        self,
        key: str,
        position: FramePosition,
        counts: Mapping[str, Any],
        detected: Iterable[tuple[FramePosition, Boxes]],
        *,
        done: bool,
    ) -> None:
        """Record how far a source was read, and delete the boxes of frames before ``position``.

        Args:
            key: key of the source.
            position: the frame to resume from.
            counts: counts up to that frame.
            detected: frames since the last call, with their boxes.
            done: whether the source was read to its end.
        """
        with self._translated_errors(), self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO frame VALUES (?, ?, ?)",
                ((key, at.mark, _pack_boxes(boxes)) for at, boxes in detected),
            )
            self._db.execute(
                "UPDATE source SET done = ?, number = ?, mark = ?, counts = ?, changed_s = ? WHERE key = ?",
                (done, *position, json.dumps(counts), time.time(), key),
            )
            self._db.execute("DELETE FROM frame WHERE key = ? AND (? OR mark < ?)", (key, done, position.mark))

    def boxes(self, key: str) -> dict[int, Boxes]:
        """The boxes of frames from the recorded position on, by the marks of the frames."""
        with self._translated_errors():
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
    def _translated_errors(self) -> Iterator[None]:
        """Convert SQLite's errors to `StoreError`."""
        with storage_full_as_error(self._path.parent):
            try:
                yield
            except sqlite3.OperationalError:
                raise
            except (sqlite3.DatabaseError, ValueError) as error:
                raise StoreError(
                    f"{self._path} is damaged ({error}): remove it; footage is then read again, and crops that are "
                    "already in the store are not added twice"
                ) from error


def _pack_boxes(boxes: Boxes) -> bytes:
    table = np.column_stack([boxes.xyxy, boxes.scores, boxes.given])  # (N, BOX_COLUMNS); tracks are far below 2^53
    return table.astype("<f8").tobytes()


def _unpack_boxes(blob: bytes) -> Boxes:
    table = np.frombuffer(blob, "<f8").reshape(-1, BOX_COLUMNS).astype(np.float64)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


log = logging.getLogger(__name__)

COMMIT_S = 60.0  # footage between two commits, the most work a kill can lose
KEY_LENGTH = 16  # hexadecimal digits of a source's fingerprint: one collision is expected for 2^32 sources


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
        detector: detects people in its frames.
        store: receives the crops, split "train".
        journal: journal of that store.
        sampling: which boxes become crops.
        tracks: "own", or "given" with a detector that provides tracks.
        again: remove its earlier crops and read it again, even if it is done.
        on_frame: called with the counts after each frame.

    Raises:
        FootageError: nothing in it can be decoded, or it was ingested with other settings before.
        StorageFullError: no space; committed data is intact, and the next run resumes from it.
        StoreError: the store or its journal is damaged, or another process reads the same source into it.
    """
    sampling = SamplingSettings() if sampling is None else sampling
    key = footage.fingerprint()[:KEY_LENGTH]
    settings = {
        "camera": footage.camera,
        "fps": footage.fps,
        "start_s": footage.start_s,
        "tracks": tracks,
        **detector.identity,
        **asdict(sampling),
    }
    with store.exclusive(key):
        entry = _source_record(
            SourceRecord(key, footage.name, f"crops/{footage.camera}/{key}", settings), store, journal, again=again
        )
        if entry.done:
            return SourceResult(
                footage.name, footage.camera, "skipped", entry.folder, IngestCounts.from_json(entry.counts)
            )
        store.sweep(entry.folder)
        reader = _SourceReader(footage, store, journal, entry, sampling, tracks)
        reader.run(detector, on_frame)
        return SourceResult(footage.name, footage.camera, "done", entry.folder, reader.counts)


def _source_record(
    requested: SourceRecord, store: GrowingStore, journal: IngestJournal, *, again: bool
) -> SourceRecord:
    """The journal's record of a source, inserted if it is new or read again."""
    known = journal.entry(requested.key)
    if known is not None and again:
        earlier = known.folder
        store.remove(lambda path: path.startswith(f"{earlier}/"))
        store.sweep(earlier)
        known = None
    if known is None:
        journal.begin(requested)
        return requested
    changed = [
        f"{name} {known.settings.get(name)!r} instead of {value!r}"
        for name, value in requested.settings.items()
        if known.settings.get(name) != value
    ]
    if changed:
        raise FootageError(
            f"{requested.name} was ingested with other settings ({', '.join(changed)}): use those, or add --again to "
            "replace its crops",
            field="settings",
        )
    return known


class _SourceReader:
    """Reads one source from the position in its journal record."""

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
        self._tracker = make_tracker(mode, fps=footage.fps, start_score=sampling.start_score)
        self._sampler = CropSampler(sampling)
        self.counts = IngestCounts.from_json(entry.counts)
        self._sampler.dropped = self.counts.dropped
        self._unreadable_before = self.counts.unreadable
        self._resume_position, self._resume_counts = entry.position, self.counts.to_json()
        self._journaled_boxes = journal.boxes(entry.key)
        self._detected: list[tuple[FramePosition, Boxes]] = []
        self._finished: list[NewTrack] = []
        self._committed_s: float | None = None

    def run(self, detector: Detector, on_frame: Callable[[IngestCounts], None]) -> None:
        """Read the source to its end."""
        last: Frame | None = None
        for frame in self._footage.frames(self._entry.position):
            self._process(frame, detector)
            on_frame(self.counts)
            last = frame
            if self._committed_s is None:
                self._committed_s = frame.time_s
            if frame.time_s - self._committed_s >= COMMIT_S:
                self._commit(done=False)
                self._committed_s = frame.time_s
        for candidates in self._sampler.close_all():
            self._finish(candidates)
        if last is not None:
            self._resume_position = last.position
        self._commit(done=True)
        if self.counts.frames and not self.counts.boxes:
            log.warning("%s: no box in any of its %d frames", self._footage.name, self.counts.frames)

    def _process(self, frame: Frame, detector: Detector) -> None:
        """Detect, track and sample the boxes of a frame."""
        if self._tracker.idle:
            self._resume_position, self._resume_counts = frame.position, self.counts.to_json()
        boxes = self._journaled_boxes.pop(frame.position.mark, None)
        if boxes is None:
            boxes = detector.find(frame)
            if not self._footage.live:  # a live stream cannot be read again
                self._detected.append((frame.position, boxes))
        self._sampler.observe(frame, boxes, self._tracker.update(boxes, frame.time_s))
        for track in self._tracker.ended():
            self._finish(self._sampler.close(track))
        self.counts.frames += 1
        self.counts.boxes += len(boxes)
        self.counts.unreadable = self._unreadable_before + self._footage.unreadable
        self.counts.left_out = self._footage.left_out

    def _finish(self, candidates: list[CropCandidate]) -> None:
        """Prepare the crops of an ended track for the next commit."""
        crops = []
        for candidate in candidates:
            data = candidate.jpeg()
            if len(data) > MAX_BYTES:
                self.counts.dropped["too large"] += 1
                continue
            path = f"{self._entry.folder}/{candidate.position.mark:012d}_{candidate.row:03d}.jpg"
            crops.append(NewCrop(path, data, candidate.time_s))
        self.counts.tracks += 1
        self.counts.crops += len(crops)
        if crops:
            self._finished.append(NewTrack(self._footage.camera, crops))
        else:
            self.counts.tracks_without_crops += 1

    def _commit(self, *, done: bool) -> None:
        """Write files, index and journal, in this order."""
        self._store.add(self._finished)
        self._finished.clear()
        counts = self.counts.to_json() if done else self._resume_counts
        self._journal.advance(self._entry.key, self._resume_position, counts, self._detected, done=done)
        self._detected.clear()
