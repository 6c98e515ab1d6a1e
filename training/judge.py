"""How good a model is on a site, judged without anyone's label.

Three witnesses: tracks (`pairs`, `separation`), clusters (`health`) and the features' own variance. `compare` turns two
judgements into a verdict; docs/judging.md says what each figure can and cannot tell.

Letters: N crops, D feature size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resight.training.cluster import Clustering
from resight.training.crops import CropStore
from resight.training.health import (
    CameraMix,
    Stability,
    TrackAgreement,
    camera_mix,
    epoch_health,
    stability,
    track_agreement,
)
from resight.training.neighbours import Floats
from resight.training.pairs import TrackPairs, draw_pairs
from resight.training.separation import Estimate, Separation, cannot_separate, separate
from resight.training.verdict import Verdict, compare

__all__ = ["ClusterFigures", "Estimate", "Judgement", "TrackCounts", "Verdict", "compare", "epoch_health", "judge"]

LENGTH_TOLERANCE = 1e-2  # half precision ends about 1e-3 from unit length


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
class Judgement:
    """Figures of one model on one store.

    Attributes:
        crops: N.
        problem: what is wrong with the features themselves, empty if nothing.
        variance: mean squared distance of features from their mean, 1 - |mean|^2, in [0, 1]; 0 where all crops are
            alike to the model. None where features are not usable.
        counts: what the tracks offer.
        separation: how features tell tracks apart.
        clusters: None where no clustering was given.
        stability: None where there is no other clustering, or nothing clustered in both.
    """

    crops: int
    problem: str
    variance: float | None
    counts: TrackCounts
    separation: Separation
    clusters: ClusterFigures | None
    stability: Stability | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that could not be measured is null, and `missing` says why."""
        figures = {name: asdict(estimate) for name, estimate in self.separation.figures.items()}
        return {
            "crops": self.crops,
            "problem": self.problem,
            "variance": self.variance,
            "tracks": {
                **asdict(self.counts),
                **figures,
                **dict.fromkeys(self.separation.missing),
                "missing": dict(self.separation.missing),
            },
            "clusters": None if self.clusters is None else asdict(self.clusters),
            "stability": None if self.stability is None else asdict(self.stability),
        }


def judge(
    features: Floats,
    store: CropStore,
    *,
    clustering: Clustering | None = None,
    previous: Clustering | None = None,
    seed: int = 0,
) -> Judgement:
    """Judge a model by its features of a store's crops; persons are never read.

    Args:
        features: float32 (N, D), unit rows; others are a problem told in the answer, since it is the model's.
        store: the N crops, in the same order.
        clustering: of these features.
        previous: of the epoch before, or of another model, for stability.
        seed: of pairs and resamples. Two models are comparable only with the same seed and store.
    """
    assert len(features) == len(store), (len(features), len(store))
    pairs = draw_pairs(store, seed=seed)
    problem = _problem(features)
    agree = stability(clustering.labels, previous.labels) if clustering is not None and previous is not None else None
    return Judgement(
        len(store),
        problem,
        None if problem else float(np.clip(1 - np.square(features.mean(0, dtype=np.float64)).sum(), 0, 1)),
        TrackCounts(pairs.track_count, pairs.overlaps, len(pairs.positives), len(pairs.negatives)),
        cannot_separate(problem, pairs, seed=seed) if problem else separate(features, pairs, seed=seed),
        None if clustering is None else cluster_figures(clustering, store, pairs),
        agree,
    )


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


def _problem(features: Floats) -> str:
    """Why these features cannot be compared by cosine."""
    broken = int((~np.isfinite(features).all(1)).sum())
    if broken:
        return f"{broken} of {len(features)} features are not finite: the model's weights have run away"
    wrong = int((np.abs(np.linalg.norm(features, axis=1) - 1) > LENGTH_TOLERANCE).sum())
    if wrong:
        return f"{wrong} of {len(features)} features are not of length 1: the model answers them with nothing"
    return ""
