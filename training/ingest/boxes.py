"""Boxes around people in a frame: the result of a detector, their overlap, and boxes read from files.

Pixel coordinates start at the frame's upper left corner: x to the right, y down; a box is left, top, right, bottom
(``xyxy``). docs/ingest.md defines the file formats (MOT, JSON lines). A row is assigned to a frame by its number
in the footage (from 1 in MOT files, from 0 in JSON lines) or by its time on the site's clock.

Letters: R rows, N boxes of a frame, H and W of the frame.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resight.arrays import Doubles
from resight.errors import DetectorError
from resight.training.ingest.footage import Frame
from resight.training.store.crops import UNKNOWN

OCCLUSION_GRID = (24, 12)  # sample points of a box: occlusion is accurate to 1/24 of its height and 1/12 of its width


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class Boxes:
    """Boxes of one frame, in the order of detection.

    Attributes:
        xyxy: float64 (N, 4), pixels; inside the frame after `within`.
        scores: float64 (N,), 0..1, confidence that the box shows a person.
        given: int64 (N,), track provided with the boxes, `UNKNOWN` if there is none.
    """

    xyxy: Doubles
    scores: Doubles
    given: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: ArrayLike) -> Boxes:
        """The given rows, in that order."""
        chosen = np.asarray(rows)
        return Boxes(self.xyxy[chosen], self.scores[chosen], self.given[chosen])

    def within(self, height: int, width: int) -> Boxes:
        """The boxes clipped to a frame, without those smaller than a pixel or not finite."""
        clipped = np.clip(self.xyxy, 0, [width, height, width, height])
        sides = clipped[:, 2:] - clipped[:, :2]
        return Boxes(clipped, self.scores, self.given).take(np.isfinite(self.xyxy).all(1) & (sides >= 1).all(1))

    @cached_property
    def hidden(self) -> Doubles:
        """float64 (N,), the share of each box that is covered by boxes nearer to the camera.

        Of two people on one floor the one whose feet are lower in the image is nearer (as assumed by Yang & Ramanan's
        layered detectors and in most tracking). The share is counted on a grid of points, because the area of a union
        of rectangles has no short formula.
        """
        rows, columns = ((np.arange(count) + 0.5) / count for count in OCCLUSION_GRID)
        corner, sides = self.xyxy[:, :2], self.xyxy[:, 2:] - self.xyxy[:, :2]
        x = corner[:, :1] + sides[:, :1] * columns  # (N, columns)
        y = corner[:, 1:] + sides[:, 1:] * rows  # (N, rows)
        shares = np.zeros(len(self))
        for row, bottom in enumerate(self.xyxy[:, 3]):
            left, top, right, lower = self.xyxy[self.xyxy[:, 3] > bottom].T[:, :, None]
            inside_x = (left <= x[row]) & (x[row] < right)  # (nearer, columns)
            inside_y = (top <= y[row]) & (y[row] < lower)
            shares[row] = (inside_y[:, :, None] & inside_x[:, None, :]).any(0).mean()
        return shares


def make_boxes(xyxy: ArrayLike, scores: ArrayLike, given: ArrayLike | None = None) -> Boxes:
    """Boxes from sequences; without ``given`` all tracks are unknown.

    Raises:
        ValueError: the lengths differ.
    """
    corners, confidence = np.asarray(xyxy, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
    tracks = np.full(len(confidence), UNKNOWN, np.int64) if given is None else np.asarray(given, np.int64).reshape(-1)
    if not len(corners) == len(confidence) == len(tracks):
        raise ValueError(
            f"{len(corners)} boxes, {len(confidence)} scores and {len(tracks)} tracks: expected one of each"
        )
    return Boxes(corners, confidence, tracks)


MAX_LINE = 4096  # bytes; a row of either format has about a hundred
NO_SCORE = -1.0  # MOT's confidence if it is unknown
PEDESTRIAN = (-1.0, 1.0)  # MOTChallenge's classes: 1 is a walking pedestrian, -1 unknown
MAX_FRAME_NUMBER = 2**53  # largest integer a float represents exactly; JSON numbers are often floats


class BoxRow(NamedTuple):
    """A row of a file: frame number or time (the other one is NaN), box, score and track."""

    number: float
    time_s: float
    xyxy: tuple[float, float, float, float]
    score: float
    track: str | None


class BoxFile:
    """A detector that returns the boxes of a file, frame by frame.

    Args:
        path: lines of MOT's ``frame,id,left,top,width,height,confidence,…`` or of JSON objects.
        fps: frame rate of the footage: a row with a time is assigned to the frame within half of 1/fps.

    Raises:
        DetectorError: the file cannot be read or is empty, or a line is invalid; names the line.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._half_s = path, 0.5 / fps
        columns: dict[str, array[float]] = {name: array("d") for name in ("number", "time_s", "xyxy", "score")}
        tracks: dict[str, int] = {}
        given = array("q")
        for row in _read_rows(path):
            columns["number"].append(row.number)
            columns["time_s"].append(row.time_s)
            columns["xyxy"].extend(row.xyxy)
            columns["score"].append(row.score)
            given.append(UNKNOWN if row.track is None else tracks.setdefault(row.track, len(tracks)))
        if not given:
            raise DetectorError(f"{path} has no box: expected one line per box")
        self._number, self._time_s = np.array(columns["number"]), np.array(columns["time_s"])
        boxes = make_boxes(columns["xyxy"], columns["score"], given)
        by_number = np.flatnonzero(np.isfinite(self._number))
        by_time = np.flatnonzero(np.isfinite(self._time_s))
        self._of_number = by_number[np.argsort(self._number[by_number], kind="stable")]
        self._of_time = by_time[np.argsort(self._time_s[by_time], kind="stable")]
        self._boxes, self.has_tracks = boxes, bool(tracks)
        with path.open("rb") as file:
            self.identity: Mapping[str, str] = {
                "detector": "given",
                "detections_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    def __len__(self) -> int:
        return len(self._boxes)

    def find(self, frame: Frame) -> Boxes:
        """The boxes of a frame, clipped to it; see `Detector.find`."""
        number, low_s = frame.position.number, frame.time_s - self._half_s
        rows = np.concatenate(
            [
                _between(self._of_number, self._number, number, number + 1),
                _between(self._of_time, self._time_s, low_s, low_s + 2 * self._half_s),
            ]
        )
        return self._boxes.take(rows).within(*frame.image.shape[:2])


def _between(rows: np.ndarray, keys: np.ndarray, low: float, high: float) -> np.ndarray:
    """The rows, sorted by their keys, whose key is in [low, high)."""
    start, stop = np.searchsorted(keys[rows], [low, high])
    found: np.ndarray = rows[start:stop]
    return found


def _read_rows(path: Path) -> Iterator[BoxRow]:
    """The rows of a file; a line that starts with a brace is JSON, any other MOT."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if not (text := line.strip()):
                    continue
                try:
                    if len(line) > MAX_LINE:
                        raise ValueError(f"a line of over {MAX_LINE} bytes")
                    row = _parse_json(text) if text.startswith(b"{") else _parse_mot(text)
                except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
                    raise DetectorError(
                        f"{path}, line {number}: {error}: expected frame,id,left,top,width,height,confidence or "
                        '{"frame": 0, "box": [left, top, right, bottom], "score": 0.9, "track": 7} (docs/ingest.md)',
                        field=f"detections[{number}]",
                    ) from error
                if row is not None:
                    yield row
    except OSError as error:
        raise DetectorError(f"{path} cannot be read ({error.strerror}): expected MOT rows or JSON lines") from error


def _parse_mot(line: bytes) -> BoxRow | None:
    """A row of a MOTChallenge file; None if it is not a pedestrian."""
    values = [float(part) for part in line.replace(b",", b" ").split()]
    if len(values) < 6 or not all(map(math.isfinite, values[:7])):
        raise ValueError(f"{len(values)} numbers")
    frame, track, left, top, width, height = values[:6]
    score = values[6] if len(values) > 6 else NO_SCORE
    if score == 0 or (len(values) > 7 and values[7] not in PEDESTRIAN):
        return None
    left, top = left - 1, top - 1  # MOTChallenge counts pixels from 1
    known = None if track < 0 else str(int(track))
    return BoxRow(
        _frame_number(frame, first=1) - 1, math.nan, (left, top, left + width, top + height), _score(score), known
    )


def _parse_json(line: bytes) -> BoxRow:
    """A JSON object with frame or time_s, and box; score and track are optional."""
    row = json.loads(line)
    if ("frame" in row) == ("time_s" in row):
        raise ValueError("expected either frame or time_s")
    box = [float(side) for side in row["box"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError("the box is not four numbers")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box {box} has no area")
    time_s = float(row["time_s"]) if "time_s" in row else math.nan
    if "time_s" in row and not math.isfinite(time_s):
        raise ValueError("time_s is not a finite number")
    number = _frame_number(row["frame"], first=0) if "frame" in row else math.nan
    track = row.get("track")
    if track is not None and (isinstance(track, bool) or not isinstance(track, int | str)):
        raise ValueError(f"track {str(track)[:40]!r} is neither an integer nor a string")
    known = None if track is None or track == UNKNOWN else str(track)
    return BoxRow(number, time_s, (box[0], box[1], box[2], box[3]), _score(row.get("score", NO_SCORE)), known)


def _frame_number(value: object, *, first: int) -> float:
    number = float(value)  # type: ignore[arg-type]  # float raises for other types
    if isinstance(value, bool) or number != int(number) or not first <= number <= MAX_FRAME_NUMBER:
        raise ValueError(f"frame {value!r} is not an integer from {first}")
    return number


def _score(value: object) -> float:
    score = float(value)  # type: ignore[arg-type]  # float raises for other types
    if score == NO_SCORE:
        return 1.0
    if isinstance(value, bool) or not 0 <= score <= 1:
        raise ValueError(f"score {value!r} is not 0 to 1, or -1 for unknown")
    return score


MIN_SCORE = 0.1  # lower boxes do not help tracking: limit of ByteTrack's second association (Zhang et al., ECCV 2022)
COCO_PERSON = 1  # label in COCO's 91 categories, used by torchvision's detectors


class Detector(Protocol):
    """Detects people in frames.

    Attributes:
        identity: what its results depend on, such as its name and the sha256 of its weights; stored in the journal,
            because another detector gives other crops of the same footage.
    """

    identity: Mapping[str, str]

    def find(self, frame: Frame) -> Boxes:
        """The boxes of one frame, clipped to it; boxes below `MIN_SCORE` may be omitted."""
        ...
