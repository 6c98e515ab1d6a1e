"""The drawings of a verdict, parsed from their SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
from drawings import theme_colours, titled_groups

from resight.image import ImageSpec
from resight.training.judging.latency import LATENCY_BATCH, measure_latency
from resight.training.judging.separation import Estimate
from resight.training.report.verdict import draw_forest, draw_similarities


def test_a_forest_plot_has_a_row_per_metric_coloured_by_direction() -> None:
    changes = {
        "auc": Estimate(0.02, 0.01, 0.03), "reference.auc": Estimate(-0.02, -0.03, -0.01),
        "cameras.<b>.auc": Estimate(0.0, -0.01, 0.01),
    }  # fmt: skip
    drawn = draw_forest(changes)
    dots = titled_groups(drawn)
    assert list(dots) == [
        "auc: +0.0200, +0.0100 to +0.0300",
        "reference.auc: -0.0200, -0.0300 to -0.0100",
        "cameras.<b>.auc: +0.0000, -0.0100 to +0.0100",
    ]
    assert [theme_colours(dot) for dot in dots.values()] == [{"right"}, {"wrong"}, {"other"}]
    x = [float(dot.find(".//use").get("x", "")) for dot in dots.values()]  # type: ignore[union-attr]
    assert x[1] < x[2] < x[0]
    assert "cameras.<b>.auc" in [text.text for text in ElementTree.fromstring(drawn).iter("text")]


def test_a_forest_plot_without_changes_is_drawn() -> None:
    assert list(titled_groups(draw_forest({"auc": Estimate(0.0, 0.0, 0.0)}))) == ["auc: +0.0000, +0.0000 to +0.0000"]


def test_histograms_share_an_axis_and_have_their_peaks_where_the_pairs_are() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.7, 0.1, 500).astype(np.float32), rng.normal(0.2, 0.1, 300).astype(np.float32)
    outlines = titled_groups(draw_similarities({"candidate": (one, two), "active model": (two, one)}))
    assert list(outlines) == [
        f"{model}, pairs of {kind}"
        for model in ("candidate", "active model")
        for kind in ("one track", "certainly two persons")
    ]
    assert [theme_colours(outline) for outline in outlines.values()] == [{"s0"}, {"s1"}, {"s0"}, {"s1"}]
    peaks = []
    for outline in outlines.values():
        numbers = re.findall(r"[-\d.]+", outline.find(".//path").get("d", ""))  # type: ignore[union-attr]
        points = [(float(x), float(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
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
