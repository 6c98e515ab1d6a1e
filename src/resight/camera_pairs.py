"""Which camera finds which: ranking figures for every pair of a query's and the gallery's camera.

One figure for a site hides a pair that fails. Here the gallery is limited to one camera at a time; the
Market-1501 rule stands (`resight.ranking`), so that a camera paired with itself has junk only and no figure.

Letters: Q queries, G gallery rows, A cameras with queries, B cameras with gallery rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.ranking import CHUNK, Ints, SimilarityRows, Truth, average_precision, chunks, ranked_matches


@dataclass(frozen=True)
class CameraPairs:
    """Figures of each pair, fractions in [0, 1], NaN where no query of the pair has a match.

    Attributes:
        query_cameras: int64 (A,), rising.
        gallery_cameras: int64 (B,), rising.
        mAP: float64 (A, B).
        rank1: float64 (A, B).
        valid_queries: int64 (A, B), queries of one camera that have a match in the other.
    """

    query_cameras: Ints
    gallery_cameras: Ints
    mAP: NDArray[np.float64]
    rank1: NDArray[np.float64]
    valid_queries: Ints


def evaluate_camera_pairs(rows: SimilarityRows, truth: Truth, *, chunk: int = CHUNK) -> CameraPairs:
    """Rank each camera's part of the gallery for each query, and average by the query's camera.

    Args:
        rows: similarities of some queries to all gallery rows; called once for each chunk.
        truth: who is on which image.
        chunk: queries ranked at once; it bounds memory and changes no figure.
    """
    query_cameras, gallery_cameras = np.unique(truth.query_cameras), np.unique(truth.gallery_cameras)
    parts = [np.flatnonzero(truth.gallery_cameras == camera) for camera in gallery_cameras]
    precision = np.full((len(truth.query_persons), len(parts)), np.nan)  # (Q, B)
    first = np.full(precision.shape, np.nan)  # (Q, B), 1 where the best row is a match
    for queries in chunks(truth, chunk):
        similarity, (match, junk) = rows(queries), truth.judge(queries)
        for column, part in enumerate(parts):
            found = ranked_matches(similarity[:, part], match[:, part], junk[:, part])
            for query, (ranks, matches) in enumerate(found, queries.start):
                if matches:
                    precision[query, column] = average_precision(ranks, matches)
                    first[query, column] = ranks[0] == 1
    of_camera = truth.query_cameras == query_cameras[:, None]  # (A, Q)
    valid = of_camera.astype(np.int64) @ ~np.isnan(precision)  # (A, B)
    share = np.where(valid, 1 / np.maximum(valid, 1), np.nan)
    sums = (of_camera.astype(np.float64) @ np.nan_to_num(figure) for figure in (precision, first))
    mean_precision, rank1 = (total * share for total in sums)
    return CameraPairs(query_cameras, gallery_cameras, mean_precision, rank1, valid.astype(np.int64))
