"""What is said of one model on one store, in figures; `judge` makes it, `verdict` compares two.

How good a model is on a site, judged without anyone's label.

Witnesses: tracks (`pairs`, `separation`, `searches`), clusters (`health`), what operators confirmed (`agreement`) and
the features' own variance. `compare` of `verdict` sets two judgements against each other and `gate` adds what else a
candidate must not lose; docs/judging.md says what each figure can and cannot tell.

Letters: N crops, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resight.arrays import Floats
from resight.errors import TrainingError
from resight.training.clustering.cluster import Clustering, feature_problem
from resight.training.clustering.health import (
    CameraMix,
    Stability,
    TrackAgreement,
    camera_mix,
    stability,
    track_agreement,
)
from resight.training.judging.agreement import (
    LinkedCrops,
    link_agreement,
    missing_agreement,
    youden_threshold,
)
from resight.training.judging.searches import missing_searches, search_tracks
from resight.training.judging.separation import Separation, missing_separation, separate
from resight.training.store.crops import CropStore
from resight.training.store.track_pairs import TrackPairs, draw_track_pairs


@dataclass(frozen=True)
class TrackCounts:
    """What the store's tracks offer.

    Attributes:
        tracks: passages with at least one crop.
        overlaps: pairs of tracks of one camera that overlap in time, which makes them two persons.
        positives, negatives: crop pairs drawn of one track, and of overlapping ones.
    """

    tracks: int
    overlaps: int
    positives: int
    negatives: int


@dataclass(frozen=True)
class ClusterFigures:
    """Figures of one clustering.

    Attributes:
        clusters: their number.
        outlier_share: share of crops in none, in [0, 1].
        largest_share: share of crops in the largest, in [0, 1].
        silhouette: see `Clustering`; None where labels are true persons.
        collapsed: see `Clustering.collapsed`.
        cameras: cameras of each cluster against chance; None without clusters.
        tracks: what tracks say of the clusters.
    """

    clusters: int
    outlier_share: float
    largest_share: float
    silhouette: float | None
    collapsed: bool
    cameras: CameraMix | None
    tracks: TrackAgreement


@dataclass(frozen=True, eq=False)
class ModelJudgement:
    """Figures of one model on one store.

    Attributes:
        crops: N.
        problem: what is wrong with the features themselves, empty if nothing.
        collapse: why no clusters could be made of them, empty if they could or nobody tried.
        variance: mean squared distance of features from their mean, 1 - |mean|^2, in [0, 1]; 0 where all crops are
            alike to the model. None where features are not usable.
        counts: what the tracks offer.
        separation: how features tell tracks apart.
        clusters: None where no clustering was given.
        stability: None where there is no other clustering, or nothing clustered in both.
        searches: TPIR at fixed FPIR of searches among tracks, see `search_tracks`.
        cameras: name of each camera whose own tracks suffice -> how features tell those apart.
        links: agreement with confirmed and rejected pairs, see `agree`; None where there are none.
    """

    crops: int
    problem: str
    collapse: str
    variance: float | None
    counts: TrackCounts
    separation: Separation
    clusters: ClusterFigures | None
    stability: Stability | None
    searches: Separation
    cameras: Mapping[str, Separation]
    links: Separation | None = None

    @property
    def score(self) -> float | None:
        """The one figure to rank models by: the AUC of tracks; None without. docs/judging.md tells what it rests on."""
        found = self.separation.figures.get("auc")
        return None if found is None else found.value

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that could not be measured is null, and `missing` says why."""
        return {
            "crops": self.crops,
            "problem": self.problem,
            "collapse": self.collapse,
            "variance": self.variance,
            "score": self.score,
            "tracks": {**asdict(self.counts), **_plain(self.separation)},
            "searches": _plain(self.searches),
            "cameras": {name: _plain(found) for name, found in self.cameras.items()},
            "links": None if self.links is None else _plain(self.links),
            "clusters": None if self.clusters is None else asdict(self.clusters),
            "stability": None if self.stability is None else asdict(self.stability),
        }


def _plain(found: Separation) -> dict[str, Any]:
    """Figures, null where missing, and why."""
    figures = {name: asdict(estimate) for name, estimate in found.figures.items()}
    return {**figures, **dict.fromkeys(found.missing), "missing": dict(found.missing)}


def judge(
    features: Floats,
    store: CropStore,
    *,
    clustering: Clustering | TrainingError | None = None,
    previous: Clustering | TrainingError | None = None,
    linked: tuple[LinkedCrops, Floats] | None = None,
    seed: int = 0,
) -> ModelJudgement:
    """Judge a model by its features of a store's crops; persons are never read.

    Args:
        features: float32 (N, D), unit rows; others are a problem told in the answer, since it is the model's.
        store: the N crops, in the same order.
        clustering: of these features, or the error `cluster` raised because they collapsed.
        previous: of the epoch before, or of another model, for stability; likewise.
        linked: crops of confirmed and rejected pairs and this model's features of them.
        seed: of pairs and resamples. Two models are comparable only with the same seed and store.
    """
    assert len(features) == len(store), (len(features), len(store))
    pairs = draw_track_pairs(store, seed=seed)
    problem = feature_problem(features)
    found = clustering if isinstance(clustering, Clustering) else None
    agreed = stability(found.labels, previous.labels) if found and isinstance(previous, Clustering) else None
    return ModelJudgement(
        len(store),
        problem,
        str(clustering) if isinstance(clustering, TrainingError) else "",
        None if problem else float(np.clip(1 - np.square(features.mean(0, dtype=np.float64)).sum(), 0, 1)),
        TrackCounts(pairs.track_count, pairs.overlaps, len(pairs.positives), len(pairs.negatives)),
        missing_separation(problem, pairs, seed=seed) if problem else separate(features, pairs, seed=seed),
        None if found is None else cluster_figures(found, store, pairs),
        agreed,
        missing_searches(problem, pairs, seed=seed) if problem else search_tracks(features, pairs, seed=seed),
        {} if problem else _by_camera(features, store, pairs, seed),
        None if linked is None else _links(features, pairs, problem, *linked, seed=seed),
    )


def _by_camera(features: Floats, store: CropStore, pairs: TrackPairs, seed: int) -> dict[str, Separation]:
    """Each camera's own tracks; cameras with too few are left out."""
    found = {
        store.camera_names[camera]: separate(features, pairs.of_camera(store.cameras, int(camera)), seed=seed)
        for camera in np.unique(store.cameras)
    }
    return {name: one for name, one in found.items() if one.figures}


def _links(
    features: Floats, pairs: TrackPairs, problem: str, crops: LinkedCrops, own: Floats, *, seed: int
) -> Separation:
    """Agreement with confirmed and rejected pairs, the threshold taken from tracks."""
    problem = problem or feature_problem(own)
    if problem:
        return missing_agreement(problem, crops, seed=seed)
    return link_agreement(own, crops, youden_threshold(features, pairs), seed=seed)


def cluster_figures(clustering: Clustering, store: CropStore, pairs: TrackPairs) -> ClusterFigures:
    """Figures of a clustering of a store's crops."""
    health = clustering.health()
    return ClusterFigures(
        clustering.count,
        health["outlier_share"],
        health["largest_share"],
        health.get("silhouette"),
        clustering.collapsed,
        camera_mix(clustering.labels, store.cameras),
        track_agreement(clustering.labels, pairs),
    )
