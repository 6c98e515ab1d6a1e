"""The report: one self-contained HTML page about one adaptation.

Last step of the road. It takes plain figures and JPEG bytes (never a model or a store), so that
whoever ran the adaptation, in this process or through the service, can fill it in. The page
loads nothing: images are data URIs, curves are inline SVG, and a content security policy forbids the rest.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from resight.training.charts import EpochRow, charts, group_label, grouped, unchanging
from resight.training.curves import number
from resight.training.scatter import EmbeddingMap, panels

Verdict = Literal["right", "wrong", "junk"]

SCORE_NAMES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


@dataclass(frozen=True)
class Crop:
    """An image of one person: encoded bytes (JPEG, PNG or WebP) and the name of its camera."""

    image: bytes = field(repr=False)
    camera: str


@dataclass(frozen=True)
class Cluster:
    """Some crops of one cluster.

    Attributes:
        label: its number.
        size: of all its crops.
        crops: those shown.
        cameras: how many see it.
        silhouette: in [-1, 1], see `resight.training.montage.tightness`.
        purity: share in [0, 1] of the most frequent true person; None where nobody knows the truth.
    """

    label: int
    size: int
    crops: Sequence[Crop]
    cameras: int
    silhouette: float
    purity: float | None = None


@dataclass(frozen=True)
class ClusterGroup:
    """Clusters chosen for one reason, and how to read them."""

    title: str
    hint: str
    clusters: Sequence[Cluster] = ()


@dataclass(frozen=True)
class Hit:
    """One search answer. ``junk`` is the same person seen by the query's own camera: neither right nor wrong."""

    image: bytes = field(repr=False)
    camera: str
    similarity: float
    verdict: Verdict


@dataclass(frozen=True)
class RankedList:
    """One query and its best hits, best first, by the initial and by the adapted model."""

    query: Crop
    before: Sequence[Hit] = ()
    after: Sequence[Hit] = ()


@dataclass(frozen=True)
class Report:
    """Everything the page can show; a part without data is left out.

    Attributes:
        title: what was adapted.
        summary: a sentence or two under the title.
        notes: what is missing on the page, and why.
        before, after: scores in percent under the keys ``mAP, rank1, rank5, rank10, mINP``.
        epochs: training in the order it happened.
        clusters: example clusters by the reason they are shown.
        map: where crops lie to one another.
        ranked: example queries with their hits.
        seconds: step -> seconds, in the order of the steps.
        config: the resolved recipe; nested mappings are shown with dotted names.
        model: facts of the model, for instance backbone, feature length, file size; nested mappings likewise.
    """

    title: str
    summary: str = ""
    notes: Sequence[str] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    epochs: Sequence[EpochRow] = ()
    clusters: Sequence[ClusterGroup] = ()
    map: EmbeddingMap | None = None
    ranked: Sequence[RankedList] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Write ``report`` to ``path`` as one HTML file, replacing it in one step.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    os.replace(partial, path)


def templates() -> Environment:
    """The templates beside this file; every string from outside is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(report: Report) -> str:
    """Return the page."""
    environment = templates()
    environment.filters |= {"uri": data_uri, "number": number, "duration": duration}
    return environment.get_template("report.html.j2").render(
        report=report,
        scores=score_rows(report),
        charts=charts(report.epochs),
        unchanging=unchanging(report.epochs),
        epochs=epoch_table(report.epochs),
        panels=panels(report.map) if report.map is not None else [],
        config=dict(flatten(report.config)),
        model=dict(flatten(report.model)),
    )


def score_rows(report: Report) -> list[tuple[str, float | None, float | None]]:
    """Return (name, before, after) in percent for each score that either side has, in the house's order."""
    keys = [*SCORE_NAMES, *(k for k in {**report.before, **report.after} if k not in SCORE_NAMES)]
    rows = [(SCORE_NAMES.get(key, key), report.before.get(key), report.after.get(key)) for key in keys]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def epoch_table(epochs: Sequence[EpochRow]) -> tuple[list[str], list[list[str]]]:
    """Return the names of all figures, and for each epoch its name and every figure as text."""
    columns = {name: group_label(group, name) for group, names in grouped(epochs).items() for name in names}
    rows = [
        [f"{row.stage} {row.epoch}", *(number(row.figures[name]) if name in row.figures else "–" for name in columns)]
        for row in epochs
    ]
    return list(columns.values()), rows


def flatten(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted name, value as text) for every leaf of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            rows.append((f"{prefix}{key}", number(value)))
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def data_uri(image: bytes) -> str:
    """Return encoded image bytes as a ``data:`` URI; the type is read from the first bytes."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{b64encode(image).decode()}"


def duration(seconds: float) -> str:
    """Write seconds as people say them: 0.4 s, 12 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
