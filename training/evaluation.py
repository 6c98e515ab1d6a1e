"""The figures of `resight evaluate` as it shows and writes them: rates in percent, similarities as cosines."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from resight.openset import OpenSetScore, OperatingPoint
from resight.training.evaluate import SiteScore, percentages

FPIR_TARGETS = (0.01, 0.1)
OPEN_SET_RANKS = (1, 10)  # the right person first; or within the ten hits a search returns by default


def operating_points(score: OpenSetScore) -> list[OperatingPoint]:
    """At each FPIR of `FPIR_TARGETS`, for `OPEN_SET_RANKS`."""
    return [score.at_fpir(target, OPEN_SET_RANKS) for target in FPIR_TARGETS]


def as_json(score: SiteScore) -> dict[str, Any]:
    """All figures as ``--json`` writes them; docs/evaluation.md has each key. None where there is no figure."""
    return {
        **percentages(score.ranking),
        "valid_queries": score.ranking.valid_queries,
        "queries": score.queries,
        "gallery": score.gallery,
        "cmc": [percent(share) for share in score.ranking.cmc],
        "open_set": _open_set(score.open_set) if score.open_set else None,
        "open_set_reservation": score.reservation,
        "camera_pairs": _pairs(score),
    }


def percent(fraction: float | None) -> float | None:
    """In percent, rounded to hundredths; None for None and NaN."""
    return None if fraction is None or math.isnan(fraction) else round(100 * fraction, 2)


def _open_set(score: OpenSetScore) -> dict[str, Any]:
    """Counts, operating points and the curve."""
    return {
        "enrolled_persons": list(score.persons),
        "entries": list(score.entries),
        "mated_searches": len(score.mated_similarity),
        "nonmated_searches": len(score.nonmated_similarity),
        "operating_points": [_point(point) for point in operating_points(score)],
        "curve": [
            {
                "threshold": float(threshold),
                "fpir": percent(score.fpir(threshold)),
                **{f"fnir_rank{rank}": percent(score.fnir(threshold, rank)) for rank in OPEN_SET_RANKS},
            }
            for threshold in score.curve()
        ],
    }


def _point(point: OperatingPoint) -> dict[str, Any]:
    """One operating point, with a key for each rank."""
    told = asdict(point) | {"target": percent(point.target), "fpir": percent(point.fpir)}
    del told["tpir"]
    return told | {f"tpir_rank{r}": percent(share) for r, share in zip(OPEN_SET_RANKS, point.tpir, strict=True)}


def _pairs(score: SiteScore) -> list[dict[str, Any]]:
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
