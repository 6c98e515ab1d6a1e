"""Which boxes of a track become crops: good ones, that differ, spread over the passage.

A box is looked at once, when its frame is there, and each open track keeps no more than the crops it may get. So what
is kept does not depend on how long footage is, and a second run over the same boxes keeps the same.
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

THUMBNAIL = ImageSpec(16, 16)  # columns are then averaged in pairs: 16 x 8 grey levels, a body's proportions
QUALITY_SIZE = ImageSpec(256, 128)  # what the encoder sees, and quality is measured on
JPEG_QUALITY = 92  # at 4:4:4 a 128 x 64 crop takes 4 KB; the codec's marks stay below a camera's own


@dataclass(frozen=True)
class SamplingSettings:
    """What a crop must be, and how many a track gets. Each number without another source is ours.

    Attributes:
        crops_per_track: at most. MARS, Market-1501's cameras as tracks, samples 8 frames of a track in most papers.
        min_height: rows of the box; 64 is half of Market-1501's crops.
        start_score: least score of a box; the same that begins a track.
        max_hidden: share of the box that nearer boxes may cover.
        edge: pixels to the frame's border; a box nearer to it is a person cut off.
        min_gap_s: between two crops of a track: below it a walker has not moved a limb.
        min_difference: grey levels of 255 by which thumbnails of two crops of a track must differ in the mean.
    """

    crops_per_track: int = 8
    min_height: int = 64
    start_score: float = 0.5
    max_hidden: float = 0.3
    edge: float = 2.0
    min_gap_s: float = 0.4
    min_difference: float = 4.0


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class CropCandidate:
    """A crop that may be kept: uint8 (H, W, 3), when and where it was cut, what it is worth, and its thumbnail."""

    image: Pixels = field(repr=False)
    place: FramePosition
    row: int  # of the box among those of its frame
    time_s: float
    worth: float
    thumbnail: NDArray[np.int16] = field(repr=False)

    def jpeg(self) -> bytes:
        """The file."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue()


class CropSampler:
    """Candidates of the tracks that go on.

    Args:
        settings: what is kept.

    Attributes:
        dropped: reason -> boxes of tracks that became no crop.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._open: dict[int, list[CropCandidate]] = {}
        self.dropped: Counter[str] = Counter()

    def see(self, frame: Frame, boxes: Boxes, tracks: Sequence[int] | NDArray[np.int64]) -> None:
        """Look at the boxes of the next frame; of those without a track nothing is kept."""
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
        """What is kept of a track, in order of time; it is forgotten here."""
        return self._open.pop(track, [])

    def close_all(self) -> list[list[CropCandidate]]:
        """The same of every track that is open, in order of appearance."""
        return [self.close(track) for track in sorted(self._open)]

    def _refusal(self, frame: Frame, boxes: Boxes, row: int) -> str:
        """Why a box cannot become a crop; empty where it can."""
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
        """Keep a candidate, or those it is too much like if they are worth more; then no more than there may be."""
        settings = self._settings
        alike = [
            old
            for old in kept
            if new.time_s - old.time_s < settings.min_gap_s - 1e-6  # time stamps are rounded to a microsecond
            or np.abs(new.thumbnail - old.thumbnail).mean() < settings.min_difference
        ]
        if any(old.worth >= new.worth for old in alike):
            self.dropped["near-duplicate"] += 1
            return
        for old in alike:
            kept.remove(old)
        self.dropped["near-duplicate"] += len(alike)
        kept.append(new)
        if len(kept) > settings.crops_per_track:
            self.dropped["enough of the track"] += 1
            _drop_closest(kept)


def _drop_closest(kept: list[CropCandidate]) -> None:
    """Take one out: of the two nearest to each other in time the one that is worth less, so that all times stay."""
    gaps = np.diff([candidate.time_s for candidate in kept])
    first = int(np.argmin(gaps)) if len(gaps) else 0
    pair = kept[first : first + 2]
    kept.remove(min(pair, key=lambda candidate: candidate.worth))


def _cut_candidate(frame: Frame, boxes: Boxes, row: int) -> CropCandidate:
    """The crop of a box, which lies within the frame, and its worth: quality, less what hides it."""
    left, top, right, bottom = boxes.xyxy[row]
    image = frame.image[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))].copy()
    worth = (
        quality(fit(image, QUALITY_SIZE), image.shape[:2]) * (1 - float(boxes.hidden[row])) * float(boxes.scores[row])
    )
    square = fit(image, THUMBNAIL).astype(np.int16).sum(2)  # (16, 16), three times the grey level
    return CropCandidate(image, frame.place, row, frame.time_s, worth, (square[:, ::2] + square[:, 1::2]) // 6)
