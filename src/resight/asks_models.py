"""The calls about models and migrations, as those in `resight.asks`."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

from resight import replies, replies_figures
from resight.answers import ModelInfo, OperationInfo
from resight.answers_figures import Shadow
from resight.calls import Ask, Listing, Road
from resight.v1 import model_pb2


def models() -> Listing[ModelInfo]:
    """All models, loaded or in the server's folder of models, by name."""
    ask = Ask("models.ListModels", model_pb2.ListModelsRequest())
    return Listing(ask, lambda page: [replies.model(one) for one in page.models])


def model(model_id: str) -> Road[ModelInfo]:
    """One model."""
    return replies.model((yield Ask("models.GetModel", model_pb2.GetModelRequest(model_id=model_id))).model)


def load_model(model_id: str) -> Road[OperationInfo]:
    """Begin to load a model from the server's folder of models; `wait` for it before it is activated."""
    request = model_pb2.LoadModelRequest(model_id=model_id)
    return replies.operation((yield Ask("models.LoadModel", request, retry=False)).operation)


def unload_model(model_id: str) -> Road[None]:
    """Let a loaded model go; requests that began with it end on it."""
    yield Ask("models.UnloadModel", model_pb2.UnloadModelRequest(model_id=model_id), retry=False)


def activate_model(model_id: str, *, expected: str = "") -> Road[tuple[ModelInfo, ModelInfo]]:
    """Let a loaded model embed what names none; returns it and the one before.

    Args:
        model_id: of a loaded model.
        expected: the model thought to be active now; `ConflictError` if another is. Empty = whichever.
    """
    request = model_pb2.ActivateModelRequest(model_id=model_id, expected_current_model_id=expected)
    reply = yield Ask("models.ActivateModel", request, retry=False)
    return replies.model(reply.active), replies.model(reply.previous)


def migrate(
    collection: str, model_id: str, *, auto_activate: bool = False, drop_missing: bool = False
) -> Road[OperationInfo]:
    """Begin to embed a collection's stored crops with a loaded model, or go on with it.

    Args:
        collection: its name.
        model_id: of a loaded model.
        auto_activate: search in the new space as soon as the gate is passed.
        drop_missing: entries without a stored crop are absent from the new space.
    """
    request = model_pb2.MigrateCollectionRequest(
        collection_id=collection,
        target_model_id=model_id,
        auto_activate=auto_activate,
        missing_crops=model_pb2.MISSING_CROP_POLICY_DROP if drop_missing else model_pb2.MISSING_CROP_POLICY_FAIL,
        request_id=str(uuid4()),
    )
    return replies.operation((yield Ask("models.MigrateCollection", request)).operation)


def activate_space(
    collection: str, space_id: str, *, expected: str = "", allow_incomplete: bool = False
) -> Road[tuple[str, str]]:
    """Search a collection in another of its spaces; returns the ids of that space and of the one before."""
    request = model_pb2.ActivateSpaceRequest(
        collection_id=collection,
        space_id=space_id,
        expected_current_space_id=expected,
        allow_incomplete=allow_incomplete,
    )
    reply = yield Ask("models.ActivateSpace", request, retry=False)
    return reply.active.space_id, reply.previous.space_id


def start_shadow(
    collection: str,
    model_id: str,
    *,
    sample: float = 1.0,
    max_searches: int = 0,
    expire_after: timedelta | None = None,
) -> Road[Shadow]:
    """Let a candidate model answer a sample of a collection's searches of crops too, for figures alone.

    Asked for again with the same model, it goes on, with the bounds of this call.

    Args:
        collection: its name; migrated to the model's space, and searched in another one.
        model_id: of a loaded model.
        sample: share of the searches, above 0, at most 1.
        max_searches: answered ones, after which it ends; 0 = without such an end.
        expire_after: None = without such an end.
    """
    request = model_pb2.StartShadowRequest(
        collection_id=collection, model_id=model_id, sample=sample, max_searches=max_searches
    )
    if expire_after is not None:
        request.expire_after.FromTimedelta(expire_after)
    return replies_figures.shadow((yield Ask("models.StartShadow", request)).shadow)


def get_shadow(collection: str) -> Road[Shadow]:
    """A collection's shadow that runs, or ran last, with its figures so far."""
    request = model_pb2.GetShadowRequest(collection_id=collection)
    return replies_figures.shadow((yield Ask("models.GetShadow", request)).shadow)


def stop_shadow(collection: str) -> Road[Shadow]:
    """End a collection's shadow; returns its last figures."""
    request = model_pb2.StopShadowRequest(collection_id=collection)
    return replies_figures.shadow((yield Ask("models.StopShadow", request)).shadow)
