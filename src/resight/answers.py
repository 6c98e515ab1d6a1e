"""What a server answers through `resight.client`: plain values, no protobuf.

Times are aware `datetime` values; an empty string, None or empty dict stands for what was not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from resight.errors import ReIDError
from resight.questions import Feature

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
