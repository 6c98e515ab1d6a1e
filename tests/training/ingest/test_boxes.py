"""Boxes: clipping to the frame, and occlusion compared with painted pixels."""

from __future__ import annotations

import numpy as np
import pytest

from resight.training.ingest.boxes import OCCLUSION_GRID, make_boxes


def hidden_by_painting(xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of each box's pixels that boxes with a lower bottom edge cover, pixel by pixel."""
    shares = []
    for left, top, right, bottom in xyxy.astype(int):
        covered = np.zeros((height, width), bool)
        for a, b, c, d in xyxy.astype(int):
            if d > bottom:
                covered[b:d, a:c] = True
        shares.append(covered[top:bottom, left:right].mean())
    return np.array(shares)


@pytest.mark.parametrize("seed", range(6))
def test_hidden_equals_painting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corner, sides = rng.integers(0, 200, (9, 2)), rng.integers(30, 150, (9, 2))
    xyxy = np.concatenate([corner, corner + sides], 1).astype(float)
    found = make_boxes(xyxy, np.ones(9)).hidden
    np.testing.assert_allclose(
        found, hidden_by_painting(xyxy, 400, 400), atol=1 / OCCLUSION_GRID[0] + 1 / OCCLUSION_GRID[1]
    )


def test_the_nearer_box_hides_the_other_and_equal_boxes_do_not() -> None:
    boxes = make_boxes([[0, 0, 10, 20], [5, 0, 15, 30], [0, 0, 10, 20]], [1, 1, 1])
    assert boxes.hidden.tolist() == [0.5, 0.0, 0.5]
    assert len(make_boxes([], []).hidden) == 0


def test_boxes_are_clipped_to_the_frame_and_invalid_ones_are_dropped() -> None:
    xyxy = [[-5, -5, 5, 5], [90, 40, 130, 70], [100, 0, 120, 10], [np.nan, 0, 9, 9], [3, 3, 3.5, 9], [5, 5, 1, 1]]
    boxes = make_boxes(xyxy, np.linspace(0.1, 0.6, 6), [7, 8, 9, 1, 2, 3]).within(50, 100)
    assert boxes.xyxy.tolist() == [[0, 0, 5, 5], [90, 40, 100, 50]]
    assert boxes.given.tolist() == [7, 8] and boxes.scores.tolist() == [0.1, 0.2]


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 boxes, 1 scores"):
        make_boxes([[0, 0, 1, 1]] * 2, [1])
