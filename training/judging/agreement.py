"""Agreement of a model with pairs that an operator confirmed or rejected (`links`): a few labels.

Letters: N crops, D feature size, L links, B resamples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Doubles, Floats, Ints
from resight.training.judging.separation import (
    Estimate,
    Separation,
    bootstrap_weights,
    pair_similarities,
    rank_pairs,
    with_intervals,
)
from resight.training.store.crops import CropStore, check_crops
from resight.training.store.links import Links, links_of
from resight.training.store.track_pairs import TrackPairs

MIN_LINKS = 10  # of each kind for the AUC, of both together for the accuracy; as for tracks
Z_95 = 1.959963984540054  # standard normal quantile of 97.5 %


@dataclass(frozen=True, eq=False)
class LinkedCrops:
    """The crops in confirmed or rejected pairs; their features are needed in addition to those of the crops judged on.

    Attributes:
        store: N crops.
        rows: int64 (L, 2), indices into the store.
        same: bool (L,), True = confirmed, False = rejected.
    """

    store: CropStore
    rows: Ints
    same: NDArray[np.bool_]

    @property
    def digest(self) -> str:
        """sha256 of the pairs by path, and their labels."""
        paths = self.store.paths
        pairs = [
            (paths[one], paths[other], bool(same)) for (one, other), same in zip(self.rows, self.same, strict=True)
        ]
        return hashlib.sha256(repr(pairs).encode()).hexdigest()


def linked_crops(store: CropStore) -> LinkedCrops | None:
    """Read the links of a store's crops from `links.parquet`.

    Args:
        store: all splits of a site, so that every linked crop is found.

    Returns:
        None without links; links to crops that cannot be decoded are omitted.

    Raises:
        StoreError: the file is damaged or of another version.
    """
    links: Links = links_of(store)
    if not len(links):
        return None
    named = np.unique(links.rows)
    damaged = named[list(check_crops(store.subset(named)))]
    sound = ~np.isin(links.rows, damaged).any(1)
    used, numbers = np.unique(links.rows[sound], return_inverse=True)
    rows = numbers.reshape(-1, 2).astype(np.int64)
    return LinkedCrops(store.subset(used), rows, links.same[sound]) if len(rows) else None


def link_agreement(features: Floats, linked: LinkedCrops, threshold: float | None, *, seed: int = 0) -> Separation:
    """Measure the AUC over links, and the share of links on the right side of a threshold.

    The interval of the AUC resamples links; that of the accuracy is Wilson's (1927), which does not vanish if all
    are right. Differences of two models are over the same resampled links.

    Args:
        features: float32 (N, D), unit rows, of ``linked.store``.
        linked: see `LinkedCrops`.
        threshold: smallest similarity decided as one person, see `youden_threshold`; None = no accuracy.
        seed: of the resamples.

    Returns:
        Metrics `auc` and `accuracy`, both in [0, 1].
    """
    missing = _missing(linked.same, threshold)
    similarity = pair_similarities(features, linked.rows)
    same, names = linked.same, [name for name in ("auc", "accuracy") if name not in missing]
    if not names:
        return Separation({}, missing, {}, linked.digest, seed)
    ranked = rank_pairs(similarity[same], similarity[~same])
    right = ((similarity >= (threshold if threshold is not None else np.nan)) == same).astype(np.float64)

    def figures(weights: Doubles) -> list[float]:
        values = {"accuracy": float(right @ weights / weights.sum())}
        if "auc" in names:
            values["auc"] = float(ranked.figures(weights[same], weights[~same], ())[0])
        return [values[name] for name in names]

    values = np.array(figures(np.ones(len(same))))
    drawn = np.array([figures(weights) for weights in bootstrap_weights(len(same), seed)])
    found = with_intervals(names, values, drawn, missing, linked.digest, seed)
    if "accuracy" in missing:
        return found
    return replace(found, figures={**found.figures, "accuracy": wilson_interval(float(right.sum()), len(right))})


def missing_agreement(problem: str, linked: LinkedCrops, *, seed: int) -> Separation:
    """A result without metrics, each missing for the same reason."""
    return Separation({}, dict.fromkeys(("auc", "accuracy"), problem), {}, linked.digest, seed)


def youden_threshold(features: Floats, pairs: TrackPairs) -> float | None:
    """The threshold that best separates pairs of one person and of two, by Youden's index (1950).

    Args:
        features: float32 (N, D), unit rows.
        pairs: of the same crops.

    Returns:
        None if there are no pairs of one kind.
    """
    if not len(pairs.positives) or not len(pairs.negatives):
        return None
    positive, negative = (np.sort(pair_similarities(features, rows)) for rows in (pairs.positives, pairs.negatives))
    candidates = np.unique(np.concatenate([positive, negative]))
    kept = 1 - np.searchsorted(positive, candidates, side="left") / len(positive)
    passed = 1 - np.searchsorted(negative, candidates, side="left") / len(negative)
    return float(candidates[np.argmax(kept - passed)])


def wilson_interval(right: float, count: int) -> Estimate:
    """A share and its 95 % score interval (Wilson 1927), which is also valid at 0 and 1."""
    share, z2 = right / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def _missing(same: NDArray[np.bool_], threshold: float | None) -> dict[str, str]:
    """The metrics that cannot be measured with these links, each with its reason."""
    confirmed, rejected = int(same.sum()), int((~same).sum())
    found = {}
    if min(confirmed, rejected) < MIN_LINKS:
        found["auc"] = f"{confirmed} confirmed and {rejected} rejected pairs: expected {MIN_LINKS} or more of each"
    if threshold is None:
        found["accuracy"] = "tracks give no threshold: expected certain pairs of both kinds"
    elif len(same) < MIN_LINKS:
        found["accuracy"] = f"{len(same)} confirmed or rejected pairs: expected {MIN_LINKS} or more"
    return found
