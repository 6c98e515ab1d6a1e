"""What one tells a server through `resight.client`, and what it answers: plain values, no protobuf.

Times are aware `datetime` values; an empty string, None or empty dict stands for what was not told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
from google.protobuf import timestamp_pb2
from numpy.typing import NDArray

from resight.v1 import admin_pb2, common_pb2, gallery_pb2, search_pb2

Feature = NDArray[np.float32]
"""float32 (D,), unit length."""


class GivenFeature(NamedTuple):
    """A feature computed elsewhere, with the space it is of."""

    vector: Feature
    space_id: str


class EntryId(str):
    """An enrolled entry, as a query: more like this one."""


Source = bytes | Sequence[bytes] | GivenFeature
"""One crop (an image file's bytes), several of one person, or a feature."""


@dataclass(frozen=True)
class Where:
    """Which entries may be found, listed or deleted: AND of what is set, OR within a tuple.

    ``start`` is inclusive, ``end`` exclusive; ``labels`` must all match.
    """

    camera_ids: Sequence[str] = ()
    exclude_camera_ids: Sequence[str] = ()
    start: datetime | None = None
    end: datetime | None = None
    track_ids: Sequence[str] = ()
    exclude_track_ids: Sequence[str] = ()
    subject_ids: Sequence[str] = ()
    labels: dict[str, str] = field(default_factory=dict)
    min_quality: float | None = None

    def message(self) -> gallery_pb2.EntryFilter:
        """For the wire."""
        message = gallery_pb2.EntryFilter(
            camera_ids=self.camera_ids,
            exclude_camera_ids=self.exclude_camera_ids,
            track_ids=self.track_ids,
            exclude_track_ids=self.exclude_track_ids,
            subject_ids=self.subject_ids,
            labels=self.labels,
            min_quality=self.min_quality,
        )
        if self.start is not None:
            message.capture_window.start_time.FromDatetime(self.start)
        if self.end is not None:
            message.capture_window.end_time.FromDatetime(self.end)
        return message


@dataclass(frozen=True)
class NewEntry:
    """One entry to enrol. Without ``entry_id`` the server chooses one; ``replace`` lets one of that id give way."""

    source: Source
    entry_id: str = ""
    subject_id: str = ""
    camera_id: str = ""
    track_id: str = ""
    capture_time: datetime | None = None
    expire_time: datetime | None = None
    labels: dict[str, str] = field(default_factory=dict)
    quality: float = 0.0
    replace: bool = False

    def message(self, collection: str, request_id: str) -> gallery_pb2.EnrollEntryRequest:
        """For the wire."""
        message = gallery_pb2.EnrollEntryRequest(collection_id=collection, request_id=request_id)
        set_source(message, self.source)
        entry = message.entry
        entry.entry_id, entry.subject_id, entry.camera_id = self.entry_id, self.subject_id, self.camera_id
        entry.track_id, entry.quality = self.track_id, self.quality
        entry.labels.update(self.labels)
        if self.capture_time is not None:
            entry.capture_time.FromDatetime(self.capture_time)
        if self.expire_time is not None:
            entry.expire_time.FromDatetime(self.expire_time)
        if self.replace:
            message.on_duplicate = gallery_pb2.DUPLICATE_POLICY_REPLACE
        return message


@dataclass(frozen=True)
class Query:
    """One search. ``top_k`` None = the server's default of 10; ``min_similarity`` -1..1."""

    source: Source | EntryId
    top_k: int | None = None
    where: Where = field(default_factory=Where)
    min_similarity: float | None = None
    with_features: bool = False

    def message(self, collection: str) -> search_pb2.SearchRequest:
        """For the wire."""
        message = search_pb2.SearchRequest(
            collection_id=collection,
            top_k=self.top_k,
            filter=self.where.message(),
            min_cosine=self.min_similarity,
            include_embeddings=self.with_features,
        )
        if isinstance(self.source, EntryId):
            message.entry_id = self.source
        else:
            set_source(message, self.source)
        return message


def set_source(message: gallery_pb2.EnrollEntryRequest | search_pb2.SearchRequest, source: Source) -> None:
    """Put a source into the field of its kind."""
    if isinstance(source, bytes):
        message.image.data = source
    elif isinstance(source, GivenFeature):
        message.embedding.float32_le = np.asarray(source.vector, "<f4").tobytes()
        message.embedding.space_id = source.space_id
    else:
        message.shots.SetInParent()
        message.shots.images.extend(common_pb2.ImageCrop(data=shot) for shot in source)


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


@dataclass(frozen=True)
class SearchHit:
    """An entry found, its cosine similarity, -1..1, and, where asked for, its feature."""

    entry: Entry
    similarity: float
    feature: Feature | None = None


@dataclass(frozen=True)
class SearchAnswer:
    """Hits, best first. Times are the server's, in nanoseconds."""

    hits: tuple[SearchHit, ...]
    space_id: str
    revision: int
    exact: bool
    query_quality: float
    decode_ns: int
    queue_ns: int
    infer_ns: int
    search_ns: int


@dataclass(frozen=True)
class ServerInfo:
    """What a server serves and accepts."""

    version: str
    provider: str
    space_id: str
    model: str
    feature_dim: int
    limits: dict[str, int]


def feature(message: common_pb2.Embedding) -> Feature:
    """From the wire."""
    return np.frombuffer(message.float32_le, "<f4").astype(np.float32)


def _time(message: timestamp_pb2.Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def entry(message: gallery_pb2.Entry) -> Entry:
    """From the wire."""
    return Entry(
        entry_id=message.entry_id,
        subject_id=message.subject_id,
        camera_id=message.camera_id,
        track_id=message.track_id,
        capture_time=_time(message.capture_time) if message.HasField("capture_time") else None,
        expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
        labels=dict(message.labels),
        quality=message.quality,
        shot_count=message.shot_count,
        create_time=_time(message.create_time),
    )


def collection(message: gallery_pb2.Collection) -> CollectionInfo:
    """From the wire."""
    return CollectionInfo(
        name=message.collection_id,
        space_id=message.space.space_id,
        model=message.space.model_id,
        feature_dim=message.space.dim,
        ttl=message.default_ttl.ToTimedelta() if message.HasField("default_ttl") else None,
        keep_crops=message.crop_retention == gallery_pb2.CROP_RETENTION_STORE,
        entry_count=message.entry_count,
        revision=message.revision,
        indexed_revision=message.indexed_revision,
    )


def search_answer(message: search_pb2.SearchResponse) -> SearchAnswer:
    """From the wire."""
    hits = tuple(
        SearchHit(entry(hit.entry), hit.score.cosine, feature(hit.embedding) if hit.HasField("embedding") else None)
        for hit in message.hits
    )
    times = message.timings
    return SearchAnswer(
        hits=hits,
        space_id=message.space.space_id,
        revision=message.searched_revision,
        exact=message.exact,
        query_quality=message.query_quality,
        decode_ns=times.decode_ns,
        queue_ns=times.queue_ns,
        infer_ns=times.infer_ns,
        search_ns=times.search_ns,
    )


def server_info(message: admin_pb2.GetServerInfoResponse) -> ServerInfo:
    """From the wire."""
    limits = {name.name: getattr(message.limits, name.name) for name in admin_pb2.Limits.DESCRIPTOR.fields}
    space = message.active_space
    return ServerInfo(message.server_version, message.provider, space.space_id, space.model_id, space.dim, limits)
