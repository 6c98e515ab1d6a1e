"""The results of the client's methods as plain values, without protobuf.

Times are aware `datetime` values; an empty string, None or an empty dict means "not set". A statistic is None if
nothing was counted for it, or if it requires a calibration and the space has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from resight.arrays import Feature
from resight.errors import ReIDError

Decision = Literal["match", "uncertain", "unknown"]
ModelState = Literal["available", "loading", "ready", "failed"]
OperationState = Literal["pending", "running", "succeeded", "failed", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Entry:
    """An enrolled entry, without its feature: see ``Client.get_feature``.

    Attributes:
        revision: of the write that returned the entry, for ``min_revision`` of a search; 0 if it was only read.
        replayed: the server had already enrolled it for the same request, which was retried.
    """

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
    revision: int = field(default=0, compare=False)
    replayed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class EmbeddedCrop:
    """The feature of a crop, float32 (D,) of unit length, its embedding space, and the crop's quality, 0..1."""

    vector: Feature
    space_id: str
    quality: float


@dataclass(frozen=True)
class CollectionInfo:
    """A collection. With ``ttl`` None entries are kept until they are deleted."""

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
    """A hit of a search.

    Attributes:
        similarity: cosine, -1..1.
        feature: if requested.
        probability: that it shows the same person, with even prior odds; None if the space has no calibration.
        decision: from the probability; None likewise.
        ranking_score: orders the hits, larger is better; not comparable with a threshold.
        group_size: number of its group's entries among the candidates.
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
        decision: the best hit's; unknown without a hit, None if the space has no calibration.
        shots_used: crops that the query's feature was computed from.
        shots_rejected: crops excluded because they show another person or cannot be decoded.
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
    """The comparison of two sets of crops, each of one person."""

    similarity: float
    probability: float | None
    decision: Decision | None
    left_quality: float
    right_quality: float
    space_id: str


@dataclass(frozen=True)
class Erased:
    """The result of an erasure. ``storage_scrubbed``: the server emptied its write-ahead log."""

    count: int
    audit_id: str
    storage_scrubbed: bool


@dataclass(frozen=True)
class CollectionStats:
    """Statistics of a collection and its index; the fields are those of ``GetCollectionStatsResponse``."""

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
        version: when its bundle was created, ISO 8601.
        active: it is the default, for requests that name no model.
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
    """A long-running operation of the server; ``error`` is set if it failed."""

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
        """Whether the operation has reached a final state."""
        return self.state not in ("pending", "running")


@dataclass(frozen=True)
class Feedback:
    """Feedback on two entries: whether they show the same person; ``principal`` gave it last."""

    entry_id: str
    other_entry_id: str
    same: bool
    principal: str
    time: datetime


@dataclass(frozen=True)
class KeptCrops:
    """An entry with its crops, the image files as enrolled; ``cursor`` is the position to resume a stream behind."""

    entry: Entry
    images: tuple[bytes, ...]
    cursor: str


@dataclass(frozen=True)
class AuditRow:
    """An audit event: one call that concerned persons; ``subject_hash`` is keyed, so it is kept after an erasure."""

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
    """The server's version, active model and limits."""

    version: str
    provider: str
    space_id: str
    model: str
    feature_dim: int
    limits: dict[str, int]


ShadowState = Literal["running", "done", "expired", "stopped", "superseded", "interrupted"]


@dataclass(frozen=True)
class ShadowSide:
    """The results of one of a shadow's two models.

    Attributes:
        unknown_share: share of the decisions, 0..1.
        mean_probability: mean over best hits; ``mean_cosine`` likewise.
        measured: searches that both models repeated in turn, at the same low priority, for timing.
        infer_p50_ns: median inference time of one crop; all times are over the newest 1000 measurements.
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
    """The results of a shadow so far; shares are 0..1, of ``answered``.

    Attributes:
        offered: searches of crops while it was running.
        sampled: those chosen for the candidate: answered, dropped, failed or in progress.
        answered: answered by both models.
        dropped: skipped because the server was busy.
        failed: the candidate failed.
        top1_agreement: share of best hits with the same subject, or the same entry if either has no subject.
        overlap_at_10: mean share of entries that both return among their first min(10, top_k).
        decision_agreement: share of equal decisions; None if either space has no calibration.
        cosine_shift: mean cosine of the candidate's best hits minus the active model's.
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
    """A shadow: a candidate model that also runs a sample of a collection's searches.

    Attributes:
        model_id: the candidate; ``space_id`` its space.
        sample: share of the searches of crops, 0..1.
        max_searches: number of answered searches after which it ends; 0 = no limit.
        ended: None while it runs.
        expires: None = never.
        operation_id: of the shadow's operation.
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
class SearchStatistics:
    """Statistics of a collection's searches in one space, in a window of whole minutes.

    Attributes:
        active: the collection's searches use this space now.
        without_hit: searches without any hit; with a calibration also among the unknown.
        unknown_share: of searches with a decision, 0..1.
        mean_cosine: mean over best hits; ``mean_probability`` likewise.
        drift_index: population stability index of best hits' cosines against the reference; None below 100 hits.
        mean_shift: mean cosine minus the reference's; None likewise.
        reference_searches: number of best hits in the reference.
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


SearchFigures = SearchStatistics  # deprecated name, for one release
