"""From a finished adaptation to what its report shows. `resight adapt` and `resight demo` tell the same story."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resight.bundle import Bundle
from resight.checkpoint import Checkpoint
from resight.errors import TrainingError
from resight.served import Served
from resight.training.album import Album
from resight.training.charts import EpochRow, epoch_rows, label
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.embedding_map import map_features
from resight.training.features import extract
from resight.training.montage import cluster_groups
from resight.training.neighbours import Floats, Ints
from resight.training.ranked import ranked_lists
from resight.training.report import RankedList, Report, write_report


@dataclass(frozen=True)
class Outcome:
    """Everything a walk along the road leaves behind.

    Attributes:
        site: with query and gallery.
        store: the N crops adapted to.
        checkpoint: of the student.
        features: float32 (N, D), unit rows: the student's on ``store``.
        bundle: exported from the checkpoint.
        before: answers of the initial model's service.
        after: answers of the adapted model's service.
        log: folder of the run's log, with the last labels.
        figures: "initial" and "adapted", in percent.
        seconds: per step.
    """

    site: Site
    store: CropStore
    checkpoint: Checkpoint
    features: Floats
    bundle: Bundle
    before: Served
    after: Served
    log: Path
    figures: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]


def tell(outcome: Outcome) -> Report:
    """The demo's report: an adaptation, and what the running service gained by it."""
    query, gallery = outcome.site.query, outcome.site.gallery
    assert query is not None and gallery is not None  # a site without queries is refused before anything is measured
    album = Album()
    gain = outcome.figures["adapted"]["mAP"] - outcome.figures["initial"]["mAP"]
    report = tell_adaptation(
        outcome.store,
        outcome.checkpoint,
        last_labels(outcome.log, outcome.checkpoint),
        outcome.features,
        title=f"{outcome.site.name}: adapted without a label",
        before=outcome.figures["initial"],
        after=outcome.figures["adapted"],
        ranked=ranked_lists(query, gallery, outcome.before, outcome.after, album),
    )
    return replace(
        report,
        summary=f"{len(outcome.store)} unlabelled crops changed mAP by {gain:+.1f} points, measured on other people "
        "through the running service before and after.",
        notes=[*report.notes, *album.notes],
        seconds=outcome.seconds,
        model={**report.model, **_bundle_facts(outcome.bundle)},
    )


def tell_adaptation(
    store: CropStore,
    checkpoint: Checkpoint,
    labels: Ints,
    features: Floats,
    *,
    title: str,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    ranked: Sequence[RankedList] = (),
) -> Report:
    """An adaptation's report; of truth it needs none.

    Args:
        store: the N crops adapted to; where it names persons, clusters tell their purity.
        checkpoint: the result.
        labels: int64 (N,) of the last epoch, -1 for outliers.
        features: float32 (N, D), unit rows: the result's on ``store``.
        title: of the page.
        before: scores of the initial model in percent, under the keys of `percentages`.
        after: likewise of the result.
        ranked: example queries, from `ranked_lists`.
    """
    assert len(store) == len(labels) == len(features), (len(store), len(labels), len(features))
    album = Album()
    provenance = checkpoint.provenance
    epochs = epoch_rows(provenance.history)
    groups = cluster_groups(store, labels, features, album)
    shown = map_features(store, labels, features)
    return Report(
        title=title,
        summary=_summary(store, labels),
        notes=[*_missing_parts(store, labels, shown is not None), *album.notes],
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
    """Embed the crops with the result, read its last labels and write the page.

    Args:
        path: of the HTML file.
        store: the crops adapted to.
        checkpoint: the result.
        log: folder of the run's log.
        title: of the page.
        device: where the crops are embedded.
        before: see `tell_adaptation`.
        after: see `tell_adaptation`.
        ranked: see `tell_adaptation`.
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
    features = extract(checkpoint.encoder.to(device), store, device=device, local=False, progress=progress)[0]
    told = tell_adaptation(store, checkpoint, labels, features, title=title, before=before, after=after, ranked=ranked)
    write_report(path, told)


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
    """What went in and what the last epoch made of it."""
    cameras, clusters = len(np.unique(store.cameras)), len(np.unique(labels[labels >= 0]))
    outliers = 100 * float((labels < 0).mean()) if len(labels) else 0.0
    return (
        f"{len(store):,} unlabelled crops from {cameras} camera{'' if cameras == 1 else 's'}. The last epoch saw "
        f"{clusters:,} cluster{'' if clusters == 1 else 's'} in them and left {outliers:.0f} % out as outliers."
    )


def _missing_parts(store: CropStore, labels: Ints, has_map: bool) -> list[str]:
    """Why a part of the page is not there."""
    notes = []
    if not (labels >= 0).any():
        notes.append(
            "The last epoch found no cluster: more crops, or initial weights that suit the site better, may help."
        )
    if len(np.unique(store.cameras)) == 1:
        notes.append("All crops come from one camera: nothing can be told about matching across cameras.")
    if not has_map:
        notes.append("Too few different crops for a map.")
    return notes


def _training_seconds(epochs: Sequence[EpochRow]) -> dict[str, float]:
    """Seconds that all epochs of a stage took together, from figures such as ``train_s``."""
    totals: dict[str, float] = {}
    for row in epochs:
        for name, value in row.figures.items():
            if name.endswith("_s") and not name.endswith("_per_s"):
                step = f"{row.stage}: {label(name.removesuffix('_s'))}"
                totals[step] = totals.get(step, 0.0) + value
    return totals


def _model_facts(checkpoint: Checkpoint) -> dict[str, object]:
    """What one wants to know of the result."""
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
    """What export adds."""
    manifest, artefact = bundle.manifest, bundle.find()
    return {
        "exported feature length": manifest.feature_dim,
        "exported file size": f"{(bundle.path / artefact.file).stat().st_size / 2**20:.2f} MiB",
        "min cosine to the trained model": artefact.min_cosine,
        "space": manifest.space_id,
        "licence of the initial weights": manifest.weights_licence,
    }
