"""Metrics of ranked lists: mAP, mINP and CMC by the single-query protocol of Market-1501, overall and per camera pair.

For each query, gallery rows of the same person seen by the same camera are junk: they are removed before ranking
(Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015). Rows of person -1 (unknown) are junk for
every query. Person 0 is Market-1501's distractor: it counts as wrong and is never searched for. Queries without a match
are skipped and counted. All metrics are fractions in [0, 1].

The metrics of a camera pair limit the gallery to one camera at a time, since a metric over the whole site hides a pair
that fails. By the rule above, a camera paired with itself has only junk and therefore no metric.

Letters: Q queries, G gallery rows, D feature size, A cameras with queries, B cameras with gallery rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Ints
from resight.errors import InputError

SimilarityRows = Callable[[slice], NDArray[np.floating]]
"""Slice of the queries -> float (q, G), their similarities to all gallery rows; larger is nearer."""
MAX_RANK = 50  # CMC is reported up to rank 50 at most; papers print ranks 1, 5 and 10
QUERY_CHUNK = 256  # queries per step: 256 x 82,161 rows of MSMT17 take 80 MiB per matrix


@dataclass(frozen=True)
class RankingScore:
    """Metrics over the valid queries, each in [0, 1].

    Attributes:
        mAP: mean of average precision.
        mINP: mean of (matches / rank of the last match), the effort to find everyone (Ye et al., TPAMI 2021, Eq. 1).
        cmc: float64 (R,): ``cmc[r - 1]`` is the share of queries whose first match has rank r or better.
        average_precision: float64 (Q,): per query, NaN for skipped queries.
        valid_queries: number of queries with a match.
    """

    mAP: float
    mINP: float
    cmc: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    valid_queries: int

    def rank(self, r: int) -> float:
        """Share of queries with a match among the first r rows."""
        return float(self.cmc[min(r, len(self.cmc)) - 1])


@dataclass(frozen=True)
class GroundTruth:
    """Persons and cameras of the images: int64 (Q,) and (G,). Both sides share one camera numbering.

    Raises:
        InputError: lengths differ, or there is no query or no gallery row.
    """

    query_persons: Ints
    gallery_persons: Ints
    query_cameras: Ints
    gallery_cameras: Ints

    def __post_init__(self) -> None:
        for side in ("query", "gallery"):
            persons, cameras = getattr(self, f"{side}_persons"), getattr(self, f"{side}_cameras")
            if persons.ndim != 1 or persons.shape != cameras.shape or not len(persons):
                raise InputError(
                    f"expected one person and one camera for each {side} image, found {persons.shape} persons and "
                    f"{cameras.shape} cameras: check the site's table",
                    field=f"{side}_persons",
                )

    @property
    def gallery(self) -> int:
        """G."""
        return len(self.gallery_persons)

    def match_masks(self, queries: slice) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Masks of the gallery rows that are matches and that are junk, each bool (q, G), for some of the queries."""
        persons = self.query_persons[queries, None]
        same = persons == self.gallery_persons
        junk = (same & (self.query_cameras[queries, None] == self.gallery_cameras)) | (self.gallery_persons < 0)
        return same & ~junk & (persons > 0), junk


def evaluate_ranking(
    query_features: NDArray[np.floating],
    gallery_features: NDArray[np.floating],
    query_persons: Ints,
    gallery_persons: Ints,
    query_cameras: Ints,
    gallery_cameras: Ints,
    *,
    chunk: int = QUERY_CHUNK,
) -> RankingScore:
    """Rank the gallery for each query by similarity and score the lists.

    Ties are ordered by row.

    Args:
        query_features: (Q, D), unit rows.
        gallery_features: (G, D), unit rows.
        query_persons: int (Q,).
        gallery_persons: int (G,).
        query_cameras: int (Q,), in the same numbering as the gallery's.
        gallery_cameras: int (G,).
        chunk: queries ranked at once; limits memory, does not change the result.

    Raises:
        InputError: lengths differ, a feature is not finite, or no query has a match.
    """
    truth = ground_truth_of(query_persons, gallery_persons, query_cameras, gallery_cameras)
    return evaluate_rows(cosine_rows(query_features, gallery_features, truth), truth, chunk=chunk)


