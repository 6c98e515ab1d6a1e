"""Tracks: walkers who cross keep their numbers, gaps and strangers get new ones, and a quiet moment forgets all."""

from __future__ import annotations

import numpy as np
import pytest
from walkers import CROSSING, Walker

from resight.training.ingest.boxes import Boxes, make_boxes
from resight.training.ingest.tracks import LOST_S, ByteTracker, GivenTracker, Tracker, make_tracker

FPS = 5.0


def boxes_at(
    walkers: tuple[Walker, ...], frame: int, rng: np.random.Generator, noise: float = 1.5
) -> tuple[Boxes, list[int]]:
    """Boxes in an order by chance, jittered as a detector's are, and whose each is."""
    there = [number for number, walker in enumerate(walkers) if walker.box(frame) is not None]
    rng.shuffle(there)
    xyxy = [np.array(walkers[number].box(frame)) + rng.normal(0, noise, 4) for number in there]
    return make_boxes(xyxy, np.full(len(there), 0.9), there), there


def run(tracks: Tracker, walkers: tuple[Walker, ...], frames: int, *, seed: int = 0, first_s: float = 1.7e9):
    """Who got which number in which frame: a list of (frame, walker, number), and the order in which tracks ended."""
    rng = np.random.default_rng(seed)
    numbered, ended = [], []
    for frame in range(frames):
        boxes, there = boxes_at(walkers, frame, rng)
        numbers = tracks.update(boxes, first_s + frame / FPS)
        numbered += [(frame, walker, int(number)) for walker, number in zip(there, numbers, strict=True)]
        ended += tracks.ended()
    return numbered, ended


@pytest.mark.parametrize("seed", range(5))
def test_people_who_cross_keep_their_numbers(seed: int) -> None:
    numbered, ended = run(ByteTracker(fps=FPS, start_score=0.5), CROSSING, 90, seed=seed)
    for walker in range(3):
        numbers = [number for _, who, number in numbered if who == walker]
        assert numbers[0] == -1 and len(set(numbers[1:])) == 1, numbers  # a single box is no track yet
    of = {who: number for _, who, number in numbered if number >= 0}
    assert sorted(of.values()) == [0, 1, 2] and sorted(ended) == [0, 1, 2]


def test_low_scored_boxes_extend_tracks_and_do_not_start_them() -> None:
    tracks = ByteTracker(fps=FPS, start_score=0.5)
    walker = Walker(0, 20, 10, 200)
    for frame in range(20):
        score = 0.9 if frame < 4 else 0.2
        boxes = make_boxes([walker.box(frame), [250, 10, 290, 100]], [score, 0.3])
        numbers = tracks.update(boxes, frame / FPS).tolist()
        assert numbers == ([-1, -1] if frame == 0 else [0, -1])


@pytest.mark.parametrize("mode", ["own", "given"])
def test_a_person_absent_for_more_than_a_second_gets_a_new_track(mode) -> None:
    away = round(LOST_S * FPS)
    for gap, expected in ((away - 1, 1), (away + 3, 2)):
        tracks = make_tracker(mode, fps=FPS, start_score=0.5)
        numbers = set()
        for frame in [*range(6), *range(6 + gap, 12 + gap)]:
            there = make_boxes([[100, 50, 150, 150]], [0.9], [7])
            numbers |= set(tracks.update(there, frame / FPS).tolist()) - {-1}
        assert len(numbers) == expected, (gap, numbers)


@pytest.mark.parametrize("mode", ["own", "given"])
def test_after_an_idle_frame_a_new_tracker_gives_the_same_tracks(mode) -> None:
    """A resumed run relies on this: later tracks do not depend on earlier frames."""
    rng = np.random.default_rng(3)
    whole = make_tracker(mode, fps=FPS, start_score=0.5)
    idle = []
    numbered = []
    seen = [boxes_at(CROSSING, frame, rng)[0] for frame in range(90)]
    for frame, boxes in enumerate(seen):
        if whole.idle:
            idle.append(frame)
        numbered.append(whole.update(boxes, frame / FPS))
    starts = [frame for frame in idle if 35 < frame < 46]
    assert starts
    for start in starts:
        fresh = make_tracker(mode, fps=FPS, start_score=0.5)
        for frame in range(start, 90):
            found, expected = fresh.update(seen[frame], frame / FPS), numbered[frame]
            assert ((found == -1) == (expected == -1)).all()
            assert set(found[found >= 0].tolist()) <= {0} and set(expected[expected >= 0].tolist()) <= {2}


def test_given_tracks_are_used() -> None:
    numbered, ended = run(GivenTracker(), CROSSING, 90)
    assert {(who, number) for _, who, number in numbered} == {(0, 0), (1, 1), (2, 2)}
    assert ended == [0, 1, 2]
    assert GivenTracker().update(make_boxes([[0, 0, 9, 9]], [1]), 0.0).tolist() == [-1]


def test_frames_without_boxes_are_accepted() -> None:
    tracks = ByteTracker(fps=FPS, start_score=0.5)
    assert tracks.update(make_boxes([], []), 0.0).tolist() == [] and tracks.idle and tracks.ended() == []


def test_a_gap_in_the_footage_ends_tracks() -> None:
    tracks = ByteTracker(fps=FPS, start_score=0.5)
    there = make_boxes([[100, 50, 150, 150]], [0.9])
    for time_s in (0.0, 0.2, 0.4):
        tracks.update(there, time_s)
    assert tracks.update(there, 60.0).tolist() == [-1]
    assert tracks.ended() == [0]
