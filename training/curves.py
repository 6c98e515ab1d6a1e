"""Line charts as inline SVG, for the report page.

Written by hand because a page that must load nothing and follow the reader's light or dark theme
needs strokes that take their colour from the page's own style sheet; a plotting library bakes
colours and fonts in. Every point carries a ``<title>``, so a pointer or a screen reader finds its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 340, 190  # viewBox units; the style sheet scales the drawing to its column
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 18, 24
SERIES_COLOURS = 8  # classes s0..s7 in page.css.j2

Point = tuple[float, float, str]  # x, y and the words told for it
Series = Mapping[str, Sequence[float | None]]


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    exponent = math.floor(math.log10(span / at_most))
    step = next(s for s in (m * 10.0**exponent for m in (1, 2, 5, 10, 20)) if span / s <= at_most - 1 or s >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Write a figure shortly: four significant digits, thousands grouped, no exponent within reading range."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def known(values: Sequence[float | None]) -> list[float]:
    """Return the finite values: a missing or non-finite figure is a gap in the line."""
    return [v for v in values if v is not None and math.isfinite(v)]


def line_chart(title: str, series: Series, stages: Sequence[str], epochs: Sequence[int]) -> Markup:
    """Draw one line per entry of ``series`` over the epochs of all stages, one after the other.

    Args:
        title: what the chart shows, with its unit; read out by screen readers.
        series: name -> one value per epoch row; None or a non-finite value leaves a gap.
        stages: the stage of each row; a thin rule marks where it changes.
        epochs: the epoch number of each row within its stage.

    Returns:
        An ``<svg>`` element that names no outside resource.
    """
    values = [v for line in series.values() for v in known(line)]
    assert values, f"a chart needs at least one finite value: {title}"
    low, high = min(values), max(values)
    marks = ticks(0.0 if 0 <= low < 0.6 * high else low, high)

    def x(i: int) -> float:
        inner = WIDTH - LEFT - RIGHT
        return LEFT + (inner * i / (len(stages) - 1) if len(stages) > 1 else inner / 2)

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (v - marks[0]) / (marks[-1] - marks[0])

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    for mark in marks:
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, y(mark), y(mark)
            )
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 6, y(mark) + 3.5, number(mark)
            )
        )
    parts += _stage_marks(stages, [x(i) for i in range(len(stages))])
    for index, (name, line) in enumerate(series.items()):
        points = [
            (x(i), y(v), f"{stages[i]} epoch {epochs[i]}, {name}: {number(v)}") if v is not None else None
            for i, v in enumerate(v if v is not None and math.isfinite(v) else None for v in line)
        ]
        parts += _line(_broken(points, stages), f"s{index % SERIES_COLOURS}")
    return Markup("").join([*parts, Markup("</svg>")])


def _broken(points: Sequence[Point | None], stages: Sequence[str]) -> list[Point | None]:
    """The points with a gap wherever a stage ends: the next one goes on from other weights."""
    parts: list[Point | None] = []
    for i, point in enumerate(points):
        parts += [None, point] if i and stages[i] != stages[i - 1] else [point]
    return parts


def _stage_marks(stages: Sequence[str], xs: Sequence[float]) -> list[Markup]:
    """Name each run of equal stages under the axis, with a rule between runs."""
    parts: list[Markup] = []
    start = 0
    for i in range(1, len(stages) + 1):
        if i < len(stages) and stages[i] == stages[start]:
            continue
        centre = (xs[start] + xs[i - 1]) / 2
        label = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        parts.append(label.format(centre, HEIGHT - 7, stages[start]))
        if i < len(stages):
            at = (xs[i - 1] + xs[i]) / 2
            rule = Markup('<line class="stage" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
            parts.append(rule.format(at, TOP - 8, HEIGHT - BOTTOM))
        start = i
    return parts


def _line(points: Sequence[Point | None], colour: str) -> list[Markup]:
    """Draw one series: a line over each unbroken run of points, then the points with their words."""
    parts: list[Markup] = []
    run: list[str] = []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]:.1f},{point[1]:.1f}")
        elif run:
            parts.append(Markup('<polyline class="{}" points="{}"/>').format(colour, " ".join(run)))
            run = []
    for x, y, words in filter(None, points):
        dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>'
        parts.append(Markup(dot).format(colour, x, y, words))
    return parts
