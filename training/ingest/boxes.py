"""Boxes around people in a frame: the result of a detector, their overlap, and boxes read from files.

Pixels count from the frame's upper left corner: x to the right, y down; a box is left, top, right, bottom (``xyxy``).
docs/ingest.md has the formats of files (MOT, JSON lines). A row belongs to a frame by its number in the footage (from 1
in MOT files, from 0 in JSON lines), or by its time on the site's clock.

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

OCCLUSION_GRID = (
    24,
    12,
)  # points of a box that are looked at: the share hidden is right to 1/24 of a height, 1/12 of a width


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Boxes:
    """Boxes of one frame, in the order they were found.

    Attributes:
        xyxy: float64 (N, 4), pixels; within the frame where `within` made them.
        scores: float64 (N,), 0..1, how sure the detector is that each shows a person.
        given: int64 (N,), the track that whoever found them put each in, `UNKNOWN` where none was said.
    """

    xyxy: Doubles
    scores: Doubles
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
    def hidden(self) -> Doubles:
        """float64 (N,), the share of each box that boxes nearer to the camera cover.

        Of two people on one floor the one whose feet are lower in the picture is nearer (Yang & Ramanan's layered
        detectors and most of tracking take it so). The share is counted on a grid of points, because the union of
        rectangles has no short formula.
        """
        rows, columns = ((np.arange(count) + 0.5) / count for count in OCCLUSION_GRID)
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


MAX_LINE = 4096  # bytes; a row of either format has a hundred
NO_SCORE = -1.0  # MOT's confidence of whoever does not tell one
PEDESTRIAN = (-1.0, 1.0)  # MOTChallenge's classes: 1 walks; -1 is said by those that know no classes
MAX_FRAME_NUMBER = 2**53  # the largest that a float, which JSON's numbers are to most writers, holds exactly


class BoxRow(NamedTuple):
    """A line: where it belongs (one of both is NaN), its box, and who found it how sure."""

    number: float
    time_s: float
    xyxy: tuple[float, float, float, float]
    score: float
    track: str | None


class BoxFile:
    """The boxes of a file, handed out frame by frame.

    Args:
        path: lines of MOT's ``frame,id,left,top,width,height,confidence,…`` or of JSON objects.
        fps: of the frames that will ask: a row with a moment belongs to the frame within half of 1/fps of it.

    Raises:
        DetectorError: the file cannot be read, is empty, or a line is none; names the line.
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
            raise DetectorError(f"{path} holds no box: expected a line for each")
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
        """The rows of a frame, cut to it; see `Detector.find`."""
        number, low_s = frame.place.number, frame.time_s - self._half_s
        rows = np.concatenate(
            [
                _between(self._of_number, self._number, number, number + 1),
                _between(self._of_time, self._time_s, low_s, low_s + 2 * self._half_s),
            ]
        )
        return self._boxes.take(rows).within(*frame.image.shape[:2])


def _between(rows: np.ndarray, keys: np.ndarray, low: float, high: float) -> np.ndarray:
    """Those of rows sorted by their keys whose key is in [low, high)."""
    first, after = np.searchsorted(keys[rows], [low, high])
    found: np.ndarray = rows[first:after]
    return found


def _read_rows(path: Path) -> Iterator[BoxRow]:
    """The rows; which of both formats it is shows by the first line."""
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
    """A row of MOTChallenge's files; None for what is not to be taken for a pedestrian."""
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
    """An object with frame or time_s, and box; score and track where they are known."""
    row = json.loads(line)
    if ("frame" in row) == ("time_s" in row):
        raise ValueError("it names a frame or time_s, not both")
    box = [float(side) for side in row["box"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError("a box that is not four numbers")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"a box {box} without an area")
    time_s = float(row["time_s"]) if "time_s" in row else math.nan
    if "time_s" in row and not math.isfinite(time_s):
        raise ValueError("a time_s that is no number")
    number = _frame_number(row["frame"], first=0) if "frame" in row else math.nan
    track = row.get("track")
    if track is not None and (isinstance(track, bool) or not isinstance(track, int | str)):
        raise ValueError(f"a track {str(track)[:40]!r} that is neither a number nor a name")
    known = None if track is None or track == UNKNOWN else str(track)
    return BoxRow(number, time_s, (box[0], box[1], box[2], box[3]), _score(row.get("score", NO_SCORE)), known)


def _frame_number(value: object, *, first: int) -> float:
    number = float(value)  # type: ignore[arg-type]  # what is no number is told by float itself
    if isinstance(value, bool) or number != int(number) or not first <= number <= MAX_FRAME_NUMBER:
        raise ValueError(f"frame {value!r}; frames count from {first}")
    return number


def _score(value: object) -> float:
    score = float(value)  # type: ignore[arg-type]  # what is no number is told by float itself
    if score == NO_SCORE:
        return 1.0
    if isinstance(value, bool) or not 0 <= score <= 1:
        raise ValueError(f"a score of {value!r}; scores are 0 to 1, or -1 where nobody told one")
    return score


MIN_SCORE = 0.1  # boxes below it help no tracker: ByteTrack's second round begins there (Zhang et al., ECCV 2022)
COCO_PERSON = 1  # label of COCO's 91 categories, as torchvision's detectors were trained


class Detector(Protocol):
    """Finds people in frames.

    Attributes:
        identity: what its answers depend on, such as its name and the sha256 of its weights; kept in the store's
            journal, because footage that was ingested with another detector is other footage.
    """

    identity: Mapping[str, str]

    def find(self, frame: Frame) -> Boxes:
        """The boxes of one frame, cut to it; those below `MIN_SCORE` may be left out."""
        ...