def evaluate_rows(rows: SimilarityRows, truth: GroundTruth, *, chunk: int = QUERY_CHUNK) -> RankingScore:
    """Score the rankings by any similarity; see `evaluate_ranking`.

    Args:
        rows: returns the similarities of some queries to all gallery rows; called once for each chunk.
        truth: persons and cameras of the images.
        chunk: queries ranked at once.

    Raises:
        InputError: no query has a match.
    """

    def match_ranks() -> Iterator[tuple[Ints, int]]:
        for part in query_chunks(truth, chunk):
            yield from ranked_matches(rows(part), *truth.match_masks(part))

    return _summarise(match_ranks(), truth.gallery)


def query_chunks(truth: GroundTruth, chunk: int) -> Iterator[slice]:
    """The queries in order, at most ``chunk`` at a time."""
    queries = len(truth.query_persons)
    for start in range(0, queries, chunk):
        yield slice(start, min(start + chunk, queries))


def cosine_rows(
    query_features: NDArray[np.floating], gallery_features: NDArray[np.floating], truth: GroundTruth
) -> SimilarityRows:
    """Similarity of unit rows by inner product.

    Args:
        query_features: (Q, D), unit rows.
        gallery_features: (G, D), unit rows.
        truth: for Q and G.

    Raises:
        InputError: lengths differ, or a feature is not finite.
    """
    queries, gallery = np.asarray(query_features), np.asarray(gallery_features)
    expected = (len(truth.query_persons), truth.gallery)
    if queries.ndim != 2 or gallery.ndim != 2 or (len(queries), len(gallery)) != expected:
        raise InputError(
            f"expected {expected} feature rows, found shapes {queries.shape} and {gallery.shape}; embed each image"
        )
    if queries.shape[1] != gallery.shape[1] or not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise InputError(
            f"expected finite features of one length, found lengths {queries.shape[1]} and {gallery.shape[1]}, "
            "or NaN among them: compute both sides with one model"
        )
    return lambda part: queries[part] @ gallery.T


def ranked_matches(
    similarity: NDArray[np.floating], match: NDArray[np.bool_], junk: NDArray[np.bool_]
) -> Iterator[tuple[Ints, int]]:
    """For each query the ascending 1-based ranks of its matches, and their number.

    Args:
        similarity: (q, G).
        match: bool (q, G), see `GroundTruth.match_masks`.
        junk: bool (q, G), rows removed before ranking.
    """
    distance = np.where(junk, np.inf, -similarity)  # junk last, as if removed
    order = np.argsort(distance, axis=1, kind="stable")
    for row in np.take_along_axis(match, order, axis=1):
        yield np.flatnonzero(row) + 1, int(row.sum())


def average_precision(ranks: Ints, matches: int) -> float:
    """Mean over all matches of the precision at their ranks; a match that was not found adds 0."""
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / matches)


