"""What is said of one model on one store, in figures; `judge` makes it, `verdict` compares two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from resight.training.health import CameraMix, Stability, TrackAgreement
from resight.training.separation import Separation


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
