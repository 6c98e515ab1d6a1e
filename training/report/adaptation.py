"""The report of an adaptation, of `resight adapt` and of `resight demo`: one self-contained HTML page.

The page loads no external resources: images are data URIs, charts are inline SVG, and a content security policy forbids
everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from resight.arrays import Floats, Ints
from resight.bundle.bundle import Bundle
from resight.encoder.checkpoint import Checkpoint
from resight.errors import TrainingError
from resight.training.features.extract import extract_features
from resight.training.report.charts import (
    EpochRow,
    constant_figures,
    epoch_charts,
    epoch_rows,
    figure_label,
    figures_by_group,
    group_label,
)
from resight.training.report.embedding_map import EmbeddingMap, map_features, map_panels
from resight.training.report.montage import ClusterGroup, cluster_groups
from resight.training.report.page import Thumbnails, data_uri, flatten, format_duration, templates
from resight.training.report.ranked_lists import RankedList, SearchResults, ranked_lists
from resight.training.report.svg import format_number
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site

SCORE_NAMES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


@dataclass(frozen=True)
class AdaptationReport:
    """The content of the page; a part without data is omitted.

    Attributes:
        title: of the page.
        summary: a sentence or two under the title.
        notes: parts missing on the page, and why.
        before, after: scores in percent under the keys ``mAP, rank1, rank5, rank10, mINP``.
        epochs: of training, in order.
        clusters: example clusters by criterion.
        map: the crops' features in the plane.
        ranked: example queries with their hits.
        seconds: step -> seconds, in the order of the steps.
        config: the resolved recipe; nested mappings are shown with dotted names.
        model: properties of the model, such as backbone, feature length, file size; nested mappings likewise.
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


def write_report(path: Path, report: AdaptationReport) -> None:
    """Write ``report`` to ``path`` as one HTML file, atomically.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    os.replace(partial, path)


def render(report: AdaptationReport) -> str:
    """The page as HTML."""
    environment = templates()
    environment.filters |= {"uri": data_uri, "number": format_number, "duration": format_duration}
    return environment.get_template("adaptation.html.j2").render(
        report=report,
        scores=score_rows(report),
        charts=epoch_charts(report.epochs),
        unchanging=constant_figures(report.epochs),
        epochs=epoch_table(report.epochs),
        panels=map_panels(report.map) if report.map is not None else [],
        config=dict(flatten(report.config)),
        model=dict(flatten(report.model)),
    )


def score_rows(report: AdaptationReport) -> list[tuple[str, float | None, float | None]]:
    """Return (name, before, after) in percent for each score that either side has, in the order of `SCORE_NAMES`."""
    keys = [*SCORE_NAMES, *(k for k in {**report.before, **report.after} if k not in SCORE_NAMES)]
    rows = [(SCORE_NAMES.get(key, key), report.before.get(key), report.after.get(key)) for key in keys]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def epoch_table(epochs: Sequence[EpochRow]) -> tuple[list[str], list[list[str]]]:
    """Return the names of all figures, and for each epoch its name and every figure as text."""
    columns = {name: group_label(group, name) for group, names in figures_by_group(epochs).items() for name in names}
    rows = [
        [
            f"{row.stage} {row.epoch}",
            *(format_number(row.figures[name]) if name in row.figures else "–" for name in columns),
        ]
        for row in epochs
    ]
    return list(columns.values()), rows


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        site: with query and gallery.
        store: the N crops adapted to.
        checkpoint: of the student.
        features: float32 (N, D), unit rows, of the student on ``store``.
        bundle: exported from the checkpoint.
        before: search results of the initial model's service.
        after: search results of the adapted model's service.
        log: folder of the run's log, with the last labels.
        figures: "initial" and "adapted", in percent.
        seconds: per step.
    """

    site: Site
    store: CropStore
    checkpoint: Checkpoint
    features: Floats
    bundle: Bundle
    before: SearchResults
    after: SearchResults
    log: Path
    figures: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]


def demo_report(outcome: DemoResult) -> AdaptationReport:
    """The demo's report: the adaptation, and the scores of the service before and after."""
    query, gallery = outcome.site.query, outcome.site.gallery
    assert query is not None and gallery is not None  # a site without queries is rejected before anything is measured
    thumbnails = Thumbnails()
    gain = outcome.figures["adapted"]["mAP"] - outcome.figures["initial"]["mAP"]
    report = adaptation_report(
        outcome.store,
        outcome.checkpoint,
        last_labels(outcome.log, outcome.checkpoint),
        outcome.features,
        title=f"{outcome.site.name}: adapted without labels",
        before=outcome.figures["initial"],
        after=outcome.figures["adapted"],
        ranked=ranked_lists(query, gallery, outcome.before, outcome.after, thumbnails),
    )
    return replace(
        report,
        summary=f"{len(outcome.store)} unlabelled crops changed mAP by {gain:+.1f} points, measured on other people "
        "through the running service before and after.",
        notes=[*report.notes, *thumbnails.notes],
        seconds=outcome.seconds,
        model={**report.model, **_bundle_facts(outcome.bundle)},
    )


