"""The servicer of what a site's next model learns from: what people said of entries, and the kept crops."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from resight.errors import CropsMissingError, InputError
from resight.service import feedback, translate
from resight.service.audit import Event
from resight.service.auth import current
from resight.service.feedback import Feedback
from resight.service.kept_crops import kept
from resight.service.paging import key_of_token, page_size, page_token
from resight.service.secret import keyed
from resight.service.settings import Settings
from resight.service.tenants import Tenants
from resight.v1 import gallery_pb2, gallery_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
MAX_REQUEST_ID = 128  # a UUID has 36
TELL_EVERY = 10_000  # crops of one row of the audit: who is killed in the middle of a long stream has told most of it

VERDICTS = {
    gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON: True,
    gallery_pb2.FEEDBACK_VERDICT_DIFFERENT_PERSON: False,
}
_VERDICT_OF = {same: verdict for verdict, same in VERDICTS.items()}


class LessonServicer(gallery_pb2_grpc.GalleryServiceServicer):
    """The part of the gallery's service that a site's cycle asks, and those who confirm what it found."""

    def __init__(self, tenants: Tenants, settings: Settings) -> None:
        self._tenants, self._settings = tenants, settings

    async def AddFeedback(
        self, request: gallery_pb2.AddFeedbackRequest, context: Context
    ) -> gallery_pb2.AddFeedbackResponse:
        """Store what somebody said of two entries."""
        if request.verdict not in VERDICTS:
            raise InputError("verdict is SAME_PERSON or DIFFERENT_PERSON: tell which", field="verdict")
        check_request_id(request.request_id)
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        digest = keyed(tenant.store.key, request.SerializeToString(deterministic=True).hex())
        told, replayed = await tenant.store.write(
            feedback.add,
            collection,
            _pair(request.entry_id, request.other_entry_id),
            _event("AddFeedback"),
            same=VERDICTS[request.verdict],
            request_id=request.request_id,
            digest=digest.encode(),
        )
        return gallery_pb2.AddFeedbackResponse(feedback=feedback_message(told), replayed=replayed)

    async def ListFeedback(
        self, request: gallery_pb2.ListFeedbackRequest, context: Context
    ) -> gallery_pb2.ListFeedbackResponse:
        """What was said of a collection's entries, page by page."""
        limit, after = page_size(request.page_size), key_of_token(request.page_token)
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        found = await tenant.store.read(feedback.listed, collection.key, after=after, limit=limit + 1)
        return gallery_pb2.ListFeedbackResponse(
            feedback=[feedback_message(one) for one in found[:limit]],
            next_page_token=page_token(found[limit - 1].key) if len(found) > limit else "",
        )

    async def RemoveFeedback(
        self, request: gallery_pb2.RemoveFeedbackRequest, context: Context
    ) -> gallery_pb2.RemoveFeedbackResponse:
        """Take back what was said of two entries."""
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        pair, event = _pair(request.entry_id, request.other_entry_id), _event("RemoveFeedback")
        await tenant.store.erase(feedback.remove, collection, pair, event, allow_missing=request.allow_missing)
        return gallery_pb2.RemoveFeedbackResponse()

    async def StreamCrops(
        self, request: gallery_pb2.StreamCropsRequest, context: Context
    ) -> AsyncIterator[gallery_pb2.StreamCropsResponse]:
        """Send the kept crops of a collection, an entry an answer, no faster than they are taken."""
        filters, after = translate.filters(request.filter), key_of_token(request.cursor, "cursor")
        since_us = None
        if request.HasField("enrolled_since"):
            since_us = translate.micros(request.enrolled_since, "enrolled_since")
        async with self._tenants.held(current().tenant) as tenant:
            collection = await tenant.gallery.collection(request.collection_id)
            if not collection.keep_crops:
                raise CropsMissingError(
                    f"collection {collection.name} keeps no crops: set its crop_retention to CROP_RETENTION_STORE, and "
                    "those enrolled from then on are kept",
                    field="collection_id",
                    collection=collection.name,
                )
            count, event = 0, _event("StreamCrops", collection.name)
            try:
                async for one in kept(tenant.store, collection, filters, since_us=since_us, after=after):
                    count += 1
                    yield gallery_pb2.StreamCropsResponse(
                        entry=translate.entry_message(one.entry), images=one.images, cursor=page_token(one.key)
                    )
                    if count == TELL_EVERY:
                        tenant.audit.note(replace(event, affected=count))
                        count = 0
            finally:
                tenant.audit.note(replace(event, affected=count))


def feedback_message(told: Feedback) -> gallery_pb2.Feedback:
    """A verdict for the wire."""
    return gallery_pb2.Feedback(
        entry_id=told.entry_id,
        other_entry_id=told.other_entry_id,
        verdict=_VERDICT_OF[told.same],
        principal=told.principal,
        feedback_time=translate.timestamp(told.at_us),
    )


def check_request_id(request_id: str) -> None:
    """Refuse what is too long to be remembered.

    Raises:
        InputError: more than `MAX_REQUEST_ID` characters.
    """
    if len(request_id) > MAX_REQUEST_ID:
        raise InputError(f"request_id has at most {MAX_REQUEST_ID} characters: use a UUID", field="request_id")


def _pair(one: str, other: str) -> tuple[str, str]:
    return translate.identity(one, "entry_id"), translate.identity(other, "other_entry_id")


def _event(method: str, collection: str = "") -> Event:
    return Event(current().name, f"GalleryService.{method}", collection)
