"""Evaluation on a labelled site: all metrics of docs/evaluation.md from query and gallery features, and their JSON.

Rates are fractions, and in JSON percent; similarities are cosines.

Letters: N crops, B batch, D feature size, Q queries, G gallery rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resight.arrays import Floats
from resight.errors import InputError, SiteError
from resight.metrics.open_set import OpenSetScore, OperatingPoint, evaluate_open_set
from resight.metrics.ranking import (
    CameraPairScore,
    RankingScore,
    cosine_rows,
    evaluate_camera_pairs,
    evaluate_ranking,
    evaluate_rows,
    ground_truth_of,
)
from resight.neighbours.rerank import K1, Reranking, rerank
from resight.neighbours.search import farthest_distances, search_neighbours
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site

RANKS = (1, 5, 10)  # the ranks that papers report


@dataclass(frozen=True, eq=False)
class SiteScore:
    """The results of `measure_site`.

    Attributes:
        ranking: closed set; by re-ranked distance if requested.
        pairs: the same for each pair of cameras.
        open_set: always by cosine similarity, since a service applies thresholds to similarities. None if it
            cannot be measured; see ``reservation``.
        reservation: why there are no open-set metrics; empty if there are.
        camera_names: names of the cameras of ``pairs``.
        queries: Q.
        gallery: G.
    """

    ranking: RankingScore
    pairs: CameraPairScore
    open_set: OpenSetScore | None
    reservation: str
    camera_names: tuple[str, ...]
    queries: int
    gallery: int


def evaluate_site(site: Site, embed: Callable[[CropStore], Floats]) -> RankingScore:
    """Rank a site's gallery for each of its queries.

    Args:
        site: with a query and a gallery split.
        embed: crops of a store -> float32 (N, D), unit rows.

    Raises:
        SiteError: the site has no query and gallery.
        InputError: no query has a match in another camera.
    """
    query, gallery = evaluation_splits(site)
    return evaluate_ranking(
        embed(query), embed(gallery), query.persons, gallery.persons, query.cameras, gallery.cameras
    )


def measure_site(
    site: Site, embed: Callable[[CropStore], Floats], *, reranked: bool = False, device: str = "cpu"
) -> SiteScore:
    """Closed-set, open-set and camera-pair metrics of a site.

    Args:
        site: with a query and a gallery split.
        embed: crops of a store -> float32 (N, D), unit rows.
        reranked: rank the closed-set lists by k-reciprocal re-ranking.
        device: for the neighbour search of re-ranking.

    Raises:
        SiteError: the site has no query and gallery.
        InputError: no query has a match in another camera.
    """
    query, gallery = evaluation_splits(site)
    truth = ground_truth_of(query.persons, gallery.persons, query.cameras, gallery.cameras)
    features = embed(query), embed(gallery)
    cosine = cosine_rows(*features, truth)
    ranked_by = rerank_features(*features, device=device).rows if reranked else cosine
    ranking = evaluate_rows(ranked_by, truth)
    open_set, reservation = None, ""
    try:
        open_set = evaluate_open_set(cosine, truth)
    except InputError as error:
        reservation = str(error)
    pairs = evaluate_camera_pairs(ranked_by, truth)
    return SiteScore(ranking, pairs, open_set, reservation, query.camera_names, len(query), len(gallery))


def rerank_features(query: Floats, gallery: Floats, *, device: str = "cpu") -> Reranking:
    """k-reciprocal re-ranking of a gallery for all queries, with the paper's parameters.

    Args:
        query: float32 (Q, D), unit rows.
        gallery: float32 (G, D), unit rows.
        device: where neighbours are searched.
    """
    crops = np.concatenate([query, gallery])
    near = search_neighbours(crops, K1 + 1, device=device)
    return rerank(query, gallery, near, farthest_distances(crops, device=device))


def evaluation_splits(site: Site) -> tuple[CropStore, CropStore]:
    """Query and gallery of a site.

    Raises:
        SiteError: it has none, because its persons are not labelled, or all crops are from one camera.
    """
    if site.query is None or site.gallery is None:
        raise SiteError(
            f"{site.root} has no query and gallery: evaluation needs known persons seen by two cameras or more, in a "
            "Market-1501 folder, a crop store with splits, or folders <camera>/<person>/; to adapt without them "
            "use `resight adapt`"
        )
    if len(np.unique(np.concatenate([site.query.cameras, site.gallery.cameras]))) < 2:
        raise SiteError(
            f"all query and gallery crops of {site.root} are from one camera: evaluation counts matches seen by "
            "another camera and needs two or more; to adapt to one camera use `resight adapt`"
        )
    return site.query, site.gallery


def percentages(score: RankingScore) -> dict[str, float]:
    """The metrics that papers report, in percent, rounded to hundredths."""
    ranks = {f"rank{r}": score.rank(r) for r in RANKS}
    return {name: round(100 * value, 2) for name, value in {"mAP": score.mAP, **ranks, "mINP": score.mINP}.items()}


FPIR_TARGETS = (0.01, 0.1)
OPEN_SET_RANKS = (1, 10)  # the best hit, and the ten hits that a search returns by default


def operating_points(score: OpenSetScore) -> list[OperatingPoint]:
    """The operating points at each FPIR of `FPIR_TARGETS`, for `OPEN_SET_RANKS`."""
    return [score.at_fpir(target, OPEN_SET_RANKS) for target in FPIR_TARGETS]


def score_to_json(score: SiteScore) -> dict[str, Any]:
    """All metrics for ``--json``; docs/evaluation.md documents each key. None for a metric that is not available."""
    return {
        **percentages(score.ranking),
        "valid_queries": score.ranking.valid_queries,
        "queries": score.queries,
        "gallery": score.gallery,
        "cmc": [percent(share) for share in score.ranking.cmc],
        "open_set": _open_set_json(score.open_set) if score.open_set else None,
        "open_set_reservation": score.reservation,
        "camera_pairs": _camera_pairs_json(score),
    }


def percent(fraction: float | None) -> float | None:
    """Convert to percent, rounded to hundredths; None for None and NaN."""
    return None if fraction is None or math.isnan(fraction) else round(100 * fraction, 2)


def _open_set_json(score: OpenSetScore) -> dict[str, Any]:
    """Counts, operating points and the curve."""
    return {
        "enrolled_persons": list(score.persons),
        "entries": list(score.entries),
        "mated_searches": len(score.mated_similarity),
        "nonmated_searches": len(score.nonmated_similarity),
        "operating_points": [_point_json(point) for point in operating_points(score)],
        "curve": [
            {
                "threshold": float(threshold),
                "fpir": percent(score.fpir(threshold)),
                **{f"fnir_rank{rank}": percent(score.fnir(threshold, rank)) for rank in OPEN_SET_RANKS},
            }
            for threshold in score.curve()
        ],
    }


def _point_json(point: OperatingPoint) -> dict[str, Any]:
    """One operating point, with a key for each rank."""
    values = asdict(point) | {"target": percent(point.target), "fpir": percent(point.fpir)}
    del values["tpir"]
    return values | {f"tpir_rank{r}": percent(share) for r, share in zip(OPEN_SET_RANKS, point.tpir, strict=True)}


def _camera_pairs_json(score: SiteScore) -> list[dict[str, Any]]:
    """One entry for each pair of cameras."""
    pairs, names = score.pairs, score.camera_names
    return [
        {
            "query_camera": names[pairs.query_cameras[a]],
            "gallery_camera": names[pairs.gallery_cameras[b]],
            "mAP": percent(float(pairs.mAP[a, b])),
            "rank1": percent(float(pairs.rank1[a, b])),
            "valid_queries": int(pairs.valid_queries[a, b]),
        }
        for a, b in np.ndindex(pairs.mAP.shape)
    ]
