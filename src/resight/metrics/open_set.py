"""Open-set figures: how often a search for somebody who is not enrolled finds somebody, and the reverse.

Terms of ISO/IEC 19795-1:2021 (FNIR is its 3.22) and NIST's FRVT 1:N (NISTIR 8271): a search is
*mated* when its person is enrolled, *non-mated* otherwise; N persons are enrolled, T is the threshold, R a rank.

    FPIR(N, T)    = share of non-mated searches with one entry or more at or above T
    FNIR(N, R, T) = share of mated searches whose person's best entry is below T or ranks after R
    TPIR          = 1 - FNIR

A candidate is an entry, as in `Search`'s answers and in CMC; "at or above" as the service's ``min_similarity``.

Two watch lists. Persons in rising order of number are dealt to two halves by turns: the first to half 0, the second to
half 1, and so on. List h holds the gallery rows of half h and all distractors (person 0: strangers to every query).
Each query is searched twice: in the list of its own half, a mated search if an entry of its person is left there,
and in the other list, a non-mated one. Entries of the same person and camera are junk (`resight.metrics.ranking`) and
person -1 takes no part on either side. A query of person 0 is nobody: non-mated in list 1, never mated.

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
RELIABLE_ERRORS = 30  # Doddington's rule: with 30 errors a rate is within 30 % of the truth at 90 % confidence


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold chosen for an FPIR costs; rates are fractions.

    Attributes:
        target: the FPIR asked for.
        threshold: the smallest with an FPIR of at most ``target``; None where the searches cannot resolve it, and
            so are the figures below.
        fpir: what it reaches.
        false_positives: non-mated searches that found somebody.
        tpir: 1 - FNIR for each rank asked for.
        reservation: what a reader must know of these figures; empty where enough searches stand behind them.
    """

    target: float
    threshold: float | None
    fpir: float | None
    false_positives: int | None
    tpir: tuple[float | None, ...]
    reservation: str


@dataclass(frozen=True)
class OpenSetScore:
    """What every search found; all figures follow from these.

    Attributes:
        mated_similarity: float32 (M,), of the person's best entry.
        mated_rank: int64 (M,), 1 + entries before that one; of equally similar entries the smaller row comes first.
        nonmated_similarity: float32 (U,), of the best entry, falling.
        persons: how many are enrolled in each list, the N of both rates.
        entries: gallery rows in each list.
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

        With U searches the rates above 0 start at 1 / U: below that, "no false positive in U searches" is all that
        is known, and the true rate may well be 3 / U (the rule of 3).
        """
        searches = len(self.nonmated_similarity)
        allowed = math.floor(target * searches + 1e-9)  # 0.29 * 100 is 28.999...
        if not allowed:
            reservation = f"{searches} non-mated searches cannot resolve it: it takes {_ceil(1 / target)} or more"
            return OperatingPoint(target, None, None, None, (None,) * len(ranks), reservation)
        threshold = float(self._above(self.nonmated_similarity[allowed : allowed + 1])[0])  # the next one stays below
        positives = int((self.nonmated_similarity >= threshold).sum())
        reservation = ""
        if allowed < RELIABLE_ERRORS:
            needed = _ceil(RELIABLE_ERRORS / target)
            reservation = f"rests on {positives} of {searches} non-mated searches; {needed} would make it reliable"
        tpir = tuple(1 - self.fnir(threshold, rank) for rank in ranks)
        return OperatingPoint(target, threshold, positives / searches, positives, tpir, reservation)

    def curve(self, points: int = CURVE_POINTS) -> Floats:
        """Thresholds from strict to lax at which FPIR goes from 0 to 1, each the smallest for its FPIR.

        Dense where false positives are few, for that is where a service runs: steps of FPIR are of equal ratio.

        Args:
            points: at most so many thresholds, 3 or more.

        Returns:
            float32 (P,), falling; for `fpir` and `fnir`.
        """
        searches = len(self.nonmated_similarity)
        allowed = np.unique(np.append(0, np.geomspace(1, searches, points - 1).round().astype(np.int64)[:-1]))
        thresholds = self._above(self.nonmated_similarity[allowed[allowed < searches]])
        lowest = min(self.nonmated_similarity[-1], self.mated_similarity.min())
        return np.unique(np.append(thresholds, lowest))[::-1]

    @staticmethod
    def _above(similarity: Floats) -> Floats:
        """The smallest thresholds that these similarities do not reach."""
        return np.nextafter(similarity, np.float32(np.inf))


def evaluate_open_set(rows: SimilarityRows, truth: GroundTruth, *, chunk: int = QUERY_CHUNK) -> OpenSetScore:
    """Search every query in both watch lists.

    Args:
        rows: similarities of some queries to all gallery rows, larger is nearer; called once for each chunk.
        truth: who is on which image.
        chunk: queries searched at once; it bounds memory and changes no figure.

    Raises:
        InputError: a list would have nobody in it, or no query is left for one kind of search.
    """
    query_half, gallery_half = _halves(truth)
    distractor = truth.gallery_persons == 0
    lists = np.stack([(gallery_half == half) & (truth.gallery_persons > 0) for half in (0, 1)])  # (2, G)
    persons = [len(np.unique(truth.gallery_persons[row])) for row in lists]
    if not all(persons):
        raise InputError(
            f"open-set figures need two persons or more in the gallery, found {sum(persons)}: add crops of others"
        )
    entries = lists | distractor
    similarity, ranks, strangers = [], [], []
    for part in query_chunks(truth, chunk):
        found = np.asarray(rows(part), np.float32)  # (q, G)
        known = truth.query_persons[part] >= 0
        own = query_half[part]
        strangers.append(np.where(entries[1 - own], found, -np.inf).max(axis=1)[known])
        mated, rank = _mated(found, entries[own], *truth.judge(part))
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
            f"none of {len(truth.query_persons)} queries has a match seen by another camera: open-set figures need "
            "images of the same people from at least two cameras"
        )
    return score


def _halves(truth: GroundTruth) -> tuple[Ints, Ints]:
    """0 or 1 for each query and each gallery row: every other person, by number."""
    persons = np.unique(np.concatenate([truth.query_persons, truth.gallery_persons]))
    persons = persons[persons > 0]
    query, gallery = (np.searchsorted(persons, side) % 2 for side in (truth.query_persons, truth.gallery_persons))
    return query, gallery


def _mated(
    similarity: Floats, entries: NDArray[np.bool_], match: NDArray[np.bool_], junk: NDArray[np.bool_]
) -> tuple[Floats, Ints]:
    """Similarity (q,) and rank (q,) of each query's best matching entry; rank 0 where it has none."""
    best = np.where(match, similarity, -np.inf).argmax(axis=1)  # the first of equals
    top = similarity[np.arange(len(best)), best]
    earlier = np.arange(similarity.shape[1]) < best[:, None]
    before = (similarity > top[:, None]) | ((similarity == top[:, None]) & earlier)
    rank = 1 + (before & entries & ~junk).sum(axis=1)
    return top, np.where(match.any(axis=1), rank, 0)


def _ceil(value: float) -> int:
    """Rounded up, where 30 / 0.1 is 300."""
    return math.ceil(value - 1e-9)
