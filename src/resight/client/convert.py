"""Conversion of the server's protobuf replies to the values of `resight.client.responses`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
from google.protobuf import timestamp_pb2
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from resight.arrays import Feature
from resight.client.responses import (
    AuditRow,
    CollectionInfo,
    CollectionStats,
    Comparison,
    Decision,
    EmbeddedCrop,
    Entry,
    Erased,
    Feedback,
    KeptCrops,
    ModelInfo,
    ModelState,
    OperationInfo,
    OperationState,
    SearchAnswer,
    SearchHit,
    SearchStatistics,
    ServerInfo,
    Shadow,
    ShadowFigures,
    ShadowSide,
    ShadowState,
)
from resight.status import from_status
from resight.v1 import admin_pb2, common_pb2, embedding_pb2, gallery_pb2, model_pb2, operation_pb2, search_pb2

DECISIONS: dict[int, Decision | None] = {
    common_pb2.DECISION_MATCH: "match",
    common_pb2.DECISION_UNCERTAIN: "uncertain",
    common_pb2.DECISION_UNKNOWN: "unknown",
}
_MODEL_STATES: dict[int, ModelState] = {
    model_pb2.MODEL_STATE_AVAILABLE: "available",
    model_pb2.MODEL_STATE_LOADING: "loading",
    model_pb2.MODEL_STATE_READY: "ready",
    model_pb2.MODEL_STATE_FAILED: "failed",
}
OPERATION_STATES: dict[operation_pb2.OperationState.ValueType, OperationState] = {
    operation_pb2.OPERATION_STATE_PENDING: "pending",
    operation_pb2.OPERATION_STATE_RUNNING: "running",
    operation_pb2.OPERATION_STATE_SUCCEEDED: "succeeded",
    operation_pb2.OPERATION_STATE_FAILED: "failed",
    operation_pb2.OPERATION_STATE_CANCELLED: "cancelled",
    operation_pb2.OPERATION_STATE_INTERRUPTED: "interrupted",
}


def feature(message: common_pb2.Embedding) -> Feature:
    """Convert from protobuf."""
    return np.frombuffer(message.float32_le, "<f4").astype(np.float32)


def _time(message: timestamp_pb2.Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def embedded_crop(message: embedding_pb2.EmbedResponse) -> EmbeddedCrop:
    """Convert from protobuf."""
    return EmbeddedCrop(feature(message.embedding), message.space.space_id, message.quality)


def entry(message: gallery_pb2.Entry, *, revision: int = 0, replayed: bool = False) -> Entry:
    """Convert from protobuf; revision and replayed are of the write that returned it."""
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
        etag=message.etag,
        revision=revision,
        replayed=replayed,
    )


def collection(message: gallery_pb2.Collection) -> CollectionInfo:
    """Convert from protobuf."""
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
        max_entries=message.max_entries,
        accept_probability=message.accept_probability,
        reject_probability=message.reject_probability,
        min_quality=message.min_quality,
        etag=message.etag,
    )


def _hit(message: search_pb2.Hit) -> SearchHit:
    return SearchHit(
        entry=entry(message.entry),
        similarity=message.score.cosine,
        feature=feature(message.embedding) if message.HasField("embedding") else None,
        probability=_probability(message.score),
        decision=DECISIONS.get(message.decision),
        ranking_score=message.ranking_score,
        group_size=message.group_size,
    )


def _probability(score: common_pb2.Score) -> float | None:
    return score.probability if score.HasField("probability") else None


def search_answer(message: search_pb2.SearchResponse) -> SearchAnswer:
    """Convert from protobuf."""
    times = message.timings
    return SearchAnswer(
        hits=tuple(_hit(hit) for hit in message.hits),
        space_id=message.space.space_id,
        revision=message.searched_revision,
        exact=message.exact,
        query_quality=message.query_quality,
        decode_ns=times.decode_ns,
        queue_ns=times.queue_ns,
        infer_ns=times.infer_ns,
        search_ns=times.search_ns,
        rerank_ns=times.rerank_ns,
        decision=DECISIONS.get(message.decision),
        shots_used=message.shots_used,
        shots_rejected=message.shots_rejected,
    )


def comparison(message: search_pb2.VerifyResponse) -> Comparison:
    """Convert from protobuf."""
    return Comparison(
        message.score.cosine,
        _probability(message.score),
        DECISIONS.get(message.decision),
        message.left_quality,
        message.right_quality,
        message.space.space_id,
    )


def erased(message: gallery_pb2.EraseSubjectResponse) -> Erased:
    """Convert from protobuf."""
    return Erased(message.erased_count, message.audit_id, message.storage_scrubbed)


def stats(message: admin_pb2.GetCollectionStatsResponse) -> CollectionStats:
    """Convert from protobuf."""
    fields: dict[str, Any] = {name.name: getattr(message, name.name) for name in message.DESCRIPTOR.fields}
    if not message.HasField("sampled_recall_at_10"):
        fields["sampled_recall_at_10"] = None
    return CollectionStats(**fields)


def operation(message: operation_pb2.Operation) -> OperationInfo:
    """Convert from protobuf."""
    return OperationInfo(
        operation_id=message.operation_id,
        kind=message.kind,
        state=OPERATION_STATES.get(message.state, "running"),
        total=message.total,
        succeeded=message.succeeded,
        failed=message.failed,
        skipped=message.skipped,
        started=_time(message.start_time),
        result=dict(message.result),
        error=from_status(message.error) if message.HasField("error") else None,
        finished=_time(message.end_time) if message.HasField("end_time") else None,
    )


def model(message: model_pb2.Model) -> ModelInfo:
    """Convert from protobuf."""
    return ModelInfo(
        model_id=message.model_id,
        state=_MODEL_STATES.get(message.state, "failed"),
        version=message.version,
        space_id=message.space.space_id,
        feature_dim=message.space.dim,
        sha256=message.sha256,
        provider=message.provider,
        active=message.active,
        min_cosine=message.parity_min_cosine,
        problem=message.problem,
    )


def feedback(message: gallery_pb2.Feedback) -> Feedback:
    """Convert from protobuf."""
    same = message.verdict == gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON
    return Feedback(message.entry_id, message.other_entry_id, same, message.principal, _time(message.feedback_time))


def kept_crops(message: gallery_pb2.StreamCropsResponse) -> KeptCrops:
    """Convert from protobuf."""
    return KeptCrops(entry(message.entry), tuple(message.images), message.cursor)


def audit_event(message: admin_pb2.AuditEvent) -> AuditRow:
    """Convert from protobuf."""
    return AuditRow(
        message.audit_id,
        _time(message.event_time),
        message.principal,
        message.method,
        message.collection_id,
        message.subject_hash,
        message.affected_count,
        message.reason,
    )


def server_info(message: admin_pb2.GetServerInfoResponse) -> ServerInfo:
    """Convert from protobuf."""
    limits = {name.name: getattr(message.limits, name.name) for name in admin_pb2.Limits.DESCRIPTOR.fields}
    space = message.active_space
    return ServerInfo(message.server_version, message.provider, space.space_id, space.model_id, space.dim, limits)


_SHADOW_STATES: dict[int, ShadowState] = {
    model_pb2.SHADOW_STATE_RUNNING: "running",
    model_pb2.SHADOW_STATE_DONE: "done",
    model_pb2.SHADOW_STATE_EXPIRED: "expired",
    model_pb2.SHADOW_STATE_STOPPED: "stopped",
    model_pb2.SHADOW_STATE_SUPERSEDED: "superseded",
    model_pb2.SHADOW_STATE_INTERRUPTED: "interrupted",
}


def shadow(message: model_pb2.Shadow) -> Shadow:
    """Convert from protobuf."""
    figures = message.figures
    return Shadow(
        collection=message.collection_id,
        model_id=message.model_id,
        space_id=message.space_id,
        active_model_id=message.active_model_id,
        active_space_id=message.active_space_id,
        state=_SHADOW_STATES.get(message.state, "interrupted"),
        sample=message.sample,
        max_searches=message.max_searches,
        started=_to_datetime(message.start_time),
        ended=_to_datetime(message.end_time) if message.HasField("end_time") else None,
        expires=_to_datetime(message.expire_time) if message.HasField("expire_time") else None,
        operation_id=message.operation_id,
        figures=ShadowFigures(**_scalars(figures), active=_side(figures.active), candidate=_side(figures.candidate)),
    )


def _side(message: model_pb2.ShadowSide) -> ShadowSide:
    return ShadowSide(**_scalars(message))


def search_statistics(message: admin_pb2.SearchStatistics) -> SearchStatistics:
    """Convert from protobuf."""
    return SearchStatistics(
        **_scalars(message),
        first_time=_to_datetime(message.first_time),
        last_time=_to_datetime(message.last_time),
        cosine_histogram=tuple(message.cosine_histogram),
    )


def _scalars(message: Message) -> dict[str, Any]:
    """The scalar fields of a message by name; None for an optional field that is not set."""
    return {
        field.name: getattr(message, field.name) if not field.has_presence or message.HasField(field.name) else None
        for field in message.DESCRIPTOR.fields
        if field.message_type is None and not field.is_repeated
    }


def _to_datetime(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
