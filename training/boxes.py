"""Boxes around people in one frame: what a detector answers, and how far boxes hide one another.

Pixels count from the frame's upper left corner: x to the right, y down; a box is left, top, right, bottom (``xyxy``).
Letters: N boxes, H and W of the frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resight.training.crops import UNKNOWN

Floats = NDArray[np.float64]
GRID = (24, 12)  # points of a box that are looked at: the share hidden is right to 1/24 of a height, 1/12 of a width


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Boxes:
    """Boxes of one frame, in the order they were found.

    Attributes:
        xyxy: float64 (N, 4), pixels; within the frame where `within` made them.
        scores: float64 (N,), 0..1, how sure the detector is that each shows a person.
        given: int64 (N,), the track that whoever found them put each in, `UNKNOWN` where none was said.
    """

    xyxy: Floats
    scores: Floats
    given: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: ArrayLike) -> Boxes:
        """Some of them, in the order given."""
        chosen = np.asarray(rows)
        return Boxes(self.xyxy[chosen], self.scores[chosen], self.given[chosen])

    def within(self, height: int, width: int) -> Boxes:
        """What of them lies in a frame; boxes of which less than a pixel does, or that are no numbers, are left out."""
        cut = np.clip(self.xyxy, 0, [width, height, width, height])
        sides = cut[:, 2:] - cut[:, :2]
        return Boxes(cut, self.scores, self.given).take(np.isfinite(self.xyxy).all(1) & (sides >= 1).all(1))

    @cached_property
    def hidden(self) -> Floats:
        """float64 (N,), the share of each box that boxes nearer to the camera cover.

        Of two people on one floor the one whose feet are lower in the picture is nearer (Yang & Ramanan's layered
        detectors and most of tracking take it so). The share is counted on a grid of points, because the union of
        rectangles has no short formula.
        """
        rows, columns = ((np.arange(count) + 0.5) / count for count in GRID)
        corner, sides = self.xyxy[:, :2], self.xyxy[:, 2:] - self.xyxy[:, :2]
        x = corner[:, :1] + sides[:, :1] * columns  # (N, columns)
        y = corner[:, 1:] + sides[:, 1:] * rows  # (N, rows)
        shares = np.zeros(len(self))
        for row, bottom in enumerate(self.xyxy[:, 3]):
            left, top, right, low = self.xyxy[self.xyxy[:, 3] > bottom].T[:, :, None]
            across = (left <= x[row]) & (x[row] < right)  # (nearer, columns)
            along = (top <= y[row]) & (y[row] < low)
            shares[row] = (along[:, :, None] & across[:, None, :]).any(0).mean()
        return shares


def make_boxes(xyxy: ArrayLike, scores: ArrayLike, given: ArrayLike | None = None) -> Boxes:
    """Boxes of any sequences; without ``given`` nobody knows a track.

    Raises:
        ValueError: the lengths differ.
    """
    corners, sure = np.asarray(xyxy, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
    tracks = np.full(len(sure), UNKNOWN, np.int64) if given is None else np.asarray(given, np.int64).reshape(-1)
    if not len(corners) == len(sure) == len(tracks):
        raise ValueError(f"{len(corners)} boxes, {len(sure)} scores and {len(tracks)} tracks: expected one of each")
    return Boxes(corners, sure, tracks)
