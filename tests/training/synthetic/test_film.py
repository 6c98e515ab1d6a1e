"""Synthetic film: the truth beside it is true, people overlap and cross, and the files say when they were taken."""

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
    """A camera that changes nothing but sharpness, so that pixels can be compared."""
    [camera] = place_cameras(1, np.random.default_rng(3))
    return dataclasses.replace(camera, noise=0.0, blur=0.0, rows=HEIGHT)


@pytest.fixture(scope="module")
def view(clear: SimulatedCamera) -> CameraView:
    rng = np.random.default_rng(5)
    walks = simulate_walks(range(6), clear, 3.0, rng)
    return CameraView(clear, sample_people(6, rng, world="site"), walks, seed=7)


def test_a_box_is_where_the_picture_differs_from_the_empty_street(view: CameraView, clear: SimulatedCamera) -> None:
    alone = CameraView(clear, view.cast, view.walks[:1], seed=7)
    empty = alone.shot(alone.seconds).pixels.astype(int)
    seen = 0
    for time_s in np.arange(0, alone.seconds, 0.7):
        shot = alone.shot(float(time_s))
        changed = np.abs(shot.pixels.astype(int) - empty).max(2) > 6
        if not shot.sightings:
            continue
        seen += 1
        [sighting] = shot.sightings
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert np.abs(np.subtract(found, sighting.box)).max() <= 3
        assert sighting.visible == 1.0 and sighting.person == 0
    assert seen >= 5


def test_people_cover_one_another_and_the_nearer_one_is_seen_whole(view: CameraView) -> None:
    covered = 0
    for shot in view.shots():
        spots = {number: view.walks[number] for number in (s.walk for s in shot.sightings)}
        assert len(spots) == len(shot.sightings)
        covered += sum(sighting.visible < 0.8 for sighting in shot.sightings)
        for left, top, right, bottom in (s.box for s in shot.sightings):
            assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
    assert covered >= 3
    overlapping = [pair for pair in combinations(view.walks, 2) if pair[0].end_s > pair[1].start_s]
    assert len(overlapping) >= 5


def test_everybody_enters_and_leaves_at_a_side_and_some_go_back(view: CameraView) -> None:
    boxes: dict[int, list[tuple[int, int, int, int]]] = {}
    for shot in view.shots():
        for sighting in shot.sightings:
            boxes.setdefault(sighting.walk, []).append(sighting.box)
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
    assert evening.shot(5.0).pixels.mean() < 0.85 * view.shot(5.0).pixels.mean()


def test_a_detector_misses_who_is_hidden_and_is_a_little_off(view: CameraView) -> None:
    rng = np.random.default_rng(1)
    shots = [shot.sightings for shot in view.shots()]
    people = [sighting for sightings in shots for sighting in sightings]
    told = [detection for sightings in shots for detection in simulate_detections(sightings, rng)]
    assert 0.8 * len(people) < len(told) < 1.1 * len(people)
    assert all(0 <= d.box[0] < d.box[2] <= WIDTH and 0 < d.score < 1 for d in told)
    hidden = [dataclasses.replace(sighting, visible=0.2) for sighting in people]
    assert len(simulate_detections(hidden, rng)) < 0.4 * len(people)


@pytest.fixture(scope="module")
def reel(view: CameraView, tmp_path_factory: pytest.TempPathFactory) -> CameraVideo:
    return write_video(tmp_path_factory.mktemp("reel"), "door", view.shots(), start_s=START_S, seed=2)


def test_the_film_can_be_played_and_says_when_it_was_taken(reel: CameraVideo, view: CameraView) -> None:
    with av.open(str(reel.video)) as container:
        assert container.metadata["creation_time"] == "2026-03-02T22:00:00.000000Z"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == FPS
    assert len(frames) == reel.frames == int(np.ceil(view.seconds * FPS))
    drawn = view.shot(20 / FPS).pixels.astype(int)
    assert np.abs(frames[20].astype(int) - drawn).mean() < 5


def test_truth_and_detections_are_lines_of_json(reel: CameraVideo) -> None:
    truth = [json.loads(line) for line in reel.truth.read_text().splitlines()]
    told = [json.loads(line) for line in reel.detections.read_text().splitlines()]
    assert {tuple(row) for row in told} == {("frame", "box", "score")}
    assert {row["person"] for row in truth} == set(range(6))
    assert all(0 <= row["frame"] < reel.frames for row in truth + told)
    assert [row["frame"] for row in told] == sorted(row["frame"] for row in told)


def test_the_same_seed_films_the_same(reel: CameraVideo, view: CameraView, tmp_path: Path) -> None:
    again = CameraView(view.camera, view.cast, view.walks, seed=7)
    other = write_video(tmp_path, "door", again.shots(), start_s=START_S, seed=2)
    assert other.truth.read_bytes() == reel.truth.read_bytes()
    assert other.detections.read_bytes() == reel.detections.read_bytes()
    assert other.video.read_bytes() == reel.video.read_bytes()
