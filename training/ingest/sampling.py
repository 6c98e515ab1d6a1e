"""Selecting which boxes of a track become crops: good and distinct ones, spread over the track.

Each box is considered once, while its frame is available, and an open track keeps no more candidates than it may get
crops. So memory does not grow with the length of the footage, and the same boxes always give the same crops.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resight.arrays import Pixels
from resight.image import MAX_PIXELS, MAX_SIDE, MIN_SIDE, ImageSpec, fit, quality
from resight.training.ingest.boxes import Boxes
from resight.training.ingest.footage import Frame, FramePosition
from resight.training.store.crops import UNKNOWN

THUMBNAIL = ImageSpec(16, 16)  # columns are then averaged in pairs: 16 x 8 grey levels, the proportions of a body
QUALITY_SIZE = ImageSpec(256, 128)  # input size of the encoder; quality is computed at this size
JPEG_QUALITY = 92  # at 4:4:4 a 128 x 64 crop takes 4 KB; artefacts are below those of a camera


@dataclass(frozen=True)
class SamplingSettings:
    """Requirements for crops and their number per track. Values without a source are our own choice.

    Attributes:
        crops_per_track: maximum number. Most papers sample 8 frames of a track of MARS.
        min_height: minimum height of a box in pixels; 64 is half the height of Market-1501's crops.
        start_score: minimum score of a box; also starts a track.
        max_hidden: maximum share of the box that nearer boxes cover.
        edge: minimum distance to the frame's border in pixels; a box closer to it shows a truncated person.
        min_gap_s: minimum time between two crops of a track: in less time a walking pose hardly changes.
        min_difference: minimum mean difference of the thumbnails of two crops of a track, in grey levels of 255.
    """

    crops_per_track: int = 8
    min_height: int = 64
    start_score: float = 0.5
    max_hidden: float = 0.3
    edge: float = 2.0
    min_gap_s: float = 0.4
    min_difference: float = 4.0


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class CropCandidate:
    """A candidate crop: uint8 (H, W, 3), its frame and box, time, score and thumbnail."""

    image: Pixels = field(repr=False)
    position: FramePosition
    row: int  # of the box in its frame
    time_s: float
    score: float
    thumbnail: NDArray[np.int16] = field(repr=False)

    def jpeg(self) -> bytes:
        """The crop as a JPEG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue()


class CropSampler:
    """Collects crop candidates of open tracks.

    Args:
        settings: see `SamplingSettings`.

    Attributes:
        dropped: reason -> number of boxes that did not become crops.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._open: dict[int, list[CropCandidate]] = {}
        self.dropped: Counter[str] = Counter()

    def observe(self, frame: Frame, boxes: Boxes, tracks: Sequence[int] | NDArray[np.int64]) -> None:
        """Consider the boxes of the next frame; boxes without a track are dropped."""
        for row, track in enumerate(tracks):
            if track == UNKNOWN:
                self.dropped["no track"] += 1
                continue
            kept = self._open.setdefault(int(track), [])
            reason = self._refusal(frame, boxes, row)
            if reason:
                self.dropped[reason] += 1
            else:
                self._offer(kept, _cut_candidate(frame, boxes, row))

    def close(self, track: int) -> list[CropCandidate]:
        """Remove a track and return its candidates in order of time."""
        return self._open.pop(track, [])

    def close_all(self) -> list[list[CropCandidate]]:
        """Close all open tracks, in order of appearance."""
        return [self.close(track) for track in sorted(self._open)]

    def _refusal(self, frame: Frame, boxes: Boxes, row: int) -> str:
        """Why a box cannot become a crop, or an empty string."""
        left, top, right, bottom = boxes.xyxy[row]
        height, width = frame.image.shape[:2]
        edge = self._settings.edge
        rows, columns = bottom - top, right - left
        if rows < self._settings.min_height or columns < MIN_SIDE:
            return "too small"
        if boxes.scores[row] < self._settings.start_score:
            return "low score"
        if left < edge or top < edge or right > width - edge or bottom > height - edge:
            return "cut off"
        if boxes.hidden[row] > self._settings.max_hidden:
            return "hidden"
        if (rows + 1) * (columns + 1) > MAX_PIXELS or max(rows, columns) + 1 > MAX_SIDE:
            return "too large"
        return ""

    def _offer(self, kept: list[CropCandidate], new: CropCandidate) -> None:
        """Add a candidate unless a similar one has a higher score, replace similar ones, and enforce the limit."""
        settings = self._settings
        similar = [
            old
            for old in kept
            if new.time_s - old.time_s < settings.min_gap_s - 1e-6  # time stamps are rounded to a microsecond
            or np.abs(new.thumbnail - old.thumbnail).mean() < settings.min_difference
        ]
        if any(old.score >= new.score for old in similar):
            self.dropped["near-duplicate"] += 1
            return
        for old in similar:
            kept.remove(old)
        self.dropped["near-duplicate"] += len(similar)
        kept.append(new)
        if len(kept) > settings.crops_per_track:
            self.dropped["enough of the track"] += 1
            _drop_closest(kept)


def _drop_closest(kept: list[CropCandidate]) -> None:
    """Remove the lower-scored one of the two candidates closest in time, so that the whole track stays covered."""
    gaps = np.diff([candidate.time_s for candidate in kept])
    first = int(np.argmin(gaps)) if len(gaps) else 0
    pair = kept[first : first + 2]
    kept.remove(min(pair, key=lambda candidate: candidate.score))


def _cut_candidate(frame: Frame, boxes: Boxes, row: int) -> CropCandidate:
    """Cut out a box inside the frame; its score is quality times visible share times detection score."""
    left, top, right, bottom = boxes.xyxy[row]
    image = frame.image[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))].copy()
    score = (
        quality(fit(image, QUALITY_SIZE), image.shape[:2]) * (1 - float(boxes.hidden[row])) * float(boxes.scores[row])
    )
    square = fit(image, THUMBNAIL).astype(np.int16).sum(2)  # (16, 16), sum of the three colours
    return CropCandidate(image, frame.position, row, frame.time_s, score, (square[:, ::2] + square[:, 1::2]) // 6)
