"""What a gallery holds and is asked for, as plain values. Times are microseconds since 1970, UTC."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from resight.arrays import Feature
from resight.calibration import Calibration


def now_us() -> int:
    """The wall clock. Only expiry and creation times read it; order comes from revisions."""
    return time.time_ns() // 1000


@dataclass(frozen=True)
class Space:
    """Names where features came from; they compare only when ``space_id`` is equal.

    Attributes:
        model_version: when the bundle was made, ISO 8601.
        calibration: what a similarity means there; None = nothing was fitted.
    """

    space_id: str
    model_id: str
    dim: int
    model_version: str = ""
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Collection:
    """A gallery, searched in one space.

    Attributes:
        ttl_us: None = entries never expire.
        key: its row in the store.
        revision: the last committed write.
        max_entries: 0 = no limit.
        accept_probability: from here on a match; 0 = the calibration's own.
        reject_probability: below it unknown; 0 = the calibration's own.
        min_quality: crops below it are refused at enrolment.
        previous_space_id: the one searched before; empty = there was none.
        other_space_ids: spaces that new entries are written to besides ``space``.
        version: counts changes of these settings and of the space.
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
        """Differs after every change of the settings or the space, and for another collection of the same name."""
        return f"{self.key:x}.{self.version:x}"


@dataclass(frozen=True)
class EntryRecord:
    """One enrolled feature's description. Empty strings and None stand for what the caller did not tell.

    Attributes:
        quality: 0..1, of the crops.
        shot_count: crops averaged into the feature; 0 = the caller's own feature.
        etag: differs after every change, and for another entry of the same id.
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
    """An entry on its way into the store.

    Attributes:
        feature: float32 (D,), unit length, in the collection's space.
        crops: image bytes as they came; kept only where the collection says so.
        replace: an entry of the same id gives way.
        request_id: makes a replay answer what the first call did; empty = none.
        digest: of the whole request, to notice a request_id used for another one.
        others: features in the collection's other spaces, by space id.
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
    """The answer to an enrolment that is on disk."""

    entry: EntryRecord
    revision: int
    replayed: bool = False


@dataclass(frozen=True)
class Filter:
    """AND of what is set, OR within a list; the meaning of each is told in ``gallery.proto``."""

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
        """It names what to keep, so that few entries pass; the others name what to leave out."""
        return bool(self.camera_ids or self.track_ids or self.subject_ids or self.labels) or (
            self.start_us is not None or self.end_us is not None
        )


@dataclass(frozen=True)
class Hit:
    """An entry found, with its cosine similarity, -1..1, and, where asked for, its feature."""

    entry: EntryRecord
    similarity: float
    feature: Feature | None = None


DEFAULT_TENANT = "default"
