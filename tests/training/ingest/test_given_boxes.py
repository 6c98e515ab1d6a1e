"""Boxes from files: both formats, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resight.errors import DetectorError
from resight.training.ingest.boxes import BoxFile
from resight.training.ingest.footage import Frame, FramePosition

IMAGE = np.zeros((100, 200, 3), np.uint8)


def frame(number: int, time_s: float = 0.0) -> Frame:
    return Frame(IMAGE, FramePosition(number, number), time_s)


def given(path: Path, text: str, fps: float = 5) -> BoxFile:
    path.write_text(text)
    return BoxFile(path, fps)


def test_mot_counts_frames_and_pixels_from_one(tmp_path: Path) -> None:
    rows = "3,7,11,21,30,40,0.9,-1,-1,-1\n1,2,1,1,5,6,-1\n\n1 -1 50 50 10 10 0.5\n"
    boxes = given(tmp_path / "det.txt", rows)
    assert len(boxes) == 3 and boxes.has_tracks
    first = boxes.find(frame(0))
    assert first.xyxy.tolist() == [[0, 0, 5, 6], [49, 49, 59, 59]] and first.scores.tolist() == [1, 0.5]
    assert len(boxes.find(frame(1))) == 0
    third = boxes.find(frame(2))
    assert third.xyxy.tolist() == [[10, 20, 40, 60]] and third.scores.tolist() == [0.9]
    assert first.given[1] == -1 and len({int(first.given[0]), int(third.given[0])}) == 2


def test_mot_ground_truth_is_limited_to_pedestrians(tmp_path: Path) -> None:
    boxes = given(tmp_path / "gt.txt", "1,1,10,10,9,9,1,1,1\n1,2,10,10,9,9,0,1,1\n1,3,10,10,9,9,1,7,1\n")
    assert len(boxes) == 1


def test_json_lines_have_a_frame_from_zero_or_a_time(tmp_path: Path) -> None:
    rows = [
        {"frame": 0, "box": [1, 2, 30, 40], "score": 0.7, "track": "anna", "more": []},
        {"frame": 0, "box": [1, 2, 31, 41]},
        {"frame": 2, "box": [5, 5, 30, 40], "score": -1, "track": "anna"},
        {"time_s": 1000.41, "box": [9, 9, 30, 40], "track": 4},
        {"time_s": 1000.5, "box": [8, 8, 30, 40], "track": None},
    ]
    boxes = given(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    first = boxes.find(frame(0))
    assert first.xyxy.tolist() == [[1, 2, 30, 40], [1, 2, 31, 41]] and first.scores.tolist() == [0.7, 1.0]
    assert first.given[0] == boxes.find(frame(2)).given[0] != -1 == first.given[1]
    assert boxes.find(frame(9, 1000.4)).xyxy[:, 0].tolist() == [9]
    assert boxes.find(frame(9, 1000.6)).xyxy[:, 0].tolist() == [
        8
    ]  # half of 0.2 s to each side, including the earlier end


def test_every_row_with_a_time_belongs_to_one_frame(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = 1.7e9 + rng.uniform(0, 20, 300)
    text = "".join(json.dumps({"time_s": time_s, "box": [0, 0, 20, 20]}) + "\n" for time_s in times)
    boxes = given(tmp_path / "b.jsonl", text)
    found = [len(boxes.find(frame(number, 1.7e9 + number / 5))) for number in range(102)]
    assert sum(found) == 300


def test_boxes_are_clipped_to_the_frame(tmp_path: Path) -> None:
    boxes = given(tmp_path / "det.txt", "1,1,-10,-10,400,50,0.9\n1,1,900,1,40,40,0.9")
    assert boxes.find(frame(0)).xyxy.tolist() == [[0, 0, 200, 39]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no box"),
        ("\n\n", "has no box"),
        ("1,1,1,1,1\n", "line 1: 5 numbers"),
        ("1,1,1,1,9,9,0.5\nframe,id\n", "line 2: could not convert"),
        ("0,1,1,1,9,9,0.5", "is not an integer from 1"),
        ("1.5,1,1,1,9,9,0.5", "is not an integer from 1"),
        ("1,1,1,1,9,9,35.2", "score 35.2 is not"),
        ("1,1,nan,1,9,9,0.5", "7 numbers"),
        ("{}", "expected either frame or time_s"),
        ('{"frame": 1, "time_s": 2, "box": [0,0,9,9]}', "expected either frame or time_s"),
        ('{"frame": -1, "box": [0,0,9,9]}', "is not an integer from 0"),
        ('{"frame": Infinity, "box": [0,0,9,9]}', "line 1"),
        ('{"frame": true, "box": [0,0,9,9]}', "is not an integer from 0"),
        ('{"frame": 1}', "'box'"),
        ('{"frame": 1, "box": [0,0,9]}', "is not four numbers"),
        ('{"frame": 1, "box": [9,9,0,0]}', "has no area"),
        ('{"frame": 1, "box": [0,0,9,9], "score": 1.5}', "score 1.5 is not"),
        ('{"frame": 1, "box": [0,0,9,9], "track": [1]}', "is neither an integer nor a string"),
        ('{"time_s": NaN, "box": [0,0,9,9]}', "time_s is not a finite number"),
        ('{"frame": 1, "box": "' + "[" * 3000 + '"}', "could not convert"),
        ("{" * 4000, "line 1"),
        ("1," * 5000, "a line of over 4096 bytes"),
        ("\x00\x01\x02", "line 1"),
    ],
)
def test_invalid_lines_are_errors_with_their_number(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DetectorError) as error:
        given(tmp_path / "boxes", text)
    assert message in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match="cannot be read"):
        BoxFile(tmp_path / "none", 5)


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    one, two = (given(tmp_path / name, "1,1,1,1,9,9,0.5\n") for name in ("a", "b"))
    assert one.identity == two.identity != given(tmp_path / "c", "1,1,1,1,9,9,0.6\n").identity
