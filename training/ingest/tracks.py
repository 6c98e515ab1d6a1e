"""Tracking: the boxes of successive frames become tracks, one number per person and passage.

Our own tracks come from ByteTrack (Zhang et al., ECCV 2022) in the library ``trackers``: it uses motion and overlap
only, no appearance, so that tracks are independent of the model that will be trained on them.

Letters: N boxes of a frame.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import supervision
from trackers import ByteTrackTracker

from resight.arrays import Ints
from resight.training.ingest.boxes import Boxes
from resight.training.store.crops import UNKNOWN

TrackMode = Literal["own", "given"]

LOST_S = 1.0  # a person unseen for longer gets a new track: ByteTrack's 30 frames at 30 per second
# The library's default. On two cameras of a simulated site at 5 frames per second 98.9 % of a track's boxes show the
# same person, with 1.4 tracks per passage; 0.2 gave 99.1 % and 1.5, 0.3 gave 98.8 % and 1.9.
MIN_IOU = 0.1
BUFFER_RATE = 30.0  # frames per second in which the library counts its buffer


class Tracker(Protocol):
    """Assigns track numbers to boxes: 0, 1, 2, … in order of appearance."""

    @property
    def idle(self) -> bool:
        """Whether no track is open, so that a new tracker would continue in the same way."""
        ...

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """Track numbers of the boxes of the next frame: int64 (N,), `UNKNOWN` for a box without a track (yet)."""
        ...

    def ended(self) -> list[int]:
        """Tracks that have ended since the last call, in order."""
        ...


def make_tracker(mode: TrackMode, *, fps: float, start_score: float) -> Tracker:
    """Create a tracker.

    Args:
        mode: "own", or "given" to use the tracks provided with the boxes.
        fps: approximate frames per second.
        start_score: minimum score of a box that starts a track, 0..1; boxes below it only extend one.
    """
    return GivenTracker() if mode == "given" else ByteTracker(fps=fps, start_score=start_score)


class ByteTracker:
    """ByteTrack with the times of the frames, so that gaps in the footage are taken into account."""

    def __init__(self, *, fps: float, start_score: float) -> None:
        self._fps, self._start_score = fps, start_score
        self._numbers: dict[int, int] = {}  # the library's number -> ours, of open tracks
        self._next, self._ended = 0, list[int]()
        self._tracker = self._new()

    def _new(self) -> ByteTrackTracker:
        return ByteTrackTracker(
            lost_track_buffer=round(LOST_S * BUFFER_RATE),
            frame_rate=self._fps,
            track_activation_threshold=self._start_score,
            high_conf_det_threshold=self._start_score,
            minimum_iou_threshold=MIN_IOU,
        )

    @property
    def idle(self) -> bool:
        """See `Tracker.idle`."""
        return not self._tracker.tracks

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """See `Tracker.update`."""
        if self.idle:
            self._tracker = self._new()  # drops the state of ended tracks
        rows = np.arange(len(boxes))
        found = self._tracker.update(
            supervision.Detections(boxes.xyxy, confidence=boxes.scores, data={"row": rows}), timestamp=time_s
        )
        numbers = np.full(len(boxes), UNKNOWN, np.int64)
        library_numbers = np.empty(0, np.int64) if found.tracker_id is None else found.tracker_id
        for row, library_number in zip(found.data.get("row", ()), library_numbers, strict=True):
            if library_number >= 0:
                numbers[row] = self._number(int(library_number))
        alive = {track.tracker_id for track in self._tracker.tracks}
        for library_number in [library_number for library_number in self._numbers if library_number not in alive]:
            self._ended.append(self._numbers.pop(library_number))
        return numbers

    def _number(self, library_number: int) -> int:
        if library_number not in self._numbers:
            self._numbers[library_number] = self._next
            self._next += 1
        return self._numbers[library_number]

    def ended(self) -> list[int]:
        """See `Tracker.ended`."""
        ended, self._ended = self._ended, []
        return ended


class GivenTracker:
    """The tracks provided with the boxes. A track that returns after `LOST_S` gets a new number."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, float]] = {}  # given number -> ours, and when it was last seen
        self._next, self._ended = 0, list[int]()

    @property
    def idle(self) -> bool:
        """See `Tracker.idle`."""
        return not self._open

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """See `Tracker.update`."""
        for given_number in [
            given_number for given_number, (_, seen_s) in self._open.items() if time_s - seen_s > LOST_S
        ]:
            self._ended.append(self._open.pop(given_number)[0])
        numbers = np.full(len(boxes), UNKNOWN, np.int64)
        for row, given_number in enumerate(boxes.given.tolist()):
            if given_number == UNKNOWN:
                continue
            if given_number not in self._open:
                self._open[given_number] = self._next, time_s
                self._next += 1
            number, _ = self._open[given_number]
            self._open[given_number] = number, time_s
            numbers[row] = number
        return numbers

    def ended(self) -> list[int]:
        """See `Tracker.ended`."""
        ended, self._ended = self._ended, []
        return ended
