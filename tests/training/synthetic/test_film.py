"""Simulated videos: correct true boxes, overlapping and crossing people, and files with times."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest

from resight.training.synthetic.camera import SimulatedCamera
from resight.training.synthetic.film import CameraVideo, CameraView, simulate_detections, write_video
from resight.training.synthetic.people import sample_people
from resight.training.synthetic.street import FPS, HEIGHT, WIDTH, at_dusk, place_cameras, simulate_walks

START_S = 1_772_488_800.0


@pytest.fixture(scope="module")
def clear() -> SimulatedCamera:
    """A camera without noise and blur, so that pixels can be compared."""
    [camera] = place_cameras(1, np.random.default_rng(3))
    return dataclasses.replace(camera, noise=0.0, blur=0.0, rows=HEIGHT)


@pytest.fixture(scope="module")
def view(clear: SimulatedCamera) -> CameraView:
    rng = np.random.default_rng(5)
    walks = simulate_walks(range(6), clear, 3.0, rng)
    return CameraView(clear, sample_people(6, rng, world="site"), walks, seed=7)


def test_boxes_are_where_the_image_differs_from_the_empty_street(view: CameraView, clear: SimulatedCamera) -> None:
    alone = CameraView(clear, view.cast, view.walks[:1], seed=7)
    empty = alone.frame(alone.seconds).pixels.astype(int)
    seen = 0
    for time_s in np.arange(0, alone.seconds, 0.7):
        frame = alone.frame(float(time_s))
        changed = np.abs(frame.pixels.astype(int) - empty).max(2) > 6
        if not frame.people:
            continue
        seen += 1
        [person] = frame.people
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(np.subtract(found, person.box)).max() <= 3
        assert person.visible == 1.0 and person.person == 0
    assert seen >= 5


def test_people_cover_each_other(view: CameraView) -> None:
    covered = 0
    for frame in view.frames():
        spots = {number: view.walks[number] for number in (s.walk for s in frame.people)}
        assert len(spots) == len(frame.people)
        covered += sum(person.visible < 0.8 for person in frame.people)
        for left, top, right, bottom in (s.box for s in frame.people):
            assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
    assert covered >= 3
    overlapping = [pair for pair in combinations(view.walks, 2) if pair[0].end_s > pair[1].start_s]
    assert len(overlapping) >= 5


def test_people_enter_and_leave_at_the_sides_and_some_walk_back(view: CameraView) -> None:
    boxes: dict[int, list[tuple[int, int, int, int]]] = {}
    for frame in view.frames():
        for person in frame.people:
            boxes.setdefault(person.walk, []).append(person.box)
    assert sorted(boxes) == list(range(6))
    crossed = []
    for places in boxes.values():
        (first, last) = ([left == 0, right == WIDTH] for left, _, right, _ in (places[0], places[-1]))
        assert sum(first) == sum(last) == 1
        crossed.append(first != last)
        tall = [bottom - top for left, top, right, bottom in places if left > 0 and right < WIDTH]
        assert 50 < min(tall) and max(tall) < 190
    assert 0 < sum(crossed) < 6


def test_dusk_is_darker(clear: SimulatedCamera, view: CameraView) -> None:
    evening = CameraView(at_dusk(clear), view.cast, view.walks, seed=7)
    assert evening.frame(5.0).pixels.mean() < 0.85 * view.frame(5.0).pixels.mean()


def test_the_simulated_detector_misses_hidden_people_and_is_inaccurate(view: CameraView) -> None:
    rng = np.random.default_rng(1)
    frames = [frame.people for frame in view.frames()]
    people = [person for present in frames for person in present]
    detections = [detection for present in frames for detection in simulate_detections(present, rng)]
    assert 0.8 * len(people) < len(detections) < 1.1 * len(people)
    assert all(0 <= d.box[0] < d.box[2] <= WIDTH and 0 < d.score < 1 for d in detections)
    hidden = [dataclasses.replace(person, visible=0.2) for person in people]
    assert len(simulate_detections(hidden, rng)) < 0.4 * len(people)


@pytest.fixture(scope="module")
def recorded(view: CameraView, tmp_path_factory: pytest.TempPathFactory) -> CameraVideo:
    return write_video(tmp_path_factory.mktemp("video"), "door", view.frames(), start_s=START_S, seed=2)


def test_the_video_can_be_decoded_and_has_its_creation_time(recorded: CameraVideo, view: CameraView) -> None:
    with av.open(str(recorded.video)) as container:
        assert container.metadata["creation_time"] == "2026-03-02T22:00:00.000000Z"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == FPS
    assert len(frames) == recorded.frames == int(np.ceil(view.seconds * FPS))
    drawn = view.frame(20 / FPS).pixels.astype(int)
    assert np.abs(frames[20].astype(int) - drawn).mean() < 5


def test_truth_and_detections_are_lines_of_json(recorded: CameraVideo) -> None:
    truth = [json.loads(line) for line in recorded.truth.read_text().splitlines()]
    detections = [json.loads(line) for line in recorded.detections.read_text().splitlines()]
    assert {tuple(row) for row in detections} == {("frame", "box", "score")}
    assert {row["person"] for row in truth} == set(range(6))
    assert all(0 <= row["frame"] < recorded.frames for row in truth + detections)
    assert [row["frame"] for row in detections] == sorted(row["frame"] for row in detections)


def test_the_same_seed_gives_the_same_video(recorded: CameraVideo, view: CameraView, tmp_path: Path) -> None:
    again = CameraView(view.camera, view.cast, view.walks, seed=7)
    other = write_video(tmp_path, "door", again.frames(), start_s=START_S, seed=2)
    assert other.truth.read_bytes() == recorded.truth.read_bytes()
    assert other.detections.read_bytes() == recorded.detections.read_bytes()
    assert other.video.read_bytes() == recorded.video.read_bytes()