def adaptation_report(
    store: CropStore,
    checkpoint: Checkpoint,
    labels: Ints,
    features: Floats,
    *,
    title: str,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    ranked: Sequence[RankedList] = (),
) -> AdaptationReport:
    """The report of an adaptation; needs no labels.

    Args:
        store: the N crops adapted to; if persons are known, the purity of clusters is shown.
        checkpoint: of the adapted model.
        labels: int64 (N,) of the last epoch, -1 for outliers.
        features: float32 (N, D), unit rows, of the adapted model on ``store``.
        title: of the page.
        before: scores of the initial model in percent, under the keys of `percentages`.
        after: likewise of the adapted model.
        ranked: example queries, from `ranked_lists`.
    """
    assert len(store) == len(labels) == len(features), (len(store), len(labels), len(features))
    thumbnails = Thumbnails()
    provenance = checkpoint.provenance
    epochs = epoch_rows(provenance.history)
    groups = cluster_groups(store, labels, features, thumbnails)
    shown = map_features(store, labels, features)
    return AdaptationReport(
        title=title,
        summary=_summary(store, labels),
        notes=[*_missing_parts(store, labels, shown is not None), *thumbnails.notes],
        before=before or {},
        after=after or {},
        epochs=epochs,
        clusters=groups,
        map=shown,
        ranked=ranked,
        seconds=_training_seconds(epochs),
        config=provenance.recipe,
        model=_model_facts(checkpoint),
    )


def write_adaptation_report(
    path: Path,
    store: CropStore,
    checkpoint: Checkpoint,
    log: Path,
    *,
    title: str,
    device: str = "cpu",
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    ranked: Sequence[RankedList] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Embed the crops with the adapted model, read its last labels and write the page.

    Args:
        path: of the HTML file.
        store: the crops adapted to.
        checkpoint: of the adapted model.
        log: folder of the run's log.
        title: of the page.
        device: for the embedding.
        before: see `adaptation_report`.
        after: see `adaptation_report`.
        ranked: see `adaptation_report`.
        progress: called with the number of crops just embedded.

    Raises:
        TrainingError: the log has no labels of these crops.
        OSError: the page cannot be written.
    """
    labels = last_labels(log, checkpoint)
    if len(labels) != len(store):
        raise TrainingError(
            f"{log} has labels of {len(labels)} crops and the store has {len(store)}: expected the log of a run on "
            "these crops"
        )
    features = extract_features(checkpoint.encoder.to(device), store, device=device, local=False, progress=progress)[0]
    report = adaptation_report(
        store, checkpoint, labels, features, title=title, before=before, after=after, ranked=ranked
    )
    write_report(path, report)


def last_labels(log: Path, checkpoint: Checkpoint) -> Ints:
    """Labels of the last epoch, one per crop adapted to.

    Raises:
        TrainingError: they are missing or damaged.
    """
    path = log / f"{checkpoint.provenance.stage}-labels.npy"
    try:
        labels: Ints = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): expected the labels that the run wrote there") from error
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise TrainingError(f"{path} holds {labels.dtype} {labels.shape}: expected int64 labels, one per crop")
    return labels


def _summary(store: CropStore, labels: Ints) -> str:
    """Number of crops, cameras and clusters of the last epoch."""
    cameras, clusters = len(np.unique(store.cameras)), len(np.unique(labels[labels >= 0]))
    outliers = 100 * float((labels < 0).mean()) if len(labels) else 0.0
    return (
        f"{len(store):,} unlabelled crops from {cameras} camera{'' if cameras == 1 else 's'}. The last epoch found "
        f"{clusters:,} cluster{'' if clusters == 1 else 's'} in them, and {outliers:.0f} % are outliers."
    )


def _missing_parts(store: CropStore, labels: Ints, has_map: bool) -> list[str]:
    """Notes on the parts that are missing on the page."""
    notes = []
    if not (labels >= 0).any():
        notes.append("The last epoch found no cluster: use more crops, or initial weights that suit the site better.")
    if len(np.unique(store.cameras)) == 1:
        notes.append("All crops come from one camera: matching across cameras cannot be assessed.")
    if not has_map:
        notes.append("Too few different crops for a map.")
    return notes


def _training_seconds(epochs: Sequence[EpochRow]) -> dict[str, float]:
    """Total seconds over all epochs of a stage, from metrics such as ``train_s``."""
    totals: dict[str, float] = {}
    for row in epochs:
        for name, value in row.figures.items():
            if name.endswith("_s") and not name.endswith("_per_s"):
                step = f"{row.stage}: {figure_label(name.removesuffix('_s'))}"
                totals[step] = totals.get(step, 0.0) + value
    return totals


def _model_facts(checkpoint: Checkpoint) -> dict[str, object]:
    """Properties of the adapted model."""
    config, provenance = checkpoint.encoder.config, checkpoint.provenance
    return {
        "backbone": config.backbone,
        "feature length": checkpoint.encoder.feature_dim,
        "input": f"{config.image.height} x {config.image.width}, {config.image.filter}",
        "parameters": f"{sum(p.numel() for p in checkpoint.encoder.parameters()):,}",
        "stage": f"{provenance.stage}, epoch {provenance.epoch}",
        "initial weights": provenance.initial_weights,
        "fingerprint of the crops": provenance.store_fingerprint,
    }


def _bundle_facts(bundle: Bundle) -> dict[str, object]:
    """Properties of the exported bundle."""
    manifest, artefact = bundle.manifest, bundle.find()
    return {
        "exported feature length": manifest.feature_dim,
        "exported file size": f"{(bundle.path / artefact.file).stat().st_size / 2**20:.2f} MiB",
        "min cosine to the trained model": artefact.min_cosine,
        "space": manifest.space_id,
        "licence of the initial weights": manifest.weights_licence,
    }
