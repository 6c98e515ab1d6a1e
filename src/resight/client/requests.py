"""The arguments of the client's methods as plain values, and their conversion to protobuf.

Times are aware `datetime` values; an empty string, None or an empty dict means "not set".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from resight.arrays import Feature
from resight.errors import InputError
from resight.v1 import common_pb2, gallery_pb2, search_pb2

GroupBy = Literal["subject", "track", "camera"]
GROUP_BY_VALUES: dict[GroupBy, search_pb2.GroupBy.ValueType] = {
    "subject": search_pb2.GROUP_BY_SUBJECT,
    "track": search_pb2.GROUP_BY_TRACK,
    "camera": search_pb2.GROUP_BY_CAMERA,
}
RERANKING_METHODS = {
    "k_reciprocal": search_pb2.RERANKING_METHOD_K_RECIPROCAL,
    "query_expansion": search_pb2.RERANKING_METHOD_QUERY_EXPANSION,
}


def set_time(field: Timestamp, moment: datetime, name: str) -> None:
    """Set a field of a message to a moment.

    Raises:
        InputError: the moment has no time zone, or no protobuf timestamp can hold it.
    """
    if moment.utcoffset() is None:
        raise InputError(
            f"{name} is {moment!r} without a time zone, expected one with: datetime.now(UTC) or "
            f"{name}.astimezone() if it is local time",
            field=name,
        )
    field.FromDatetime(moment)


class GivenFeature(NamedTuple):
    """A feature computed elsewhere, with the id of its embedding space."""

    vector: Feature
    space_id: str


class EntryId(str):
    """The id of an enrolled entry as a query: search for similar entries."""


Source = bytes | Sequence[bytes] | GivenFeature
"""One crop (an image file's bytes), several of one person, or a feature."""


@dataclass(frozen=True)
class Where:
    """Filter of the entries to find, list or delete: AND of the fields that are set, OR within a field.

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
        """Convert to protobuf."""
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
            set_time(message.capture_window.start_time, self.start, "start")
        if self.end is not None:
            set_time(message.capture_window.end_time, self.end, "end")
        return message


@dataclass(frozen=True)
class NewEntry:
    """One entry to enrol. Without ``entry_id`` the server chooses one; ``replace`` overwrites an entry of that id."""

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
        """Convert to protobuf."""
        message = gallery_pb2.EnrollEntryRequest(collection_id=collection, request_id=request_id)
        set_source(message, self.source)
        entry = message.entry
        entry.entry_id, entry.subject_id, entry.camera_id = self.entry_id, self.subject_id, self.camera_id
        entry.track_id, entry.quality = self.track_id, self.quality
        entry.labels.update(self.labels)
        if self.capture_time is not None:
            set_time(entry.capture_time, self.capture_time, "capture_time")
        if self.expire_time is not None:
            set_time(entry.expire_time, self.expire_time, "expire_time")
        if self.replace:
            message.on_duplicate = gallery_pb2.DUPLICATE_POLICY_REPLACE
        return message


class Rerank(NamedTuple):
    """Re-ranking of the first candidates; 0 and None are the server's defaults.

    ``weight``, 0..1, is the weight of the original distance in k-reciprocal re-ranking.
    """

    method: Literal["k_reciprocal", "query_expansion"] = "k_reciprocal"
    candidates: int = 0
    k1: int = 0
    k2: int = 0
    weight: float | None = None

    def message(self) -> search_pb2.Reranking:
        """Convert to protobuf."""
        message = search_pb2.Reranking(
            method=RERANKING_METHODS[self.method], candidates=self.candidates, k1=self.k1, k2=self.k2
        )
        if self.weight is not None:
            setattr(message, "lambda", self.weight)  # a Python keyword
        return message


class SearchOptions(TypedDict, total=False):
    """Keyword arguments of `search`: the attributes of `Query` but its source."""

    top_k: int | None
    where: Where | None
    min_similarity: float | None
    with_features: bool
    group_by: GroupBy | None
    rerank: bool | Rerank
    min_probability: float | None
    min_revision: int
    exact: bool


@dataclass(frozen=True)
class Query:
    """One search.

    Attributes:
        source: a crop, several crops of one person, a feature, or an entry.
        top_k: number of hits, or of groups; None = the server's default of 10.
        where: filter of the entries.
        min_similarity: smallest similarity of a hit, -1..1.
        with_features: return the features of the hits.
        group_by: return the best entry of each person, track or camera; an entry without one is a group of its own.
        rerank: re-rank the first candidates; True = k-reciprocal with the server's defaults.
        min_probability: smallest probability of a hit, 0..1; requires a calibrated space.
        min_revision: wait until this revision of the collection is indexed.
        exact: search all entries instead of an approximate index.
    """

    source: Source | EntryId
    top_k: int | None = None
    where: Where = field(default_factory=Where)
    min_similarity: float | None = None
    with_features: bool = False
    group_by: GroupBy | None = None
    rerank: bool | Rerank = False
    min_probability: float | None = None
    min_revision: int = 0
    exact: bool = False

    def message(self, collection: str) -> search_pb2.SearchRequest:
        """Convert to protobuf."""
        message = search_pb2.SearchRequest(
            collection_id=collection,
            top_k=self.top_k,
            filter=self.where.message(),
            min_cosine=self.min_similarity,
            include_embeddings=self.with_features,
            min_probability=self.min_probability,
            min_revision=self.min_revision,
        )
        if self.group_by is not None:
            message.group_by = GROUP_BY_VALUES[self.group_by]
        if self.rerank:
            message.reranking.CopyFrom((self.rerank if isinstance(self.rerank, Rerank) else Rerank()).message())
        if self.exact:
            message.accuracy = search_pb2.ACCURACY_EXACT
        if isinstance(self.source, EntryId):
            message.entry_id = self.source
        else:
            set_source(message, self.source)
        return message


@dataclass(frozen=True)
class CollectionChange:
    """Settings of a collection to change; None = unchanged.

    Attributes:
        ttl: lifetime of entries without an ``expire_time`` of their own.
        max_entries: 0 = no limit.
        keep_crops: store the images, so that they can be embedded again with another model.
        accept_probability: lowest probability of a match; 0 = from the calibration.
        reject_probability: lower probabilities are decided as unknown; 0 = from the calibration.
        min_quality: crops of lower quality are rejected at enrolment.
    """

    ttl: timedelta | None = None
    max_entries: int | None = None
    keep_crops: bool | None = None
    accept_probability: float | None = None
    reject_probability: float | None = None
    min_quality: float | None = None

    def message(self, name: str, etag: str = "") -> tuple[gallery_pb2.Collection, list[str]]:
        """Convert to protobuf, with the field mask's paths of the settings that are not None."""
        message, paths = gallery_pb2.Collection(collection_id=name, etag=etag), []
        if self.ttl is not None:
            message.default_ttl.FromTimedelta(self.ttl)
            paths.append("default_ttl")
        if self.keep_crops is not None:
            kept = gallery_pb2.CROP_RETENTION_STORE if self.keep_crops else gallery_pb2.CROP_RETENTION_NONE
            message.crop_retention = kept
            paths.append("crop_retention")
        for path in ("max_entries", "accept_probability", "reject_probability", "min_quality"):
            if getattr(self, path) is not None:
                setattr(message, path, getattr(self, path))
                paths.append(path)
        return message, paths


def set_source(message: gallery_pb2.EnrollEntryRequest | search_pb2.SearchRequest, source: Source) -> None:
    """Set the message field for this kind of source."""
    if isinstance(source, bytes):
        message.image.data = source
    elif isinstance(source, GivenFeature):
        message.embedding.float32_le = np.asarray(source.vector, "<f4").tobytes()
        message.embedding.space_id = source.space_id
    else:
        message.shots.CopyFrom(crop_set(source))
        message.shots.SetInParent()


def crop_set(shots: bytes | Sequence[bytes]) -> common_pb2.ImageCropSet:
    """Convert one or several crops to protobuf."""
    images = [shots] if isinstance(shots, bytes) else shots
    return common_pb2.ImageCropSet(images=[common_pb2.ImageCrop(data=image) for image in images])
