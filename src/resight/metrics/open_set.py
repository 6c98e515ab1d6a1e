"""Open-set metrics: false positives of searches for persons who are not enrolled, and misses of those who are.

Terms of ISO/IEC 19795-1:2021 (FNIR is its 3.22) and NIST's FRVT 1:N (NISTIR 8271): a search is
*mated* when its person is enrolled, *non-mated* otherwise; N persons are enrolled, T is the threshold, R a rank.

    FPIR(N, T)    = share of non-mated searches with one entry or more at or above T
    FNIR(N, R, T) = share of mated searches whose person's best entry is below T or ranks after R
    TPIR          = 1 - FNIR

A candidate is an entry, as in ``Search`` and CMC; "at or above" is as in the service's ``min_similarity``.

There are two watch lists. Persons, ordered by number, are assigned alternately to half 0 and half 1. List h holds the
gallery rows of half h and all distractors (person 0). Each query is searched twice: in the list of its own half, which
is a mated search if an entry of its person remains there, and in the other list, a non-mated search. Entries of the
same person and camera are junk (`resight.metrics.ranking`), and person -1 is ignored on both sides. A query of person 0
is only searched non-mated, in list 1.

Letters: Q queries, G gallery rows, M mated and U non-mated searches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Floats, Ints
from resight.errors import InputError
from resight.metrics.ranking import QUERY_CHUNK, GroundTruth, SimilarityRows, query_chunks

CURVE_POINTS = 100
RELIABLE_ERRORS = 30  # Doddington's rule: 30 errors give a rate within 30 % at 90 % confidence


@dataclass(frozen=True)
class OperatingPoint:
    """The error rates at the threshold chosen for an FPIR; rates are fractions.

    Attributes:
        target: the requested FPIR.
        threshold: the smallest with an FPIR of at most ``target``; None, like the rates below, if there are too few
            searches to resolve it.
        fpir: the FPIR at this threshold.
        false_positives: number of non-mated searches with an entry at or above the threshold.
        tpir: 1 - FNIR for each requested rank.
        reservation: a warning about too few searches; empty if there are enough.
    """

    target: float
    threshold: float | None
    fpir: float | None
    false_positives: int | None
    tpir: tuple[float | None, ...]
    reservation: str


@dataclass(frozen=True)
class OpenSetScore:
    """The results of all searches, from which all rates are computed.

    Attributes:
        mated_similarity: float32 (M,), similarity of the person's best entry.
        mated_rank: int64 (M,), rank of that entry; ties are ordered by row.
        nonmated_similarity: float32 (U,), similarity of the best entry, descending.
        persons: number of persons enrolled in each list, the N of both rates.
        entries: number of gallery rows in each list.
    """

    mated_similarity: Floats
    mated_rank: Ints
    nonmated_similarity: Floats
    persons: tuple[int, int]
    entries: tuple[int, int]

    def fpir(self, threshold: float) -> float:
        """Share of non-mated searches with an entry at or above the threshold."""
        return float((self.nonmated_similarity >= threshold).mean())

    def fnir(self, threshold: float, rank: int) -> float:
        """Share of mated searches whose person is not among the first ``rank`` entries at or above the threshold."""
        found = (self.mated_similarity >= threshold) & (self.mated_rank <= rank)
        return float(1.0 - found.mean())

    def at_fpir(self, target: float, ranks: Sequence[int]) -> OperatingPoint:
        """The operating point for an FPIR, a fraction in (0, 1).

        With U searches the smallest rate above 0 is 1 / U. Without a false positive in U searches, the true rate may
        still be as high as 3 / U (the rule of 3).
        """
        searches = len(self.nonmated_similarity)
        allowed = math.floor(target * searches + 1e-9)  # 0.29 * 100 is 28.999...
        if not allowed:
            reservation = f"{searches} non-mated searches cannot resolve it: at least {_ceil(1 / target)} are needed"
            return OperatingPoint(target, None, None, None, (None,) * len(ranks), reservation)
        threshold = float(self._above(self.nonmated_similarity[allowed : allowed + 1])[0])  # above the next similarity
        positives = int((self.nonmated_similarity >= threshold).sum())
        reservation = ""
        if allowed < RELIABLE_ERRORS:
            needed = _ceil(RELIABLE_ERRORS / target)
            reservation = f"based on {positives} of {searches} non-mated searches; {needed} would make it reliable"
        tpir = tuple(1 - self.fnir(threshold, rank) for rank in ranks)
        return OperatingPoint(target, threshold, positives / searches, positives, tpir, reservation)

    def curve(self, points: int = CURVE_POINTS) -> Floats:
        """Descending thresholds at which FPIR rises from 0 to 1, each the smallest for its FPIR.

        FPIR is spaced geometrically, so that the points are dense at few false positives, where services operate.

        Args:
            points: maximum number of thresholds, 3 or more.

        Returns:
            float32 (P,), descending; for `fpir` and `fnir`.
        """
        searches = len(self.nonmated_similarity)
        allowed = np.unique(np.append(0, np.geomspace(1, searches, points - 1).round().astype(np.int64)[:-1]))
        thresholds = self._above(self.nonmated_similarity[allowed[allowed < searches]])
        lowest = min(self.nonmated_similarity[-1], self.mated_similarity.min())
        return np.unique(np.append(thresholds, lowest))[::-1]

    @staticmethod
    def _above(similarity: Floats) -> Floats:
        """The smallest thresholds above these similarities."""
        return np.nextafter(similarity, np.float32(np.inf))


def evaluate_open_set(rows: SimilarityRows, truth: GroundTruth, *, chunk: int = QUERY_CHUNK) -> OpenSetScore:
    """Search both watch lists for every query.

    Args:
        rows: returns the similarities of some queries to all gallery rows; called once for each chunk.
        truth: who is on which image.
        chunk: queries per step; limits memory, does not change the result.

    Raises:
        InputError: a list would be empty, or there is no query for one kind of search.
    """
    query_half, gallery_half = _halves(truth)
    distractor = truth.gallery_persons == 0
    lists = np.stack([(gallery_half == half) & (truth.gallery_persons > 0) for half in (0, 1)])  # (2, G)
    persons = [len(np.unique(truth.gallery_persons[row])) for row in lists]
    if not all(persons):
        raise InputError(
            f"open-set metrics need at least two persons in the gallery, found {sum(persons)}: add crops of others"
        )
    entries = lists | distractor
    similarity, ranks, strangers = [], [], []
    for part in query_chunks(truth, chunk):
        found = np.asarray(rows(part), np.float32)  # (q, G)
        known = truth.query_persons[part] >= 0
        own = query_half[part]
        strangers.append(np.where(entries[1 - own], found, -np.inf).max(axis=1)[known])
        mated, rank = _mated(found, entries[own], *truth.match_masks(part))
        similarity.append(mated[rank > 0])
        ranks.append(rank[rank > 0])
    score = OpenSetScore(
        np.concatenate(similarity),
        np.concatenate(ranks),
        np.sort(np.concatenate(strangers))[::-1],
        (persons[0], persons[1]),
        (int(entries[0].sum()), int(entries[1].sum())),
    )
    if not len(score.mated_similarity):
        raise InputError(
            f"none of {len(truth.query_persons)} queries has a match seen by another camera: open-set metrics need "
            "images of the same people from at least two cameras"
        )
    return score


def _halves(truth: GroundTruth) -> tuple[Ints, Ints]:
    """The half, 0 or 1, of each query and each gallery row: persons alternate by number."""
    persons = np.unique(np.concatenate([truth.query_persons, truth.gallery_persons]))
    persons = persons[persons > 0]
    query, gallery = (np.searchsorted(persons, side) % 2 for side in (truth.query_persons, truth.gallery_persons))
    return query, gallery


def _mated(
    similarity: Floats, entries: NDArray[np.bool_], match: NDArray[np.bool_], junk: NDArray[np.bool_]
) -> tuple[Floats, Ints]:
    """Similarity (q,) and rank (q,) of each query's best matching entry; rank 0 without a match."""
    best = np.where(match, similarity, -np.inf).argmax(axis=1)  # the first of equals
    top = similarity[np.arange(len(best)), best]
    earlier = np.arange(similarity.shape[1]) < best[:, None]
    before = (similarity > top[:, None]) | ((similarity == top[:, None]) & earlier)
    rank = 1 + (before & entries & ~junk).sum(axis=1)
    return top, np.where(match.any(axis=1), rank, 0)


def _ceil(value: float) -> int:
    """Round up, ignoring rounding errors: 30 / 0.1 gives 300."""
    return math.ceil(value - 1e-9)
