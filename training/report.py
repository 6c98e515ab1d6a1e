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
from markupsafe import Markup

from resight.training.curves import known, line_chart, number

Verdict = Literal["right", "wrong", "junk"]

SCORE_NAMES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


@dataclass(frozen=True)
class Crop:
    """An image of one person: encoded bytes (JPEG, PNG or WebP) and the name of its camera."""

    image: bytes = field(repr=False)
    camera: str


@dataclass(frozen=True)
class Cluster:
    """Some crops of one cluster. ``size`` counts all its crops; ``purity`` in [0, 1] where truth exists."""

    label: int
    size: int
    crops: Sequence[Crop]
    purity: float | None = None


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
class EpochRow:
    """One epoch of one stage. Shares, NMI and ARI are in [0, 1]; None where a figure does not exist."""

    stage: str
    epoch: int
    loss: Mapping[str, float] = field(default_factory=dict)
    lr: float | None = None
    clusters: int | None = None
    outlier_share: float | None = None
    largest_share: float | None = None
    nmi: float | None = None
    ari: float | None = None
    eps: float | None = None
    images_per_s: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything the page can show; a part without data is left out.

    Attributes:
        title: what was adapted.
        summary: a sentence or two under the title.
        before, after: scores in percent under the keys ``mAP, rank1, rank5, rank10, mINP``.
        epochs: training in the order it happened.
        clusters: example clusters.
        ranked: example queries with their hits.
        seconds: step -> seconds, in the order of the steps.
        config: the resolved recipe; nested mappings are shown with dotted names.
        model: facts of the exported model, for instance backbone, feature size, bundle size, parity.
    """

    title: str
    summary: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    epochs: Sequence[EpochRow] = ()
    clusters: Sequence[Cluster] = ()
    ranked: Sequence[RankedList] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A drawn chart with the words around it."""

    title: str
    legend: Sequence[str]
    svg: Markup


def write_report(path: Path, report: Report) -> None:
    """Write ``report`` to ``path`` as one HTML file, replacing it in one step.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    os.replace(partial, path)


def render(report: Report) -> str:
    """Return the page. Every string from outside is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"uri": data_uri, "number": number, "duration": duration}
    return environment.get_template("report.html.j2").render(
        report=report,
        scores=score_rows(report),
        charts=charts(report.epochs),
        config=dict(flatten(report.config)),
        model=dict(flatten(report.model)),
    )


def score_rows(report: Report) -> list[tuple[str, float | None, float | None]]:
    """Return (name, before, after) in percent for each score that either side has, in the house's order."""
    keys = [*SCORE_NAMES, *(k for k in {**report.before, **report.after} if k not in SCORE_NAMES)]
    rows = [(SCORE_NAMES.get(key, key), report.before.get(key), report.after.get(key)) for key in keys]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def charts(epochs: Sequence[EpochRow]) -> list[Chart]:
    """Draw a chart for each group of figures that has at least one value."""
    terms = dict.fromkeys(term for row in epochs for term in row.loss)
    groups: dict[str, dict[str, list[float | None]]] = {
        "Loss": {term: [row.loss.get(term) for row in epochs] for term in terms},
        "Clusters": {"clusters": [row.clusters for row in epochs]},
        "Share of crops, %": {
            "outliers": [_percent(row.outlier_share) for row in epochs],
            "largest cluster": [_percent(row.largest_share) for row in epochs],
        },
        "Agreement with the true people": {
            "NMI": [row.nmi for row in epochs],
            "ARI": [row.ari for row in epochs],
        },
        "Clustering radius eps": {"eps": [row.eps for row in epochs]},
        "Learning rate": {"learning rate": [row.lr for row in epochs]},
        "Images per second": {"images/s": [row.images_per_s for row in epochs]},
    }
    stages, numbers = [row.stage for row in epochs], [row.epoch for row in epochs]
    drawn = []
    for title, group in groups.items():
        series = {name: line for name, line in group.items() if known(line)}
        if series:
            legend = list(series) if len(series) > 1 else []
            drawn.append(Chart(title, legend, line_chart(title, series, stages, numbers)))
    return drawn


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


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
