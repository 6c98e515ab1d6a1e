"""Footage in: frames, boxes, tracks and chosen crops, into a growing store; interrupted anywhere, it goes on there.

The crops of a track are added when the track has ended, and at most a minute of footage passes between two commits:
files first, then the index in one step, then the journal. A run that goes on reads again from the last frame at which
nobody was in the picture, with the boxes that were found already, and so makes the same tracks and crops as if it had
never been interrupted; those that are in the store are passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from resight.errors import FootageError
from resight.image import MAX_BYTES
from resight.training.boxes import Boxes
from resight.training.counts import Counts, Outcome
from resight.training.footage import Footage, Frame, Place
from resight.training.growing import GrowingStore, NewCrop, NewTrack
from resight.training.journal import Entry, Journal
from resight.training.sampling import Candidate, Sampler, Sampling
from resight.training.tracks import Mode, follow

if TYPE_CHECKING:
    from resight.training.detect import Detector  # which loads torch, and boxes from elsewhere need none

log = logging.getLogger(__name__)

COMMIT_S = 60.0  # of footage between two commits: what a kill can cost of work
KEY = 16  # hexadecimal digits of a source's fingerprint: 2^32 sources meet by chance once


def ingest(
    footage: Footage,
    detector: Detector,
    store: GrowingStore,
    journal: Journal,
    *,
    sampling: Sampling | None = None,
    tracks: Mode = "own",
    again: bool = False,
    on_frame: Callable[[Counts], None] = lambda counts: None,
) -> Outcome:
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
    chosen = Sampling() if sampling is None else sampling
    key = footage.fingerprint()[:KEY]
    asked = {
        "camera": footage.camera,
        "fps": footage.fps,
        "start_s": footage.start_s,
        "tracks": tracks,
        **detector.identity,
        **asdict(chosen),
    }
    with store.claimed(key):
        entry = _entry(Entry(key, footage.name, f"crops/{footage.camera}/{key}", asked), store, journal, again=again)
        if entry.done:
            return Outcome(footage.name, footage.camera, "skipped", entry.folder, Counts.of(entry.counts))
        store.sweep(entry.folder)
        reading = _Reading(footage, store, journal, entry, chosen, tracks)
        reading.run(detector, on_frame)
        return Outcome(footage.name, footage.camera, "done", entry.folder, reading.counts)


def _entry(asked: Entry, store: GrowingStore, journal: Journal, *, again: bool) -> Entry:
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


class _Reading:
    """One source being read from where its entry stands."""

    def __init__(
        self, footage: Footage, store: GrowingStore, journal: Journal, entry: Entry, sampling: Sampling, mode: Mode
    ) -> None:
        self._footage, self._store, self._journal, self._entry = footage, store, journal, entry
        self._tracks = follow(mode, fps=footage.fps, start_score=sampling.start_score)
        self._sampler = Sampler(sampling)
        self.counts = Counts.of(entry.counts)
        self._sampler.dropped = self.counts.dropped
        self._unreadable_before = self.counts.unreadable
        self._place, self._counts_there = entry.place, self.counts.to_json()
        self._known = journal.boxes(entry.key)
        self._seen: list[tuple[Place, Boxes]] = []
        self._ended: list[NewTrack] = []
        self._committed_s: float | None = None

    def run(self, detector: Detector, on_frame: Callable[[Counts], None]) -> None:
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

    def _end(self, candidates: list[Candidate]) -> None:
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
