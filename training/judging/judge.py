"""The judgement of one model on one store, without labels; `resight.training.judging.gate` compares two.

It is based on tracks (`track_pairs`, `separation`, `searches`), clusters (`health`), pairs that operators confirmed or
rejected (`agreement`), and the variance of the features. docs/judging.md explains what each metric can and cannot show.

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
    """The number of a store's tracks and of the pairs drawn from them.

    Attributes:
        tracks: tracks with at least one crop.
        overlaps: pairs of tracks of one camera that overlap in time and therefore show two persons.
        positives, negatives: crop pairs drawn from one track, and from overlapping tracks.
    """

    tracks: int
    overlaps: int
    positives: int
    negatives: int


@dataclass(frozen=True)
class ClusterFigures:
    """Metrics of one clustering.

    Attributes:
        clusters: their number.
        outlier_share: share of crops in no cluster, in [0, 1].
        largest_share: share of crops in the largest cluster, in [0, 1].
        silhouette: see `Clustering`; None if the labels are true persons.
        collapsed: see `Clustering.collapsed`.
        cameras: number of cameras per cluster compared with chance; None without clusters.
        tracks: agreement of the clusters with tracks.
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
    """Metrics of one model on one store.

    Attributes:
        crops: N.
        problem: why the features are unusable; empty if they are not.
        collapse: why they could not be clustered; empty if they could, or clustering was not tried.
        variance: mean squared distance of features from their mean, 1 - |mean|^2, in [0, 1]; 0 if all features are
            equal. None if they are unusable.
        counts: tracks and pairs of the store.
        separation: how well features separate tracks.
        clusters: None if no clustering was given.
        stability: agreement with the previous clustering; None without one, or if no crop is clustered in both.
        searches: TPIR at fixed FPIR of searches among tracks, see `search_tracks`.
        cameras: for each camera with enough tracks, how well features separate them.
        links: agreement with confirmed and rejected pairs, see `link_agreement`; None without such pairs.
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
        """The metric to rank models by: the AUC of tracks; None without. See docs/judging.md."""
        found = self.separation.figures.get("auc")
        return None if found is None else found.value

    def to_json(self) -> dict[str, Any]:
        """Plain values; a metric that could not be measured is null, and `missing` gives the reason."""
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
    """Metrics, null for the missing ones, and the reasons."""
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
    """Judge a model by its features of a store's crops; labels of persons are not used.

    Args:
        features: float32 (N, D), unit rows; if they are not, `ModelJudgement.problem` says so.
        store: the N crops, in the same order.
        clustering: of these features, or the error that `cluster` raised because they collapsed.
        previous: of the previous epoch, or of another model, for stability; likewise.
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
    """Separation of each camera's own tracks; cameras with too few tracks are omitted."""
    found = {
        store.camera_names[camera]: separate(features, pairs.of_camera(store.cameras, int(camera)), seed=seed)
        for camera in np.unique(store.cameras)
    }
    return {name: one for name, one in found.items() if one.figures}


def _links(
    features: Floats, pairs: TrackPairs, problem: str, crops: LinkedCrops, own: Floats, *, seed: int
) -> Separation:
    """Agreement with confirmed and rejected pairs, at the threshold chosen on tracks."""
    problem = problem or feature_problem(own)
    if problem:
        return missing_agreement(problem, crops, seed=seed)
    return link_agreement(own, crops, youden_threshold(features, pairs), seed=seed)


def cluster_figures(clustering: Clustering, store: CropStore, pairs: TrackPairs) -> ClusterFigures:
    """Metrics of a clustering of a store's crops."""
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
