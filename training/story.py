"""From a finished adaptation to what its report shows: example clusters, ranked lists, curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resight.bundle import Bundle
from resight.checkpoint import Checkpoint
from resight.served import Served
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.neighbours import Ints
from resight.training.report import Cluster, Crop, EpochRow, Hit, RankedList, Report

EXAMPLES = 9  # queries shown: the most helped, some in the middle, the most harmed
HITS = 10
CLUSTERS, CLUSTER_CROPS = 8, 10
LOSSES = ("loss", "contrast", "guidance")
COUNTED = ("lr", "clusters", "outlier_share", "largest_share", "nmi", "ari", "eps", "images_per_s")


@dataclass(frozen=True)
class Outcome:
    """Everything a walk along the road leaves behind.

    Attributes:
        site: with query and gallery.
        store: the crops adapted to.
        checkpoint: of the student.
        bundle: exported from it.
        before: answers of the initial model's service.
        after: answers of the adapted model's service.
        log: folder of the run's log, with the last labels.
        figures: "initial" and "adapted", in percent.
        seconds: per step.
    """

    site: Site
    store: CropStore
    checkpoint: Checkpoint
    bundle: Bundle
    before: Served
    after: Served
    log: Path
    figures: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]


def tell(outcome: Outcome) -> Report:
    """Choose the examples and put everything in the report's words."""
    gain = outcome.figures["adapted"]["mAP"] - outcome.figures["initial"]["mAP"]
    provenance = outcome.checkpoint.provenance
    return Report(
        title=f"{outcome.site.name}: adapted without a label",
        summary=f"{len(outcome.store)} unlabelled crops changed mAP by {gain:+.1f} points, measured on other people "
        "through the running service before and after.",
        before=outcome.figures["initial"],
        after=outcome.figures["adapted"],
        epochs=[_epoch(row) for row in provenance.history],
        clusters=_clusters(outcome.store, _last_labels(outcome)),
        ranked=_ranked_lists(outcome),
        seconds=outcome.seconds,
        config=provenance.recipe,
        model=_facts(outcome),
    )


def _epoch(row: Mapping[str, Any]) -> EpochRow:
    """One line of the history."""
    counted = {name: row[name] for name in COUNTED if name in row}
    if "clusters" in counted:
        counted["clusters"] = int(counted["clusters"])
    losses = {name: row[name] for name in LOSSES if name in row and (name != "guidance" or row["stage"] == "student")}
    return EpochRow(stage=row["stage"], epoch=row["epoch"], loss=losses, **counted)


def _facts(outcome: Outcome) -> dict[str, object]:
    """What one wants to know of the exported model."""
    manifest, artefact = outcome.bundle.manifest, outcome.bundle.find()
    return {
        "backbone": outcome.checkpoint.encoder.config.backbone,
        "feature length": manifest.feature_dim,
        "input": f"{manifest.image.height} x {manifest.image.width}, {manifest.image.filter}",
        "file size": f"{(outcome.bundle.path / artefact.file).stat().st_size / 2**20:.2f} MiB",
        "min cosine to the trained model": artefact.min_cosine,
        "space": manifest.space_id,
        "licence of the initial weights": manifest.weights_licence,
    }


def _last_labels(outcome: Outcome) -> Ints:
    """Labels of the last epoch, one per crop adapted to."""
    labels: Ints = np.load(outcome.log / f"{outcome.checkpoint.provenance.stage}-labels.npy", allow_pickle=False)
    return labels


def _clusters(store: CropStore, labels: Ints) -> list[Cluster]:
    """Clusters evenly from the largest to the smallest, crops evenly over each."""
    sizes = np.bincount(labels[labels >= 0], minlength=0)
    if not len(sizes):
        return []
    order = np.argsort(-sizes, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(CLUSTERS, len(order))).astype(int))]
    return [_cluster(store, int(label), np.flatnonzero(labels == label)) for label in chosen]


def _cluster(store: CropStore, label: int, rows: Ints) -> Cluster:
    """One cluster with some of its crops, ordered by camera."""
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, min(CLUSTER_CROPS, len(rows))).astype(int))]
    shown = shown[np.argsort(store.cameras[shown], kind="stable")]
    crops = [Crop(store.read(int(row)), store.camera_names[store.cameras[row]]) for row in shown]
    purity = (
        float(np.unique(store.persons[rows], return_counts=True)[1].max() / len(rows)) if store.has_persons else None
    )
    return Cluster(label, len(rows), crops, purity)


def _ranked_lists(outcome: Outcome) -> list[RankedList]:
    """Queries whose answers changed most for the better, that changed in between, and most for the worse."""
    gains = outcome.after.score.average_precision - outcome.before.score.average_precision
    valid = np.flatnonzero(np.isfinite(gains))
    order = valid[np.argsort(-gains[valid], kind="stable")]
    third = EXAMPLES // 3
    middle = len(order) // 2
    chosen = dict.fromkeys([*order[:third], *order[middle : middle + third], *order[-third:]])
    return [
        RankedList(
            _crop(outcome.site.query, int(query)),
            _hits(outcome, outcome.before, int(query)),
            _hits(outcome, outcome.after, int(query)),
        )
        for query in chosen
    ]


def _crop(store: CropStore | None, row: int) -> Crop:
    """A crop with its camera's name."""
    assert store is not None  # a site without queries is refused before anything is measured
    return Crop(store.read(row), store.camera_names[store.cameras[row]])


def _hits(outcome: Outcome, served: Served, query: int) -> list[Hit]:
    """The first hits of one answer, judged."""
    queries, gallery = outcome.site.query, outcome.site.gallery
    assert queries is not None and gallery is not None  # as in `_crop`
    hits = []
    for row, similarity in zip(served.rankings[query][:HITS], served.similarities[query][:HITS], strict=True):
        crop = _crop(gallery, row)
        same = gallery.persons[row] == queries.persons[query]
        junk = same and gallery.cameras[row] == queries.cameras[query]
        hits.append(Hit(crop.image, crop.camera, similarity, "junk" if junk else "right" if same else "wrong"))
    return hits
