"""Figures of searches and of shadows for the wire."""

from __future__ import annotations

from dataclasses import asdict

from resight.errors import InputError
from resight.service.entries import now_us
from resight.service.search_counts import Told
from resight.service.shadow import Bounds, ShadowState
from resight.service.shadow import Told as ToldShadow
from resight.service.translate import timestamp
from resight.v1 import admin_pb2, model_pb2

STATES = {
    ShadowState.RUNNING: model_pb2.SHADOW_STATE_RUNNING,
    ShadowState.DONE: model_pb2.SHADOW_STATE_DONE,
    ShadowState.EXPIRED: model_pb2.SHADOW_STATE_EXPIRED,
    ShadowState.STOPPED: model_pb2.SHADOW_STATE_STOPPED,
    ShadowState.SUPERSEDED: model_pb2.SHADOW_STATE_SUPERSEDED,
    ShadowState.INTERRUPTED: model_pb2.SHADOW_STATE_INTERRUPTED,
}


def search_figures_message(told: Told, *, active: bool) -> admin_pb2.SearchFigures:
    """What searches in one space came to; ``active``: the collection is searched in it now."""
    counted, decided = told.counted, told.counted.matches + told.counted.uncertain + told.counted.unknown
    drift = told.reference.against(counted)
    return admin_pb2.SearchFigures(
        space_id=told.space_id,
        model_id=told.model_id,
        active=active,
        searches=counted.searches,
        matches=counted.matches,
        uncertain=counted.uncertain,
        unknown=counted.unknown,
        without_hit=counted.searches - counted.hits,
        unknown_share=counted.unknown / decided if decided else None,
        mean_cosine=counted.cosine_sum / counted.hits if counted.hits else None,
        mean_probability=counted.probability_sum / counted.probable if counted.probable else None,
        drift_index=None if drift is None else drift[0],
        mean_shift=None if drift is None else drift[1],
        reference_searches=told.reference.hits,
        first_time=timestamp(counted.first_us),
        last_time=timestamp(counted.last_us),
        cosine_histogram=counted.bins.tolist(),
    )


def shadow_bounds(request: model_pb2.StartShadowRequest) -> Bounds:
    """How much a shadow samples.

    Raises:
        InputError: a share, number or duration out of its range.
    """
    sample = request.sample if request.HasField("sample") else 1.0
    if not 0.0 < sample <= 1.0:
        raise InputError(f"sample is a share above 0, at most 1, found {sample:g}", field="sample")
    if request.max_searches < 0:
        raise InputError(f"max_searches is 0 or more, found {request.max_searches}", field="max_searches")
    if not request.HasField("expire_after"):
        return Bounds(sample, request.max_searches)
    after_us = request.expire_after.ToMicroseconds()
    if after_us <= 0:
        raise InputError("expire_after is above 0: leave it out for a shadow without end", field="expire_after")
    return Bounds(sample, request.max_searches, now_us() + after_us)


def shadow_message(told: ToldShadow) -> model_pb2.Shadow:
    """A shadow with its figures."""
    active, candidate = (model_pb2.ShadowSide(**asdict(side)) for side in (told.figures.active, told.figures.candidate))
    return model_pb2.Shadow(
        collection_id=told.collection,
        model_id=told.model_id,
        space_id=told.space_id,
        active_model_id=told.active_model_id,
        active_space_id=told.active_space_id,
        state=STATES[told.state],
        sample=told.bounds.sample,
        max_searches=told.bounds.max_searches,
        start_time=timestamp(told.start_us),
        end_time=None if told.end_us is None else timestamp(told.end_us),
        expire_time=None if told.bounds.expire_us is None else timestamp(told.bounds.expire_us),
        operation_id=told.operation_id,
        figures=model_pb2.ShadowFigures(**{**asdict(told.figures), "active": active, "candidate": candidate}),
    )
