"""Conversion between protobuf messages and the service's types, with validation of all request fields; pagination.

An absent field becomes an empty string, or None for a number or time. A page token is opaque to clients: it encodes the
key after which the next page begins.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Collection as Container

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from resight.arrays import Feature
from resight.errors import InputError, LimitError
from resight.service.inference.embedder import Timings
from resight.service.inference.features import CropSource, FeatureSource
from resight.service.records import Collection, EntryRecord, Filter, Space, now_us
from resight.v1 import common_pb2, gallery_pb2, search_pb2

MAX_ID = 256  # characters of an entry, subject, camera or track id
MAX_LABELS, MAX_LABEL_NAME, MAX_LABEL_VALUE = 16, 63, 256
MAX_LISTED = 1000  # values of one list in a filter
MAX_US = 253_402_300_800_000_000  # the year 10000, where google.protobuf.Timestamp ends


def check_id(value: str, field: str) -> str:
    """Return an id if it is valid; raises InputError."""
    if len(value) > MAX_ID or not value.isprintable():
        raise InputError(
            f"an id has at most {MAX_ID} printable characters, found {len(value)}: {value[:40]!r}", field=field
        )
    return value


def _check_ids(values: Container[str], field: str) -> tuple[str, ...]:
    if len(values) > MAX_LISTED:
        raise LimitError(
            f"at most {MAX_LISTED} values in one list, found {len(values)}: split the request",
            field=field,
            max_listed=MAX_LISTED,
        )
    return tuple(check_id(value, f"{field}[{number}]") for number, value in enumerate(values))


def to_micros(time: timestamp_pb2.Timestamp, field: str) -> int:
    """A time in microseconds since 1970."""
    micros = time.seconds * 1_000_000 + time.nanos // 1000
    if not (abs(micros) < MAX_US and 0 <= time.nanos < 1_000_000_000):
        raise InputError(f"expected a time from year 1 to 9999, found {time.seconds} s {time.nanos} ns", field=field)
    return micros


def _labels(labels: dict[str, str], field: str) -> dict[str, str]:
    if len(labels) > MAX_LABELS:
        raise LimitError(
            f"at most {MAX_LABELS} labels, found {len(labels)}: leave some out", field=field, max_labels=MAX_LABELS
        )
    for name, value in labels.items():
        if not (1 <= len(name) <= MAX_LABEL_NAME and len(value) <= MAX_LABEL_VALUE):
            raise InputError(
                f"a label's name has 1-{MAX_LABEL_NAME} characters and its value at most {MAX_LABEL_VALUE}, found "
                f"{name[:80]!r}: {len(name)} and {len(value)}",
                field=field,
            )
    return labels


def to_entry(message: gallery_pb2.Entry) -> EntryRecord:
    """Convert an entry of a request; output-only fields are ignored."""
    if not 0.0 <= message.quality <= 1.0:
        raise InputError(f"quality is 0..1, found {message.quality}", field="entry.quality")
    expire_us = to_micros(message.expire_time, "entry.expire_time") if message.HasField("expire_time") else None
    if expire_us is not None and expire_us <= now_us():
        raise InputError("expire_time has passed: give a later one, or none", field="entry.expire_time")
    return EntryRecord(
        entry_id=check_id(message.entry_id, "entry.entry_id"),
        subject_id=check_id(message.subject_id, "entry.subject_id"),
        camera_id=check_id(message.camera_id, "entry.camera_id"),
        track_id=check_id(message.track_id, "entry.track_id"),
        capture_us=to_micros(message.capture_time, "entry.capture_time") if message.HasField("capture_time") else None,
        expire_us=expire_us,
        labels=_labels(dict(message.labels), "entry.labels"),
        quality=message.quality,
    )


def to_window(message: common_pb2.TimeWindow, field: str) -> tuple[int | None, int | None]:
    """A time window in microseconds; None = unbounded."""
    start_us = to_micros(message.start_time, f"{field}.start_time") if message.HasField("start_time") else None
    end_us = to_micros(message.end_time, f"{field}.end_time") if message.HasField("end_time") else None
    if start_us is not None and end_us is not None and start_us >= end_us:
        raise InputError("end_time is exclusive and must be after start_time", field=field)
    return start_us, end_us


def to_filter(message: gallery_pb2.EntryFilter) -> Filter:
    """Convert and check a filter."""
    start_us, end_us = to_window(message.capture_window, "filter.capture_window")
    if message.HasField("min_quality") and not 0.0 <= message.min_quality <= 1.0:
        raise InputError(f"min_quality is 0..1, found {message.min_quality}", field="filter.min_quality")
    return Filter(
        camera_ids=_check_ids(message.camera_ids, "filter.camera_ids"),
        exclude_camera_ids=_check_ids(message.exclude_camera_ids, "filter.exclude_camera_ids"),
        start_us=start_us,
        end_us=end_us,
        track_ids=_check_ids(message.track_ids, "filter.track_ids"),
        exclude_track_ids=_check_ids(message.exclude_track_ids, "filter.exclude_track_ids"),
        subject_ids=_check_ids(message.subject_ids, "filter.subject_ids"),
        labels=tuple(sorted(_labels(dict(message.labels), "filter.labels").items())),
        min_quality=message.min_quality if message.HasField("min_quality") else None,
    )


def to_source(
    message: gallery_pb2.EnrollEntryRequest | search_pb2.SearchRequest, kind: str
) -> CropSource | FeatureSource:
    """The source of a feature: the field ``kind`` of the request, ``image``, ``shots`` or ``embedding``."""
    if kind == "embedding":
        return FeatureSource(message.embedding.float32_le, message.embedding.space_id)
    if kind == "image":
        check_id(message.image.crop_id, "image.crop_id")
        return CropSource((message.image.data,), ("image.data",), "image")
    return to_crop_source(message.shots, "shots")


def to_crop_source(message: common_pb2.ImageCropSet, field: str) -> CropSource:
    """The crops of a track."""
    for number, image in enumerate(message.images):
        check_id(image.crop_id, f"{field}.images[{number}].crop_id")
    names = tuple(f"{field}.images[{number}].data" for number in range(len(message.images)))
    return CropSource(tuple(image.data for image in message.images), names, f"{field}.images")


def to_collection(message: gallery_pb2.Collection, space: Space) -> Collection:
    """Convert a collection of a request; output-only fields are ignored."""
    for name in ("accept_probability", "reject_probability", "min_quality"):
        value = getattr(message, name)
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} is 0..1, found {value}", field=f"collection.{name}")
    if message.max_entries < 0:
        raise InputError(
            f"max_entries is 0 (no limit) or more, found {message.max_entries}", field="collection.max_entries"
        )
    return Collection(
        name=message.collection_id,
        space=space,
        ttl_us=ttl_us(message),
        keep_crops=message.crop_retention == gallery_pb2.CROP_RETENTION_STORE,
        max_entries=message.max_entries,
        accept_probability=message.accept_probability,
        reject_probability=message.reject_probability,
        min_quality=message.min_quality,
    )


def masked_fields(mask: field_mask_pb2.FieldMask, names: dict[str, str]) -> list[str]:
    """The attribute names of the fields in a mask, without duplicates.

    Args:
        mask: of an update request.
        names: attribute name by path, of all fields that can be changed.

    Raises:
        InputError: the mask is empty, or has a field that cannot be changed.
    """
    unknown = sorted(set(mask.paths) - set(names))
    if unknown or not mask.paths:
        raise InputError(
            f"update_mask takes one or more of {', '.join(names)}; found {', '.join(unknown)[:200] or 'none'}",
            field="update_mask",
        )
    return [name for path, name in names.items() if path in mask.paths]


ENTRY_PATHS = {"subject_id": "subject_id", "labels": "labels", "expire_time": "expire_us"}
COLLECTION_PATHS = {
    "default_ttl": "ttl_us",
    "max_entries": "max_entries",
    "crop_retention": "keep_crops",
    "accept_probability": "accept_probability",
    "reject_probability": "reject_probability",
    "min_quality": "min_quality",
}


def ttl_us(message: gallery_pb2.Collection) -> int | None:
    """``default_ttl`` in microseconds; None = absent."""
    ttl = message.default_ttl
    if not message.HasField("default_ttl"):
        return None
    if not abs(ttl.seconds) < MAX_US // 1_000_000:
        raise InputError(f"default_ttl is out of range: {ttl.seconds} s", field="collection.default_ttl")
    micros = ttl.seconds * 1_000_000 + ttl.nanos // 1000
    if micros <= 0:
        raise InputError(f"default_ttl must be positive, found {micros / 1e6} s", field="collection.default_ttl")
    return micros


def timestamp(micros: int) -> timestamp_pb2.Timestamp:
    """Convert a time in microseconds."""
    return timestamp_pb2.Timestamp(seconds=micros // 1_000_000, nanos=micros % 1_000_000 * 1000)


def entry_message(entry: EntryRecord) -> gallery_pb2.Entry:
    """Convert an entry."""
    message = gallery_pb2.Entry(
        entry_id=entry.entry_id,
        subject_id=entry.subject_id,
        camera_id=entry.camera_id,
        track_id=entry.track_id,
        labels=entry.labels or None,
        quality=entry.quality,
        shot_count=entry.shot_count,
        create_time=timestamp(entry.created_us),
        etag=entry.etag,
    )
    if entry.capture_us is not None:
        message.capture_time.CopyFrom(timestamp(entry.capture_us))
    if entry.expire_us is not None:
        message.expire_time.CopyFrom(timestamp(entry.expire_us))
    return message


def space_message(space: Space) -> common_pb2.EmbeddingSpace:
    """Convert a space."""
    return common_pb2.EmbeddingSpace(
        space_id=space.space_id, model_id=space.model_id, model_version=space.model_version, dim=space.dim
    )


def feature_message(feature: Feature, space: Space) -> common_pb2.Embedding:
    """Convert a feature, float32 (D,)."""
    return common_pb2.Embedding(float32_le=feature.astype("<f4").tobytes(), space_id=space.space_id)


def timings_message(timings: Timings, search_ns: int = 0, rerank_ns: int = 0) -> common_pb2.Timings:
    """Convert timings."""
    embedded = {"decode_ns": timings.decode_ns, "queue_ns": timings.queue_ns, "infer_ns": timings.infer_ns}
    return common_pb2.Timings(**embedded, search_ns=search_ns, rerank_ns=rerank_ns)


def collection_message(collection: Collection, entry_count: int, indexed_revision: int) -> gallery_pb2.Collection:
    """Convert a collection."""
    retention = gallery_pb2.CROP_RETENTION_STORE if collection.keep_crops else gallery_pb2.CROP_RETENTION_NONE
    message = gallery_pb2.Collection(
        collection_id=collection.name,
        space=space_message(collection.space),
        crop_retention=retention,
        entry_count=entry_count,
        revision=collection.revision,
        indexed_revision=indexed_revision,
        max_entries=collection.max_entries,
        accept_probability=collection.accept_probability,
        reject_probability=collection.reject_probability,
        min_quality=collection.min_quality,
        etag=collection.etag,
    )
    if collection.ttl_us is not None:
        seconds, micros = divmod(collection.ttl_us, 1_000_000)
        message.default_ttl.CopyFrom(duration_pb2.Duration(seconds=seconds, nanos=micros * 1000))
    return message


MAX_PAGE, DEFAULT_PAGE = 1000, 100


def page_size(requested: int) -> int:
    """The page size for a request: at most 1000, default 100.

    Raises:
        InputError: negative.
    """
    if requested < 0:
        raise InputError(f"page_size is 0 (for {DEFAULT_PAGE}) to {MAX_PAGE}, found {requested}", field="page_size")
    return min(requested or DEFAULT_PAGE, MAX_PAGE)


def page_token(after: int | str) -> str:
    """The page token for the page after a key or name."""
    raw = struct.pack(">q", after) if isinstance(after, int) else after.encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def key_of_token(token: str, field: str = "page_token") -> int:
    """The key in a page token; 0 = from the beginning. Raises InputError for an invalid token."""
    if not token:
        return 0
    raw = _decode_token(token, field)
    if len(raw) != 8:
        raise _token_error(token, field)
    return int(struct.unpack(">q", raw)[0])


def name_of_token(token: str) -> str:
    """The name in a page token; empty = from the beginning. Raises InputError for an invalid token."""
    try:
        return _decode_token(token, "page_token").decode()
    except UnicodeDecodeError as error:
        raise _token_error(token, "page_token") from error


def _decode_token(token: str, field: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except (binascii.Error, ValueError) as error:
        raise _token_error(token, field) from error


def _token_error(token: str, field: str) -> InputError:
    return InputError(f"invalid {field} {token[:40]!r}: pass the one of the previous response, or none", field=field)


MAX_REQUEST_ID = 128  # a UUID has 36


def check_request_id(request_id: str) -> None:
    """Check the length of a request id.

    Raises:
        InputError: more than `MAX_REQUEST_ID` characters.
    """
    if len(request_id) > MAX_REQUEST_ID:
        raise InputError(f"request_id has at most {MAX_REQUEST_ID} characters: use a UUID", field="request_id")
