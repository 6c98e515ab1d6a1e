"""How good a model is on a site, judged without anyone's label.

Witnesses: tracks (`pairs`, `separation`, `searches`), clusters (`health`), what operators confirmed (`agreement`) and
the features' own variance. `compare` of `verdict` sets two judgements against each other and `gate` adds what else a
candidate must not lose; docs/judging.md says what each figure can and cannot tell.

Letters: N crops, D feature size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from resight.errors import TrainingError
from resight.training.agreement import LinkedCrops, agree, even_threshold, no_agreement
from resight.training.cluster import Clustering, ClusterSettings, cluster
from resight.training.crops import COLUMNS, CropStore
from resight.training.datasets import Site
from resight.training.health import camera_mix, epoch_health, stability, track_agreement
from resight.training.judgement import ClusterFigures, Judgement, TrackCounts
from resight.training.neighbours import Floats
from resight.training.pairs import TrackPairs, draw_pairs
from resight.training.searches import no_searches, search_tracks
from resight.training.separation import Estimate, Separation, cannot_separate, separate
from resight.training.verdict import Verdict, compare

__all__ = [
    "ClusterFigures",
    "Estimate",
    "Judgement",
    "TrackCounts",
    "Verdict",
    "compare",
    "epoch_health",
    "held_out",
    "join_splits",
    "judge",
    "try_cluster",
]

LENGTH_TOLERANCE = 1e-2  # half precision ends about 1e-3 from unit length


def judge(
    features: Floats,
    store: CropStore,
    *,
    clustering: Clustering | TrainingError | None = None,
    previous: Clustering | TrainingError | None = None,
    linked: tuple[LinkedCrops, Floats] | None = None,
    seed: int = 0,
) -> Judgement:
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
    pairs = draw_pairs(store, seed=seed)
    problem = _problem(features)
    found = clustering if isinstance(clustering, Clustering) else None
    agreed = stability(found.labels, previous.labels) if found and isinstance(previous, Clustering) else None
    return Judgement(
        len(store),
        problem,
        str(clustering) if isinstance(clustering, TrainingError) else "",
        None if problem else float(np.clip(1 - np.square(features.mean(0, dtype=np.float64)).sum(), 0, 1)),
        TrackCounts(pairs.track_count, pairs.overlaps, len(pairs.positives), len(pairs.negatives)),
        cannot_separate(problem, pairs, seed=seed) if problem else separate(features, pairs, seed=seed),
        None if found is None else cluster_figures(found, store, pairs),
        agreed,
        no_searches(problem, pairs, seed=seed) if problem else search_tracks(features, pairs, seed=seed),
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
    problem = problem or _problem(own)
    if problem:
        return no_agreement(problem, crops, seed=seed)
    return agree(own, crops, even_threshold(features, pairs), seed=seed)


def try_cluster(
    features: Floats, store: CropStore, settings: ClusterSettings, *, device: str = "cpu"
) -> Clustering | TrainingError:
    """Clusters of a store's crops, or the error that tells why there are none: a judgement needs either.

    Args:
        features: float32 (N, D).
        store: the N crops.
        settings: the same for every model that is compared.
        device: where neighbours are searched.
    """
    problem = _problem(features)
    if problem:
        return TrainingError(problem)
    try:
        return cluster([features], settings, cameras=store.cameras, device=device)
    except TrainingError as error:
        return error


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


def held_out(site: Site) -> CropStore | None:
    """The crops of tracks kept back from adaptation: a gallery that no query belongs to; None where there are none."""
    return site.gallery if site.query is None else None


def join_splits(site: Site) -> CropStore:
    """All crops of a site in one store: a track may lie in query and gallery at once."""
    parts = [part for part in (site.train, site.query, site.gallery) if part is not None]
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    joined = replace(site.train, paths=tuple(path for part in parts for path in part.paths), **columns)
    _, first = np.unique(joined.paths, return_index=True)  # in a plain folder queries are training crops too
    return joined.subset(np.sort(first))


def _problem(features: Floats) -> str:
    """Why these features cannot be compared by cosine."""
    broken = int((~np.isfinite(features).all(1)).sum())
    if broken:
        return f"{broken} of {len(features)} features are not finite: the model's weights have run away"
    wrong = int((np.abs(np.linalg.norm(features, axis=1) - 1) > LENGTH_TOLERANCE).sum())
    if wrong:
        return f"{wrong} of {len(features)} features are not of length 1: the model answers them with nothing"
    return ""
