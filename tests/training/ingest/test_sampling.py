"""Crops of a track: reasons to drop a box, similar boxes, the maximum number, and distribution over time."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from walkers import CROSSING, Walker, shots

from resight.image import decode
from resight.training.ingest.boxes import make_boxes
from resight.training.ingest.footage import Frame, FramePosition
from resight.training.ingest.sampling import CropCandidate, CropSampler, SamplingSettings

LOOSE = SamplingSettings(min_difference=0, min_gap_s=0)


def picture(seed: int = 0) -> np.ndarray:
    """Blocks of random colours, so that all parts differ."""
    blocks = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)
    return np.repeat(np.repeat(blocks, 10, 0), 10, 1)  # 300 x 400


def frame(number: int = 0, seed: int | None = None) -> Frame:
    return Frame(picture(number if seed is None else seed), FramePosition(number, number), 100 + number / 5)


@pytest.mark.parametrize(
    "box, score, other, reason",
    [
        ([50, 50, 90, 113.9], 0.9, None, "too small"),
        ([50, 50, 65, 150], 0.9, None, "too small"),
        ([50, 50, 90, 150], 0.49, None, "low score"),
        ([1, 50, 90, 150], 0.9, None, "cut off"),
        ([50, 0, 90, 150], 0.9, None, "cut off"),
        ([350, 50, 399, 150], 0.9, None, "cut off"),
        ([50, 180, 90, 300], 0.9, None, "cut off"),
        ([50, 50, 90, 150], 0.9, [50, 110, 90, 200], "hidden"),
    ],
)
def test_dropped_boxes_are_counted_by_reason(box, score, other, reason) -> None:
    sampler = CropSampler(SamplingSettings())
    boxes = make_boxes([box, *([other] if other else [])], [score, *([0.9] if other else [])])
    sampler.observe(frame(), boxes, [0, *([-1] if other else [])])
    assert sampler.dropped == {reason: 1, **({"no track": 1} if other else {})}
    assert sampler.close(0) == []


def test_a_partly_hidden_box_is_kept_with_a_lower_score() -> None:
    sampler = CropSampler(LOOSE)
    sampler.observe(frame(), make_boxes([[50, 50, 90, 150], [50, 130, 90, 200]], [0.9, 0.9]), [0, -1])
    (covered,) = sampler.close(0)
    sampler.observe(frame(), make_boxes([[50, 50, 90, 150]], [0.9]), [0])
    (alone,) = sampler.close(0)
    assert covered.score == pytest.approx(alone.score * (1 - 5 / 24), rel=1e-6)


def test_a_crop_has_the_pixels_of_its_box_and_is_a_valid_jpeg() -> None:
    sampler = CropSampler(SamplingSettings())
    sampler.observe(frame(), make_boxes([[50.6, 50.2, 99.5, 150.1]], [0.9]), [3])
    (kept,) = sampler.close(3)
    assert (kept.image == picture()[50:151, 50:100]).all()
    assert np.abs(decode(kept.jpeg()).astype(int) - kept.image).mean() < 3
    with Image.open(io.BytesIO(kept.jpeg())) as image:
        assert image.format == "JPEG"


def scores_of(candidates: list[CropCandidate]) -> list[float]:
    return [candidate.score for candidate in candidates]


def test_the_better_of_two_similar_crops_is_kept() -> None:
    for blurred_first in (True, False):
        sampler = CropSampler(SamplingSettings(min_gap_s=0))
        for number in range(2):
            image = picture(0)
            if (number == 0) == blurred_first:
                image = (image * 0.98).astype(np.uint8)
                sharp = np.asarray(Image.fromarray(image).resize((200, 150)).resize((400, 300)))
                image = sharp
            sampler.observe(
                Frame(image, FramePosition(number, number), 100 + number), make_boxes([[50, 50, 90, 150]], [0.9]), [0]
            )
        (kept,) = sampler.close(0)
        assert kept.position.number == (1 if blurred_first else 0) and sampler.dropped == {"near-duplicate": 1}


def test_crops_of_a_track_are_apart_in_time() -> None:
    sampler = CropSampler(SamplingSettings(crops_per_track=100))
    for number in range(20):
        sampler.observe(frame(number), make_boxes([[50, 50, 90, 150]], [0.9]), [0])
    times = np.diff([candidate.time_s for candidate in sampler.close(0)])
    assert len(times) > 3 and (times >= 0.4 - 1e-6).all()


def by_loops(offered: list[CropCandidate], settings: SamplingSettings) -> list[CropCandidate]:
    """Loop implementation of the selection."""
    kept: list[CropCandidate] = []
    for new in offered:
        similar = []
        for old in kept:
            difference = 0.0
            for row in range(16):
                for column in range(8):
                    difference += abs(int(new.thumbnail[row, column]) - int(old.thumbnail[row, column])) / 128
            if new.time_s - old.time_s < settings.min_gap_s - 1e-6 or difference < settings.min_difference:
                similar.append(old)
        if similar and max(scores_of(similar)) >= new.score:
            continue
        kept = [old for old in kept if old not in similar] + [new]
        if len(kept) > settings.crops_per_track:
            gaps = [two.time_s - one.time_s for one, two in pairwise(kept)] or [0.0]
            at = gaps.index(min(gaps))
            worst = min(kept[at : at + 2], key=lambda one: one.score)
            kept = [one for one in kept if one is not worst]
    return kept


@pytest.mark.parametrize(
    "settings", [SamplingSettings(), SamplingSettings(crops_per_track=3), SamplingSettings(crops_per_track=1), LOOSE]
)
def test_selection_equals_the_loop_implementation(settings: SamplingSettings) -> None:
    walker = Walker(0, 70, 10, 250)
    images = list(shots((walker,), 71))
    offered = []
    sampler = CropSampler(settings)
    for number, image in enumerate(images):
        seen = Frame(image, FramePosition(number, number), number / 5)
        boxes = make_boxes([walker.box(number)], [0.6 + (number * 37 % 40) / 100])
        sampler.observe(seen, boxes, [0])
        alone = CropSampler(LOOSE)
        alone.observe(seen, boxes, [0])
        offered += alone.close(0)
    found, expected = sampler.close(0), by_loops(offered, settings)
    assert [one.position for one in found] == [one.position for one in expected] and len(
        found
    ) <= settings.crops_per_track
    assert [one.time_s for one in found] == sorted(one.time_s for one in found)
    total = sum(sampler.dropped.values()) + len(found)
    assert total == len(images)  # every box is a crop or has a reason


def test_crops_are_spread_over_the_track() -> None:
    walker = Walker(0, 300, 10, 250)
    sampler = CropSampler(SamplingSettings(min_difference=0))
    for number in range(301):
        sampler.observe(
            Frame(picture(number % 7), FramePosition(number, number), number / 5),
            make_boxes([walker.box(number)], [0.9]),
            [0],
        )
    times = [candidate.time_s for candidate in sampler.close(0)]
    assert len(times) == 8 and times[0] < 15 and times[-1] > 45 and max(np.diff(times)) < 30


def test_tracks_are_kept_apart_and_forgotten() -> None:
    sampler = CropSampler(SamplingSettings())
    for number, image in enumerate(shots(CROSSING, 10)):
        there = [walker.box(number) for walker in CROSSING[:2]]
        rows = [row for row, box in enumerate(there) if box is not None]
        sampler.observe(
            Frame(image, FramePosition(number, number), number / 5),
            make_boxes([there[row] for row in rows], [0.9] * len(rows)),
            rows,
        )
    tracks = sampler.close_all()
    assert len(tracks) == 2 and all(tracks) and sampler.close_all() == []
