"""Boxes of one frame after the other become tracks: one person, one passage, one number.

Our own tracks are ByteTrack's (Zhang et al., ECCV 2022) as the library ``trackers`` has it: motion and overlap alone,
no appearance, so that a track is no opinion of the model that will be trained on it. Letters: N boxes of a frame.
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

LOST_S = 1.0  # unseen for longer, somebody who comes back is a new track: ByteTrack's 30 frames at 30 a second
# The library's default. On two cameras of a simulated site at 5 frames a second 98.9 % of a track's boxes show one
# person then, with 1.4 tracks a walk; 0.2 gave 99.1 % and 1.5, 0.3 gave 98.8 % and 1.9.
MIN_IOU = 0.1
BUFFER_RATE = 30.0  # frames a second that the library counts its buffer in


class Tracker(Protocol):
    """Numbers boxes by whose they are; the numbers are 0, 1, 2, … in order of appearance."""

    @property
    def quiet(self) -> bool:
        """Whether nobody is being followed, so that whoever comes next would be numbered alike by a new object."""
        ...

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """Number the boxes of the next frame: int64 (N,), `UNKNOWN` for a box that belongs to no track (yet)."""
        ...

    def ended(self) -> list[int]:
        """Tracks that will not be seen again and have not been named here before, in order."""
        ...


def make_tracker(mode: TrackMode, *, fps: float, start_score: float) -> Tracker:
    """An object that makes tracks of boxes.

    Args:
        mode: "own", or "given" to take those that came with the boxes.
        fps: frames a second, about.
        start_score: a box of this score or more begins a track, 0..1; others only go on with one.
    """
    return GivenTracker() if mode == "given" else ByteTracker(fps=fps, start_score=start_score)


class ByteTracker:
    """ByteTrack by the frames' own moments; a gap in the footage is a gap to it."""

    def __init__(self, *, fps: float, start_score: float) -> None:
        self._fps, self._start_score = fps, start_score
        self._numbers: dict[int, int] = {}  # the library's number -> ours, of tracks that go on
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
    def quiet(self) -> bool:
        """See `Tracker.quiet`."""
        return not self._tracker.tracks

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """See `Tracker.update`."""
        if self.quiet:
            self._tracker = self._new()  # its filters and clock keep nothing of those who have left
        rows = np.arange(len(boxes))
        found = self._tracker.update(
            supervision.Detections(boxes.xyxy, confidence=boxes.scores, data={"row": rows}), timestamp=time_s
        )
        numbers = np.full(len(boxes), UNKNOWN, np.int64)
        theirs_of = np.empty(0, np.int64) if found.tracker_id is None else found.tracker_id
        for row, theirs in zip(found.data.get("row", ()), theirs_of, strict=True):
            if theirs >= 0:
                numbers[row] = self._number(int(theirs))
        alive = {track.tracker_id for track in self._tracker.tracks}
        for theirs in [theirs for theirs in self._numbers if theirs not in alive]:
            self._ended.append(self._numbers.pop(theirs))
        return numbers

    def _number(self, theirs: int) -> int:
        if theirs not in self._numbers:
            self._numbers[theirs] = self._next
            self._next += 1
        return self._numbers[theirs]

    def ended(self) -> list[int]:
        """See `Tracker.ended`."""
        ended, self._ended = self._ended, []
        return ended


class GivenTracker:
    """The tracks that came with the boxes. One that comes back after `LOST_S` is another passage, and another track."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, float]] = {}  # their number -> ours, and when it was seen last
        self._next, self._ended = 0, list[int]()

    @property
    def quiet(self) -> bool:
        """See `Tracker.quiet`."""
        return not self._open

    def update(self, boxes: Boxes, time_s: float) -> Ints:
        """See `Tracker.update`."""
        for theirs in [theirs for theirs, (_, seen_s) in self._open.items() if time_s - seen_s > LOST_S]:
            self._ended.append(self._open.pop(theirs)[0])
        numbers = np.full(len(boxes), UNKNOWN, np.int64)
        for row, theirs in enumerate(boxes.given.tolist()):
            if theirs == UNKNOWN:
                continue
            if theirs not in self._open:
                self._open[theirs] = self._next, time_s
                self._next += 1
            number, _ = self._open[theirs]
            self._open[theirs] = number, time_s
            numbers[row] = number
        return numbers

    def ended(self) -> list[int]:
        """See `Tracker.ended`."""
        ended, self._ended = self._ended, []
        return ended
