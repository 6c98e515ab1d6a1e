"""Value types of the gallery: spaces, collections, entries, filters, hits. Times are microseconds since 1970, UTC."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from resight.arrays import Feature
from resight.calibration import Calibration


def now_us() -> int:
    """The wall clock, for expiry and creation times only; writes are ordered by revisions."""
    return time.time_ns() // 1000


@dataclass(frozen=True)
class Space:
    """An embedding space; features are comparable only if their ``space_id`` is equal.

    Attributes:
        model_version: creation time of the bundle, ISO 8601.
        calibration: maps similarities to probabilities; None = the bundle has none.
    """

    space_id: str
    model_id: str
    dim: int
    model_version: str = ""
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Collection:
    """A named set of entries, searched in one space.

    Attributes:
        ttl_us: None = entries never expire.
        key: of its row in the database.
        revision: of the last committed write.
        max_entries: 0 = no limit.
        accept_probability: a match at or above it; 0 = the calibration's threshold.
        reject_probability: unknown below it; 0 = the calibration's threshold.
        min_quality: enrolment rejects crops below it.
        previous_space_id: the space searched before; empty = none.
        other_space_ids: spaces in which new entries also get a feature.
        version: incremented by every change of these settings or of the space.
    """

    name: str
    space: Space
    ttl_us: int | None = None
    keep_crops: bool = False
    key: int = 0
    revision: int = 0
    max_entries: int = 0
    accept_probability: float = 0.0
    reject_probability: float = 0.0
    min_quality: float = 0.0
    previous_space_id: str = ""
    other_space_ids: tuple[str, ...] = ()
    version: int = 0

    @property
    def etag(self) -> str:
        """Changes with the settings and the space, and differs for a recreated collection of the same name."""
        return f"{self.key:x}.{self.version:x}"


@dataclass(frozen=True)
class EntryRecord:
    """The metadata of an enrolled feature. Empty strings and None are fields that the caller did not set.

    Attributes:
        quality: 0..1, of the crops.
        shot_count: crops averaged into the feature; 0 = the caller sent a feature.
        etag: changes with every update, and differs for a replaced entry of the same id.
    """

    entry_id: str
    subject_id: str = ""
    camera_id: str = ""
    track_id: str = ""
    capture_us: int | None = None
    expire_us: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    quality: float = 0.0
    shot_count: int = 0
    created_us: int = 0
    etag: str = ""


@dataclass(frozen=True)
class Enrolment:
    """A new entry, ready to be stored.

    Attributes:
        feature: float32 (D,), unit length, in the collection's space.
        crops: the image files as received; stored only if the collection keeps crops.
        replace: overwrite an existing entry of the same id.
        request_id: idempotency key: a retry returns the result of the first call; empty = none.
        digest: of the whole request, to detect a request_id that is reused for a different one.
        others: (space id, feature) for the collection's other spaces.
    """

    entry: EntryRecord
    feature: Feature
    crops: tuple[bytes, ...] = ()
    replace: bool = False
    request_id: str = ""
    digest: bytes = b""
    others: tuple[tuple[str, Feature], ...] = ()


@dataclass(frozen=True)
class Enrolled:
    """A committed enrolment."""

    entry: EntryRecord
    revision: int
    replayed: bool = False


@dataclass(frozen=True)
class Filter:
    """AND of the set fields, OR within a list; ``gallery.proto`` describes each field."""

    camera_ids: tuple[str, ...] = ()
    exclude_camera_ids: tuple[str, ...] = ()
    start_us: int | None = None
    end_us: int | None = None
    track_ids: tuple[str, ...] = ()
    exclude_track_ids: tuple[str, ...] = ()
    subject_ids: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    min_quality: float | None = None
    exclude_entry_ids: tuple[str, ...] = ()
    exclude_subject_ids: tuple[str, ...] = ()

    @property
    def selective(self) -> bool:
        """Whether it includes by value, so that few entries pass, rather than only excludes."""
        return bool(self.camera_ids or self.track_ids or self.subject_ids or self.labels) or (
            self.start_us is not None or self.end_us is not None
        )


@dataclass(frozen=True)
class Hit:
    """A found entry with its cosine similarity, -1..1, and its feature if requested."""

    entry: EntryRecord
    similarity: float
    feature: Feature | None = None


DEFAULT_TENANT = "default"