def score_rankings(
    rankings: Sequence[Sequence[int]],
    query_persons: Ints,
    gallery_persons: Ints,
    query_cameras: Ints,
    gallery_cameras: Ints,
) -> RankingScore:
    """Score given ranked lists, such as the results of a service.

    A list may be truncated (at ``top_k``). A match that is not in the list counts as not found: it adds nothing to
    average precision and sets the query's INP to 0. Therefore metrics of truncated lists are lower bounds; they equal
    those of `evaluate_ranking` if every match is listed.

    Args:
        rankings: for each query, gallery row indices, best first; junk rows are skipped.
        query_persons: int (Q,).
        gallery_persons: int (G,).
        query_cameras: int (Q,).
        gallery_cameras: int (G,).

    Raises:
        InputError: lengths differ, a list repeats a row or has a row outside the gallery, or no query has a match.
    """
    truth = ground_truth_of(query_persons, gallery_persons, query_cameras, gallery_cameras)
    if len(rankings) != len(truth.query_persons):
        raise InputError(f"expected {len(truth.query_persons)} ranked lists, one per query, found {len(rankings)}")

    def match_ranks() -> Iterator[tuple[Ints, int]]:
        for query, ranking in enumerate(rankings):
            rows = np.asarray(ranking, dtype=np.int64)
            if len(np.unique(rows)) != len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < truth.gallery):
                raise InputError(f"expected distinct rows 0..{truth.gallery - 1}, found others in list {query}")
            match, junk = truth.match_masks(slice(query, query + 1))
            kept = rows[~junk[0, rows]]
            yield np.flatnonzero(match[0, kept]) + 1, int(match.sum())

    return _summarise(match_ranks(), truth.gallery)


def ground_truth_of(*columns: Ints) -> GroundTruth:
    """A `GroundTruth` from columns of any integer type."""
    return GroundTruth(*(np.asarray(column, dtype=np.int64) for column in columns))


def _summarise(found: Iterator[tuple[Ints, int]], gallery: int) -> RankingScore:
    """Average over queries.

    Args:
        found: for each query the ascending 1-based ranks of its matches, and the number of matches.
        gallery: G.
    """
    precisions, penalties = [], []
    cmc = np.zeros(min(MAX_RANK, gallery))
    for ranks, matches in found:
        if not matches:
            precisions.append(np.nan)
            continue
        precisions.append(average_precision(ranks, matches))
        penalties.append(matches / ranks[-1] if len(ranks) == matches else 0.0)
        if len(ranks):
            cmc[ranks[0] - 1 :] += 1
    if not penalties:
        raise InputError(
            f"none of {len(precisions)} queries has a match in the gallery seen by another camera: give images of the "
            "same people from at least two cameras, with one camera numbering for both sides"
        )
    valid = len(penalties)
    return RankingScore(
        float(np.nanmean(precisions)), float(np.mean(penalties)), cmc / valid, np.array(precisions), valid
    )


@dataclass(frozen=True)
class CameraPairScore:
    """Metrics of each camera pair, fractions in [0, 1], NaN if no query of the pair has a match.

    Attributes:
        query_cameras: int64 (A,), ascending.
        gallery_cameras: int64 (B,), ascending.
        mAP: float64 (A, B).
        rank1: float64 (A, B).
        valid_queries: int64 (A, B), queries of one camera that have a match in the other.
    """

    query_cameras: Ints
    gallery_cameras: Ints
    mAP: NDArray[np.float64]
    rank1: NDArray[np.float64]
    valid_queries: Ints


def evaluate_camera_pairs(rows: SimilarityRows, truth: GroundTruth, *, chunk: int = QUERY_CHUNK) -> CameraPairScore:
    """Rank each camera's gallery rows for each query, and average by the query's camera.

    Args:
        rows: returns the similarities of some queries to all gallery rows; called once for each chunk.
        truth: persons and cameras of the images.
        chunk: queries ranked at once; limits memory, does not change the result.
    """
    query_cameras, gallery_cameras = np.unique(truth.query_cameras), np.unique(truth.gallery_cameras)
    parts = [np.flatnonzero(truth.gallery_cameras == camera) for camera in gallery_cameras]
    precision = np.full((len(truth.query_persons), len(parts)), np.nan)  # (Q, B)
    first = np.full(precision.shape, np.nan)  # (Q, B), 1 if the best row is a match
    for queries in query_chunks(truth, chunk):
        similarity, (match, junk) = rows(queries), truth.match_masks(queries)
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
    return CameraPairScore(query_cameras, gallery_cameras, mean_precision, rank1, valid.astype(np.int64))
