"""What a server answers through `resight.client`: plain values, no protobuf.

Times are aware `datetime` values; an empty string, None or empty dict stands for what was not told.

What a server answers of figures: a shadowed model beside the active one, and what searches came to.

As in `resight.client.responses`; None stands for a figure that nothing was counted for, or that needs a calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from resight.arrays import Feature
from resight.errors import ReIDError

Decision = Literal["match", "uncertain", "unknown"]
ModelState = Literal["available", "loading", "ready", "failed"]
OperationState = Literal["pending", "running", "succeeded", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Entry:
    """An enrolled entry; its feature stays with the server unless asked for."""

    entry_id: str
    subject_id: str
    camera_id: str
    track_id: str
    capture_time: datetime | None
    expire_time: datetime | None
    labels: dict[str, str]
    quality: float
    shot_count: int
    create_time: datetime
    etag: str = ""


@dataclass(frozen=True)
class CollectionInfo:
    """A collection. ``ttl`` None = entries are kept until they are deleted."""

    name: str
    space_id: str
    model: str
    feature_dim: int
    ttl: timedelta | None
    keep_crops: bool
    entry_count: int
    revision: int
    indexed_revision: int
    max_entries: int = 0
    accept_probability: float = 0.0
    reject_probability: float = 0.0
    min_quality: float = 0.0
    etag: str = ""


@dataclass(frozen=True)
class SearchHit:
    """An entry found.

    Attributes:
        similarity: cosine, -1..1.
        feature: where asked for.
        probability: that it shows the same person, at even odds; None where the space has no calibration.
        decision: likewise.
        ranking_score: orders the hits, larger is better; never to be compared with a threshold.
        group_size: entries of its group among those looked at.
    """

    entry: Entry
    similarity: float
    feature: Feature | None = None
    probability: float | None = None
    decision: Decision | None = None
    ranking_score: float = 0.0
    group_size: int = 1


@dataclass(frozen=True)
class SearchAnswer:
    """Hits, best first. Times are the server's, in nanoseconds.

    Attributes:
        decision: the best hit's; unknown where there is none, None where the space has no calibration.
        shots_used: crops that made the query.
        shots_rejected: crops left out, as of another person or undecodable.
    """

    hits: tuple[SearchHit, ...]
    space_id: str
    revision: int
    exact: bool
    query_quality: float
    decode_ns: int
    queue_ns: int
    infer_ns: int
    search_ns: int
    rerank_ns: int = 0
    decision: Decision | None = None
    shots_used: int = 0
    shots_rejected: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two sets of crops, each of one person, compared."""

    similarity: float
    probability: float | None
    decision: Decision | None
    left_quality: float
    right_quality: float
    space_id: str


@dataclass(frozen=True)
class Erased:
    """What an erasure did. ``storage_scrubbed``: the server saw its write-ahead log emptied."""

    count: int
    audit_id: str
    storage_scrubbed: bool


@dataclass(frozen=True)
class CollectionStats:
    """How a collection and its index stand; the fields are those of ``GetCollectionStatsResponse``."""

    live_entries: int
    tombstones: int
    expired_pending: int
    disk_bytes: int
    index_bytes: int
    index_type: str
    sampled_recall_at_10: float | None
    revision_lag: int


@dataclass(frozen=True)
class ModelInfo:
    """A model of the server.

    Attributes:
        version: when its bundle was made, ISO 8601.
        active: it embeds what names no model.
        min_cosine: of its worst probe on the server, once loaded.
        problem: why it could not be loaded.
    """

    model_id: str
    state: ModelState
    version: str
    space_id: str
    feature_dim: int
    sha256: str
    provider: str
    active: bool
    min_cosine: float
    problem: str


@dataclass(frozen=True)
class OperationInfo:
    """Long work of the server; counts are what it read back. ``error`` when it failed."""

    operation_id: str
    kind: str
    state: OperationState
    total: int
    succeeded: int
    failed: int
    skipped: int
    started: datetime
    result: dict[str, str]
    error: ReIDError | None = None
    finished: datetime | None = None

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        return self.state not in ("pending", "running")


@dataclass(frozen=True)
class Feedback:
    """What somebody said of two entries: ``same`` = they show one person, else two; ``principal`` said so last."""

    entry_id: str
    other_entry_id: str
    same: bool
    principal: str
    time: datetime


@dataclass(frozen=True)
class KeptCrops:
    """An entry with its crops, image files as they were enrolled; a stream goes on behind ``cursor``."""

    entry: Entry
    images: tuple[bytes, ...]
    cursor: str


@dataclass(frozen=True)
class AuditRow:
    """One call that touched people; ``subject_hash`` is keyed, so that it outlives an erasure."""

    audit_id: str
    time: datetime
    principal: str
    method: str
    collection: str
    subject_hash: str
    affected: int
    reason: str


@dataclass(frozen=True)
class ServerInfo:
    """What a server serves and accepts."""

    version: str
    provider: str
    space_id: str
    model: str
    feature_dim: int
    limits: dict[str, int]


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
