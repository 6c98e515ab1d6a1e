"""Statistics that compare a candidate model's answers with the active model's; no query data is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from resight.service.records import now_us
from resight.service.search.ranking import RankedResult, ScoredHit
from resight.service.search.statistics import SearchCounts

COMPARED_HITS = 10  # entries per answer: the first page of results
MAX_TIMES = 1000  # newest times used for percentiles: 50 of them are above the 95th


@dataclass(frozen=True)
class ModelSideStatistics:
    """One model's answers; the fields are those of ``ShadowSide`` in model.proto."""

    matches: int = 0
    uncertain: int = 0
    unknown: int = 0
    without_hit: int = 0
    unknown_share: float | None = None
    mean_probability: float | None = None
    mean_cosine: float | None = None
    measured: int = 0
    infer_p50_ns: int = 0
    infer_p95_ns: int = 0
    search_p50_ns: int = 0
    search_p95_ns: int = 0
    total_p50_ns: int = 0
    total_p95_ns: int = 0


@dataclass(frozen=True)
class ShadowStatistics:
    """Both models' answers; the fields are those of ``ShadowStatistics`` in model.proto."""

    offered: int = 0
    sampled: int = 0
    answered: int = 0
    dropped: int = 0
    failed: int = 0
    top1_agreement: float | None = None
    overlap_at_10: float | None = None
    decision_agreement: float | None = None
    cosine_shift: float | None = None
    active: ModelSideStatistics = ModelSideStatistics()
    candidate: ModelSideStatistics = ModelSideStatistics()


class ModelSide:
    """Counts of one model's answers and their times."""

    def __init__(self) -> None:
        self._counted, self._measured = SearchCounts(), 0
        self._times: deque[tuple[int, int]] = deque(maxlen=MAX_TIMES)

    def add(self, answer: RankedResult) -> None:
        """Count an answer."""
        self._counted.add(answer, now_us())

    def measure(self, infer_ns: int, search_ns: int) -> None:
        """Add the times of one search: inference per crop, and search."""
        self._measured += 1
        self._times.append((infer_ns, search_ns))

    def figures(self) -> ModelSideStatistics:
        """The statistics so far."""
        own = self._counted
        decided = own.matches + own.uncertain + own.unknown
        times = np.array(self._times or [(0, 0)], np.int64)  # (N, 2)
        (infer_50, search_50), (infer_95, search_95) = np.percentile(times, (50, 95), axis=0).astype(int).tolist()
        total_50, total_95 = np.percentile(times.sum(axis=1), (50, 95)).astype(int).tolist()
        return ModelSideStatistics(
            matches=own.matches,
            uncertain=own.uncertain,
            unknown=own.unknown,
            without_hit=own.searches - own.hits,
            unknown_share=own.unknown / decided if decided else None,
            mean_probability=own.probability_sum / own.probable if own.probable else None,
            mean_cosine=own.cosine_sum / own.hits if own.hits else None,
            measured=self._measured,
            infer_p50_ns=infer_50,
            infer_p95_ns=infer_95,
            search_p50_ns=search_50,
            search_p95_ns=search_95,
            total_p50_ns=total_50,
            total_p95_ns=total_95,
        )


@dataclass
class ShadowTally:
    """The counts of a shadow run.

    Attributes:
        offered: searches by crop during the run.
        sampled: of them chosen; each is finally answered, dropped or failed.
        decided: queries for which both models made a decision.
        shifted: queries for which both models found a hit.
    """

    offered: int = 0
    sampled: int = 0
    answered: int = 0
    dropped: int = 0
    failed: int = 0
    same_best: int = 0
    overlap_sum: float = 0.0
    decided: int = 0
    same_decision: int = 0
    shifted: int = 0
    shift_sum: float = 0.0
    active: ModelSide = field(default_factory=ModelSide)
    candidate: ModelSide = field(default_factory=ModelSide)

    def compare(self, active: RankedResult, candidate: RankedResult) -> None:
        """Count the answers of both models to one query."""
        self.answered += 1
        self.active.add(active)
        self.candidate.add(candidate)
        self.same_best += same_top1(active.hits, candidate.hits)
        self.overlap_sum += overlap(active.hits, candidate.hits)
        if active.decision is not None and candidate.decision is not None:
            self.decided += 1
            self.same_decision += active.decision == candidate.decision
        if active.hits and candidate.hits:
            self.shifted += 1
            self.shift_sum += candidate.hits[0].hit.similarity - active.hits[0].hit.similarity

    def figures(self) -> ShadowStatistics:
        """The statistics so far."""
        return ShadowStatistics(
            offered=self.offered,
            sampled=self.sampled,
            answered=self.answered,
            dropped=self.dropped,
            failed=self.failed,
            top1_agreement=_share(self.same_best, self.answered),
            overlap_at_10=_share(self.overlap_sum, self.answered),
            decision_agreement=_share(self.same_decision, self.decided),
            cosine_shift=_share(self.shift_sum, self.shifted),
            active=self.active.figures(),
            candidate=self.candidate.figures(),
        )


def same_top1(ours: Sequence[ScoredHit], theirs: Sequence[ScoredHit]) -> bool:
    """Whether the best hits are of one subject, or of one entry if one has no subject; true if both are empty."""
    if not ours or not theirs:
        return not ours and not theirs
    one, other = ours[0].hit.entry, theirs[0].hit.entry
    if one.subject_id and other.subject_id:
        return one.subject_id == other.subject_id
    return one.entry_id == other.entry_id


def overlap(ours: Sequence[ScoredHit], theirs: Sequence[ScoredHit]) -> float:
    """Entries in both lists' first `COMPARED_HITS`, as a share of the longer list; 1 if both are empty."""
    one, other = ({ranked.hit.entry.entry_id for ranked in hits[:COMPARED_HITS]} for hits in (ours, theirs))
    return len(one & other) / max(len(one), len(other)) if one or other else 1.0


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
