"""Line charts as inline SVG, for the report page.

Written by hand because a page that must load nothing and follow the reader's light or dark theme
needs strokes that take their colour from the page's own style sheet; a plotting library bakes
colours and fonts in. Every point carries a ``<title>``, so a pointer or a screen reader finds its value.

An epoch's figures as charts: which figures share one, what it is called and how it is read.

A new figure in the history needs no line here: it joins the group whose pattern it matches, else it gets a chart
of its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 340, 190  # viewBox units; the style sheet scales the drawing to its column
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 18, 24
SERIES_COLOURS = 8  # classes s0..s7 in page.css.j2

Point = tuple[float, float, str]  # x, y and its description
Series = Mapping[str, Sequence[float | None]]


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    exponent = math.floor(math.log10(span / at_most))
    step = next(s for s in (m * 10.0**exponent for m in (1, 2, 5, 10, 20)) if span / s <= at_most - 1 or s >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def format_number(value: float) -> str:
    """Write a figure shortly: four significant digits, thousands grouped, no exponent within reading range."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def finite_values(values: Sequence[float | None]) -> list[float]:
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
    values = [v for line in series.values() for v in finite_values(line)]
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
                LEFT - 6, y(mark) + 3.5, format_number(mark)
            )
        )
    parts += _stage_marks(stages, [x(i) for i in range(len(stages))])
    for index, (name, line) in enumerate(series.items()):
        points = [
            (x(i), y(v), f"{stages[i]} epoch {epochs[i]}, {name}: {format_number(v)}") if v is not None else None
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


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one stage. ``figures`` are finite; those called a share are in [0, 1]."""

    stage: str
    epoch: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChartGroup:
    """Figures that share a chart: those whose names match ``pattern`` wholly. ``percent`` multiplies by 100."""

    title: str
    pattern: str
    hint: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn chart with the words around it."""

    title: str
    hint: str
    legend: Sequence[str]
    svg: Markup


CHART_GROUPS = (  # the first that matches takes a figure
    ChartGroup(
        "Loss",
        "loss|loss_.*|.*_loss|contrast|guidance|relation|offline|online",
        "What training minimises: it should fall and level off. A new stage starts anew.",
    ),
    ChartGroup(
        "Clusters",
        "clusters|proxies|.*_(clusters|proxies|count)",
        "How many people the clustering sees: it should settle near the number of people of the site.",
    ),
    ChartGroup(
        "Cameras per cluster",
        "(chance_)?cameras_per_cluster",
        "People walk past several cameras, walls do not: higher is better. By chance is what shuffled cameras give.",
    ),
    ChartGroup(
        "Clusters seen by several cameras, %",
        "(chance_)?many_camera_share",
        "Higher is better. By chance is what shuffled cameras give.",
        percent=True,
    ),
    ChartGroup(
        "Stability of the labels",
        "stability.*",
        "Agreement with the labels of the epoch before: 0 is chance, 1 is no change. It should rise.",
    ),
    ChartGroup(
        "Silhouette",
        ".*silhouette.*",
        "How much nearer crops are to their own cluster than to the next: 0 is no structure, 1 is perfect.",
    ),
    ChartGroup(
        "Share of crops, %", ".*_share", "All should be small; a rising largest cluster is a collapse.", percent=True
    ),
    ChartGroup(
        "Agreement with the true people",
        "nmi|ari|true_.*",
        "1 is perfect. The truth was only measured with, never trained on.",
    ),
    ChartGroup(
        "Search quality",
        "mAP|mINP|rank_?\\d+|.*_(mAP|mINP|rank_?\\d+)",
        "Measured on query and gallery: higher is better.",
    ),
    ChartGroup("Clustering radius eps", "eps|eps_.*", "Crops nearer than this join."),
    ChartGroup("Learning rate", "lr|lr_.*", "The schedule of the recipe."),
    ChartGroup("Images per second", ".*_per_s", "Speed of training alone, without labelling."),
    ChartGroup("Seconds an epoch", ".*_s", "What an epoch's time went to."),
)
FIGURE_LABELS = {
    "outlier_share": "outliers",
    "largest_share": "largest cluster",
    "moved_share": "moved in or out",
    "cameras_per_cluster": "found",
    "chance_cameras_per_cluster": "by chance",
    "many_camera_share": "found",
    "chance_many_camera_share": "by chance",
    "stability_ari": "ARI",
    "stability_nmi": "NMI",
    "nmi": "NMI",
    "ari": "ARI",
    "lr": "learning rate",
    "images_per_s": "images/s",
    "label_s": "labelling",
    "label": "labelling",
    "train_s": "training",
    "train": "training",
}


def epoch_rows(history: Sequence[Mapping[str, Any]]) -> list[EpochRow]:
    """A checkpoint's history as rows.

    What is no finite number is left out, and so is a term of the loss that is 0 in all epochs of a stage: a teacher
    has no guidance.
    """
    rows = [EpochRow(str(row["stage"]), int(row["epoch"]), _finite(row)) for row in history]
    active = {
        (row.stage, name)
        for row in rows
        for name, value in row.figures.items()
        if value != 0 or not _is_loss_term(name)
    }
    return [replace(row, figures={n: v for n, v in row.figures.items() if (row.stage, n) in active}) for row in rows]


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one line of the history."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "epoch" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def epoch_charts(epochs: Sequence[EpochRow]) -> list[Chart]:
    """Draw a chart for each group with figures that change; a single epoch, or a flat line, shows nothing."""
    stages, numbers = [row.stage for row in epochs], [row.epoch for row in epochs]
    drawn = []
    for group, names in figures_by_group(epochs).items():
        scale = 100 if group.percent else 1
        lines = {name: [_scaled(row.figures.get(name), scale) for row in epochs] for name in names}
        if any(len(set(finite_values(line))) > 1 for line in lines.values()):
            series = {figure_label(name): line for name, line in lines.items()}
            legend = list(series) if len(series) > 1 else []
            drawn.append(Chart(group.title, group.hint, legend, line_chart(group.title, series, stages, numbers)))
    return drawn


def constant_figures(epochs: Sequence[EpochRow]) -> dict[str, str]:
    """Figures of two or more epochs that are the same in all: label -> value, shown as text instead of a chart."""
    told: dict[str, str] = {}
    for group, names in figures_by_group(epochs).items():
        values = {name: {row.figures[name] for row in epochs if name in row.figures} for name in names}
        if len(epochs) > 1 and all(len(found) == 1 for found in values.values()):
            told |= {group_label(group, name): format_number(min(values[name])) for name in names}
    return told


def figures_by_group(epochs: Sequence[EpochRow]) -> dict[ChartGroup, list[str]]:
    """The names of all figures by group: groups in the order of `CHART_GROUPS`, then unknown figures one by one."""
    names = dict.fromkeys(name for row in epochs for name in row.figures)
    found: dict[ChartGroup, list[str]] = defaultdict(list)
    for name in names:
        found[_group_of(name)].append(name)
    return {
        group: found[group] for group in [*CHART_GROUPS, *(g for g in found if g not in CHART_GROUPS)] if group in found
    }


def figure_label(name: str) -> str:
    """A figure's name within its chart."""
    return FIGURE_LABELS.get(name, name.replace("_", " "))


def group_label(group: ChartGroup, name: str) -> str:
    """A figure's name where no chart's title stands above it."""
    return (
        name.replace("_", " ")
        if figure_label(name) in ("found", "by chance") or group.title == "Loss"
        else figure_label(name)
    )


def _group_of(name: str) -> ChartGroup:
    """Where a figure belongs."""
    own = ChartGroup(figure_label(name)[:1].upper() + figure_label(name)[1:], re.escape(name))
    return next((group for group in CHART_GROUPS if re.fullmatch(group.pattern, name)), own)


def _is_loss_term(name: str) -> bool:
    """Whether a figure is a term of the loss."""
    return _group_of(name) is CHART_GROUPS[0]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value
