"""From the wire: figures of shadows and of searches, as the values of `resight.answers_figures`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from resight.answers_figures import SearchFigures, Shadow, ShadowFigures, ShadowSide, ShadowState
from resight.v1 import admin_pb2, model_pb2

_STATES: dict[int, ShadowState] = {
    model_pb2.SHADOW_STATE_RUNNING: "running",
    model_pb2.SHADOW_STATE_DONE: "done",
    model_pb2.SHADOW_STATE_EXPIRED: "expired",
    model_pb2.SHADOW_STATE_STOPPED: "stopped",
    model_pb2.SHADOW_STATE_SUPERSEDED: "superseded",
    model_pb2.SHADOW_STATE_INTERRUPTED: "interrupted",
}


def shadow(message: model_pb2.Shadow) -> Shadow:
    """From the wire."""
    figures = message.figures
    return Shadow(
        collection=message.collection_id,
        model_id=message.model_id,
        space_id=message.space_id,
        active_model_id=message.active_model_id,
        active_space_id=message.active_space_id,
        state=_STATES.get(message.state, "interrupted"),
        sample=message.sample,
        max_searches=message.max_searches,
        started=_time(message.start_time),
        ended=_time(message.end_time) if message.HasField("end_time") else None,
        expires=_time(message.expire_time) if message.HasField("expire_time") else None,
        operation_id=message.operation_id,
        figures=ShadowFigures(**_scalars(figures), active=_side(figures.active), candidate=_side(figures.candidate)),
    )


def _side(message: model_pb2.ShadowSide) -> ShadowSide:
    return ShadowSide(**_scalars(message))


def search_figures(message: admin_pb2.SearchFigures) -> SearchFigures:
    """From the wire."""
    return SearchFigures(
        **_scalars(message),
        first_time=_time(message.first_time),
        last_time=_time(message.last_time),
        cosine_histogram=tuple(message.cosine_histogram),
    )


def _scalars(message: Message) -> dict[str, Any]:
    """The single numbers, words and flags of a message by name; one that was not told, and could be, is None."""
    return {
        field.name: getattr(message, field.name) if not field.has_presence or message.HasField(field.name) else None
        for field in message.DESCRIPTOR.fields
        if field.message_type is None and not field.is_repeated
    }


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
