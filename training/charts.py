"""An epoch's figures as charts: which figures share one, what it is called and how it is read.

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

from resight.training.curves import known, line_chart, number


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one stage. ``figures`` are finite; those called a share are in [0, 1]."""

    stage: str
    epoch: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
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


GROUPS = (  # the first that matches takes a figure
    Group(
        "Loss",
        "loss|loss_.*|.*_loss|contrast|guidance|relation|offline|online",
        "What training minimises: it should fall and level off. A new stage starts anew.",
    ),
    Group(
        "Clusters",
        "clusters|proxies|.*_(clusters|proxies|count)",
        "How many people the clustering sees: it should settle near the number of people of the site.",
    ),
    Group(
        "Cameras per cluster",
        "(chance_)?cameras_per_cluster",
        "People walk past several cameras, walls do not: higher is better. By chance is what shuffled cameras give.",
    ),
    Group(
        "Clusters seen by several cameras, %",
        "(chance_)?many_camera_share",
        "Higher is better. By chance is what shuffled cameras give.",
        percent=True,
    ),
    Group(
        "Stability of the labels",
        "stability.*",
        "Agreement with the labels of the epoch before: 0 is chance, 1 is no change. It should rise.",
    ),
    Group(
        "Silhouette",
        ".*silhouette.*",
        "How much nearer crops are to their own cluster than to the next: 0 is no structure, 1 is perfect.",
    ),
    Group(
        "Share of crops, %", ".*_share", "All should be small; a rising largest cluster is a collapse.", percent=True
    ),
    Group(
        "Agreement with the true people",
        "nmi|ari|true_.*",
        "1 is perfect. The truth was only measured with, never trained on.",
    ),
    Group(
        "Search quality",
        "mAP|mINP|rank_?\\d+|.*_(mAP|mINP|rank_?\\d+)",
        "Measured on query and gallery: higher is better.",
    ),
    Group("Clustering radius eps", "eps|eps_.*", "Crops nearer than this join."),
    Group("Learning rate", "lr|lr_.*", "The schedule of the recipe."),
    Group("Images per second", ".*_per_s", "Speed of training alone, without labelling."),
    Group("Seconds an epoch", ".*_s", "What an epoch's time went to."),
)
LABELS = {
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
    active = {(row.stage, name) for row in rows for name, value in row.figures.items() if value != 0 or not _term(name)}
    return [replace(row, figures={n: v for n, v in row.figures.items() if (row.stage, n) in active}) for row in rows]


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one line of the history."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "epoch" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def charts(epochs: Sequence[EpochRow]) -> list[Chart]:
    """Draw a chart for each group with figures that change; a single epoch, or a flat line, shows nothing."""
    stages, numbers = [row.stage for row in epochs], [row.epoch for row in epochs]
    drawn = []
    for group, names in grouped(epochs).items():
        scale = 100 if group.percent else 1
        lines = {name: [_scaled(row.figures.get(name), scale) for row in epochs] for name in names}
        if any(len(set(known(line))) > 1 for line in lines.values()):
            series = {label(name): line for name, line in lines.items()}
            legend = list(series) if len(series) > 1 else []
            drawn.append(Chart(group.title, group.hint, legend, line_chart(group.title, series, stages, numbers)))
    return drawn


def unchanging(epochs: Sequence[EpochRow]) -> dict[str, str]:
    """Figures of two or more epochs that are the same in all: label -> value, told in words instead of a chart."""
    told: dict[str, str] = {}
    for group, names in grouped(epochs).items():
        values = {name: {row.figures[name] for row in epochs if name in row.figures} for name in names}
        if len(epochs) > 1 and all(len(found) == 1 for found in values.values()):
            told |= {group_label(group, name): number(min(values[name])) for name in names}
    return told


def grouped(epochs: Sequence[EpochRow]) -> dict[Group, list[str]]:
    """The names of all figures by group: groups in the order of `GROUPS`, then unknown figures one by one."""
    names = dict.fromkeys(name for row in epochs for name in row.figures)
    found: dict[Group, list[str]] = defaultdict(list)
    for name in names:
        found[_group(name)].append(name)
    return {group: found[group] for group in [*GROUPS, *(g for g in found if g not in GROUPS)] if group in found}


def label(name: str) -> str:
    """A figure's name within its chart."""
    return LABELS.get(name, name.replace("_", " "))


def group_label(group: Group, name: str) -> str:
    """A figure's name where no chart's title stands above it."""
    return name.replace("_", " ") if label(name) in ("found", "by chance") or group.title == "Loss" else label(name)


def _group(name: str) -> Group:
    """Where a figure belongs."""
    own = Group(label(name)[:1].upper() + label(name)[1:], re.escape(name))
    return next((group for group in GROUPS if re.fullmatch(group.pattern, name)), own)


def _term(name: str) -> bool:
    """Whether a figure is a term of the loss."""
    return _group(name) is GROUPS[0]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value
