"""Line charts of the metrics of training epochs: groups of metrics with titles and explanations.

A new metric in the history needs no entry here: it is drawn in the group whose pattern it matches, else in a separate
chart.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from resight.training.report.svg import (
    SERIES_COLOURS,
    colour,
    draw_svg,
    finite_or_nan,
    format_number,
    number_axes,
    set_title,
)

WIDTH, HEIGHT = 340, 190  # of a chart's view box
ZERO_BASED_BELOW = 0.6  # the axis starts at 0 where the least value is under this share of the largest
Series = Mapping[str, Sequence[float | None]]


def line_chart(title: str, series: Series, stages: Sequence[str]) -> Markup:
    """Draw one line per entry of ``series`` over the epochs of all stages, one after the other.

    Args:
        title: what the chart shows, with its unit; read out by screen readers.
        series: name -> one value per epoch row, at least one of them finite; None or a non-finite value leaves a gap.
        stages: the stage of each row; a thin rule marks where it changes, and lines end there.
    """
    starts = [i for i in range(len(stages)) if i == 0 or stages[i] != stages[i - 1]]
    spans = list(zip(starts, [*starts[1:], len(stages)], strict=True))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        values = [finite_or_nan(value) for line in series.values() for value in line]
        finite = [value for value in values if math.isfinite(value)]
        for index, (name, line) in enumerate(series.items()):
            for start, stop in spans:  # the next stage starts from other weights
                part = [finite_or_nan(value) for value in line[start:stop]]
                if any(map(math.isfinite, part)):
                    shown = colour(f"s{index % SERIES_COLOURS}")
                    drawn = axes.plot(range(start, stop), part, color=shown, marker="o")
                    set_title(drawn[0], f"{stages[start]}, {name}")
        axes.set_xticks([(start + stop - 1) / 2 for start, stop in spans], [stages[start] for start in starts])
        axes.tick_params(axis="x", length=0)
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=colour("junk"), linestyle=":", linewidth=1)
        number_axes(axes, "y")
        if 0 <= min(finite) < ZERO_BASED_BELOW * max(finite):
            axes.set_ylim(bottom=0)

    return draw_svg(title, WIDTH, HEIGHT, paint)


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
    """A drawn chart with its title, hint and legend."""

    title: str
    hint: str
    legend: Sequence[str]
    svg: Markup


CHART_GROUPS = (  # a metric belongs to the first group that matches
    ChartGroup(
        "Loss",
        "loss|loss_.*|.*_loss|contrast|guidance|relation|offline|online",
        "What training minimises: it should fall and level off. Each stage starts again.",
    ),
    ChartGroup(
        "Clusters",
        "clusters|proxies|.*_(clusters|proxies|count)",
        "The number of people found by clustering: it should settle near the number of people of the site.",
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
        "1 is perfect. The truth is only used to measure, never to train.",
    ),
    ChartGroup(
        "Search quality",
        "mAP|mINP|rank_?\\d+|.*_(mAP|mINP|rank_?\\d+)",
        "Measured on query and gallery: higher is better.",
    ),
    ChartGroup("Clustering radius eps", "eps|eps_.*", "Crops nearer than this join."),
    ChartGroup("Learning rate", "lr|lr_.*", "The schedule of the recipe."),
    ChartGroup("Images per second", ".*_per_s", "Speed of training alone, without labelling."),
    ChartGroup("Seconds an epoch", ".*_s", "Time of the parts of an epoch."),
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

    Values that are not finite numbers are omitted, and so is a loss term that is 0 in all epochs of a stage: a teacher
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
    """The finite metrics of one row of the history."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "epoch" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def epoch_charts(epochs: Sequence[EpochRow]) -> list[Chart]:
    """Draw a chart for each group with metrics that change; none for a single epoch or flat lines."""
    stages = [row.stage for row in epochs]
    drawn = []
    for group, names in figures_by_group(epochs).items():
        scale = 100 if group.percent else 1
        lines = {name: [_scaled(row.figures.get(name), scale) for row in epochs] for name in names}
        if any(len({value for value in line if value is not None}) > 1 for line in lines.values()):
            series = {figure_label(name): line for name, line in lines.items()}
            legend = list(series) if len(series) > 1 else []
            drawn.append(Chart(group.title, group.hint, legend, line_chart(group.title, series, stages)))
    return drawn


def constant_figures(epochs: Sequence[EpochRow]) -> dict[str, str]:
    """Figures of two or more epochs that are the same in all: label -> value, for a table instead of a chart."""
    constant: dict[str, str] = {}
    for group, names in figures_by_group(epochs).items():
        values = {name: {row.figures[name] for row in epochs if name in row.figures} for name in names}
        if len(epochs) > 1 and all(len(found) == 1 for found in values.values()):
            constant |= {group_label(group, name): format_number(min(values[name])) for name in names}
    return constant


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
    """A metric's name outside its chart."""
    return (
        name.replace("_", " ")
        if figure_label(name) in ("found", "by chance") or group.title == "Loss"
        else figure_label(name)
    )


def _group_of(name: str) -> ChartGroup:
    """The group of a metric."""
    own = ChartGroup(figure_label(name)[:1].upper() + figure_label(name)[1:], re.escape(name))
    return next((group for group in CHART_GROUPS if re.fullmatch(group.pattern, name)), own)


def _is_loss_term(name: str) -> bool:
    """Whether a figure is a term of the loss."""
    return _group_of(name) is CHART_GROUPS[0]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value
