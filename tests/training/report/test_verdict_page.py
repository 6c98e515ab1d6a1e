"""The drawings of a verdict, parsed from their SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from resight.image import ImageSpec
from resight.training.judging.latency import LATENCY_BATCH, measure_latency
from resight.training.judging.separation import Estimate
from resight.training.report.verdict import draw_forest, draw_similarities


def test_a_forest_plot_has_a_row_per_metric_coloured_by_direction() -> None:
    changes = {
        "auc": Estimate(0.02, 0.01, 0.03), "reference.auc": Estimate(-0.02, -0.03, -0.01),
        "cameras.<b>.auc": Estimate(0.0, -0.01, 0.01),
    }  # fmt: skip
    drawn = ElementTree.fromstring(draw_forest(changes))
    dots = drawn.findall("circle")
    assert [dot.get("class") for dot in dots] == ["right", "wrong", "none"]
    bars = [list(map(float, re.split("[ ,]", line.get("points", "")))) for line in drawn.findall("polyline")]
    [zero] = [float(line.get("x1", "")) for line in drawn.findall("line") if line.get("class") == "stage"]
    for dot, bar, change in zip(dots, bars, changes.values(), strict=True):
        assert bar[0] < float(dot.get("cx", "")) < bar[2] and bar[1] == bar[3] == float(dot.get("cy", ""))
        assert (bar[0] > zero) == (change.low > 0) and (bar[2] < zero) == (change.high < 0)
    assert "cameras.<b>.auc" in [text.text for text in drawn.findall("text")]


def test_a_forest_plot_without_changes_is_drawn() -> None:
    assert ElementTree.fromstring(draw_forest({"auc": Estimate(0.0, 0.0, 0.0)})).findall("circle")


def test_histograms_share_an_axis_and_hold_every_pair() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.7, 0.1, 500).astype(np.float32), rng.normal(0.2, 0.1, 300).astype(np.float32)
    drawn = ElementTree.fromstring(draw_similarities({"candidate": (one, two), "active model": (two, one)}))
    outlines = drawn.findall("polyline")
    assert [line.get("class") for line in outlines] == ["s0", "s1", "s0", "s1"]
    peaks = []
    for line in outlines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        peaks.append(min(points, key=lambda point: point[1])[0])
    assert peaks[0] == peaks[3] > peaks[1] == peaks[2]


def test_both_models_are_timed_alternately_on_the_same_crops() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def model(name: str, side: int, work: int) -> tuple[ImageSpec, object]:
        def embed(pixels: np.ndarray) -> np.ndarray:
            seen.append((name, pixels.shape))
            return np.stack([np.sort(pixels.ravel()) for _ in range(work)]).astype(np.float32)

        return ImageSpec(side, side), embed

    crops = [np.full((40, 20, 3), value, np.uint8) for value in (10, 200)]
    found = measure_latency(model("before", 32, 1), model("after", 64, 8), crops, limit=1.1)  # type: ignore[arg-type]
    assert [name for name, _ in seen[:4]] == ["before", "after"] * 2
    assert {shape for _, shape in seen} == {(LATENCY_BATCH, 32, 32, 3), (LATENCY_BATCH, 64, 64, 3)}
    assert found.ratio > 4 and found.low <= found.ratio <= found.high and found.exceeded
    assert found.after_s > found.before_s > 0
