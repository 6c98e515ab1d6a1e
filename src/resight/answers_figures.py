"""What a server answers of figures: a shadowed model beside the active one, and what searches came to.

As in `resight.answers`; None stands for a figure that nothing was counted for, or that needs a calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

ShadowState = Literal["running", "done", "expired", "stopped", "superseded", "interrupted"]


@dataclass(frozen=True)
class ShadowSide:
    """How one of two models answered.

    Attributes:
        unknown_share: of decisions, 0..1.
        mean_probability: of best hits; ``mean_cosine`` likewise.
        measured: searches that both models did once more, at the same low priority and in turn, to be timed.
        infer_p50_ns: of one crop; so all times, over the newest 1000 that were timed, in nanoseconds.
        total_p50_ns: inference of one crop and search.
    """

    matches: int
    uncertain: int
    unknown: int
    without_hit: int
    unknown_share: float | None
    mean_probability: float | None
    mean_cosine: float | None
    measured: int
    infer_p50_ns: int
    infer_p95_ns: int
    search_p50_ns: int
    search_p95_ns: int
    total_p50_ns: int
    total_p95_ns: int


@dataclass(frozen=True)
class ShadowFigures:
    """What a shadow has counted so far; shares are 0..1, of ``answered``.

    Attributes:
        offered: searches of crops while it ran.
        sampled: of them chosen: answered, dropped, failed or under way.
        answered: by both models.
        dropped: the server had better things to do.
        failed: the candidate could not answer.
        top1_agreement: best hits of one subject, of one entry where either has no subject.
        overlap_at_10: mean share of entries that both name among their first min(10, top_k).
        decision_agreement: None where either space has no calibration.
        cosine_shift: mean cosine of best hits, the candidate's less the active one's.
    """

    offered: int
    sampled: int
    answered: int
    dropped: int
    failed: int
    top1_agreement: float | None
    overlap_at_10: float | None
    decision_agreement: float | None
    cosine_shift: float | None
    active: ShadowSide
    candidate: ShadowSide


@dataclass(frozen=True)
class Shadow:
    """A candidate model that answers a sample of a collection's searches beside the active one.

    Attributes:
        model_id: the candidate; ``space_id`` its space.
        sample: share of the searches of crops, 0..1.
        max_searches: answered ones, after which it ends; 0 = without such an end.
        ended: None while it runs.
        expires: None = it does not.
        operation_id: the shadow as long work.
    """

    collection: str
    model_id: str
    space_id: str
    active_model_id: str
    active_space_id: str
    state: ShadowState
    sample: float
    max_searches: int
    started: datetime
    ended: datetime | None
    expires: datetime | None
    operation_id: str
    figures: ShadowFigures


@dataclass(frozen=True)
class SearchFigures:
    """What a collection's searches in one space came to, in a window of whole minutes.

    Attributes:
        active: the collection is searched in that space now.
        without_hit: searches without any hit; with a calibration also among the unknown.
        unknown_share: of searches with a decision, 0..1.
        mean_cosine: of best hits; ``mean_probability`` likewise.
        drift_index: population stability index of best hits' cosines against the reference; None below 100 hits.
        mean_shift: mean cosine less the reference's; likewise.
        reference_searches: best hits the reference holds.
        cosine_histogram: best hits in 64 bins of equal width over -1..1.
    """

    space_id: str
    model_id: str
    active: bool
    searches: int
    matches: int
    uncertain: int
    unknown: int
    without_hit: int
    unknown_share: float | None
    mean_cosine: float | None
    mean_probability: float | None
    drift_index: float | None
    mean_shift: float | None
    reference_searches: int
    first_time: datetime
    last_time: datetime
    cosine_histogram: tuple[int, ...]
