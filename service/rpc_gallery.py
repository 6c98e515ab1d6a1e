"""The servicer of collections and entries: translate, call, translate."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc

from resight.errors import InputError, ReIDError
from resight.reasons import to_status
from resight.service import translate
from resight.service.entries import Collection, Enrolled
from resight.service.gallery import DEFAULT_PAGE, MAX_PAGE, EnrolRequest, Gallery
from resight.service.guard import check_batch, deadline_of
from resight.service.settings import Settings
from resight.v1 import gallery_pb2, gallery_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
MAX_REQUEST_ID = 128  # a UUID has 36


class GalleryServicer(gallery_pb2_grpc.GalleryServiceServicer):
    """Collections and their entries."""

    def __init__(self, gallery: Gallery, settings: Settings) -> None:
        self._gallery, self._settings = gallery, settings

    async def _messages(self, *found: Collection) -> list[gallery_pb2.Collection]:
        return [
            translate.collection_message(collection, count, self._gallery.searcher.revision(collection))
            for collection, count in await self._gallery.counted(found)
        ]

    async def CreateCollection(
        self, request: gallery_pb2.CreateCollectionRequest, context: Context
    ) -> gallery_pb2.CreateCollectionResponse:
        """Make an empty collection of the served model's space."""
        wanted = request.collection
        new = Collection(
            name=wanted.collection_id,
            space=self._gallery.space,
            ttl_us=translate.ttl_us(wanted),
            keep_crops=wanted.crop_retention == gallery_pb2.CROP_RETENTION_STORE,
        )
        made = await self._gallery.create_collection(new, allow_unlimited=request.allow_unlimited_retention)
        (message,) = await self._messages(made)
        return gallery_pb2.CreateCollectionResponse(collection=message)

    async def GetCollection(
        self, request: gallery_pb2.GetCollectionRequest, context: Context
    ) -> gallery_pb2.GetCollectionResponse:
        """One collection."""
        found = await self._gallery.collection(request.collection_id)
        (message,) = await self._messages(found)
        return gallery_pb2.GetCollectionResponse(collection=message)

    async def ListCollections(
        self, request: gallery_pb2.ListCollectionsRequest, context: Context
    ) -> gallery_pb2.ListCollectionsResponse:
        """Collections by name, page by page."""
        limit = page_size(request.page_size)
        after = translate.name_of_token(request.page_token)
        found = await self._gallery.collections(after=after, limit=limit + 1)
        return gallery_pb2.ListCollectionsResponse(
            collections=await self._messages(*found[:limit]),
            next_page_token=translate.page_token(found[limit - 1].name) if len(found) > limit else "",
        )

    async def DeleteCollection(
        self, request: gallery_pb2.DeleteCollectionRequest, context: Context
    ) -> gallery_pb2.DeleteCollectionResponse:
        """Remove a collection, with ``force`` also one that has entries."""
        await self._gallery.delete_collection(request.collection_id, force=request.force)
        return gallery_pb2.DeleteCollectionResponse()

    async def EnrollEntry(
        self, request: gallery_pb2.EnrollEntryRequest, context: Context
    ) -> gallery_pb2.EnrollEntryResponse:
        """Enrol one entry; it is on disk when this answers."""
        deadline = deadline_of(context, self._settings.deadline_s)
        wanted = enrol_request(request, request.collection_id)
        (outcome,) = await self._gallery.enrol(request.collection_id, [wanted], deadline)
        if isinstance(outcome, ReIDError):
            raise outcome
        return gallery_pb2.EnrollEntryResponse(
            entry=translate.entry_message(outcome.entry), revision=outcome.revision, replayed=outcome.replayed
        )

    async def BatchEnrollEntries(
        self, request: gallery_pb2.BatchEnrollEntriesRequest, context: Context
    ) -> gallery_pb2.BatchEnrollEntriesResponse:
        """Enrol up to 64 entries, each with its own status."""
        check_batch(len(request.requests), self._settings, "requests")
        deadline = deadline_of(context, self._settings.batch_deadline_s)
        wanted: list[EnrolRequest] = []
        outcomes: list[Enrolled | ReIDError | None] = []
        for child in request.requests:
            try:
                wanted.append(enrol_request(child, request.collection_id))
                outcomes.append(None)
            except ReIDError as error:
                outcomes.append(error)
        made = iter(await self._gallery.enrol(request.collection_id, wanted, deadline))
        revision, results = 0, []
        for number, early in enumerate(outcomes):
            outcome = early or next(made)
            if isinstance(outcome, ReIDError):
                status = to_status(outcome, field=f"requests[{number}]")
                results.append(gallery_pb2.EnrollResult(error=status))
            else:
                revision = max(revision, outcome.revision)
                results.append(gallery_pb2.EnrollResult(entry=translate.entry_message(outcome.entry)))
        return gallery_pb2.BatchEnrollEntriesResponse(results=results, revision=revision)

    async def GetEntry(self, request: gallery_pb2.GetEntryRequest, context: Context) -> gallery_pb2.GetEntryResponse:
        """One entry, with its feature where asked for."""
        found_in, entry, feature = await self._gallery.entry(
            request.collection_id, request.entry_id, with_feature=request.include_embedding
        )
        return gallery_pb2.GetEntryResponse(
            entry=translate.entry_message(entry),
            embedding=None if feature is None else translate.feature_message(feature, found_in.space),
        )

    async def ListEntries(
        self, request: gallery_pb2.ListEntriesRequest, context: Context
    ) -> gallery_pb2.ListEntriesResponse:
        """Entries in order of enrolment, page by page."""
        limit = page_size(request.page_size)
        after = translate.key_of_token(request.page_token)
        found = await self._gallery.entries(
            request.collection_id, translate.filters(request.filter), after=after, limit=limit + 1
        )
        return gallery_pb2.ListEntriesResponse(
            entries=[translate.entry_message(entry) for _, entry in found[:limit]],
            next_page_token=translate.page_token(found[limit - 1][0]) if len(found) > limit else "",
        )

    async def DeleteEntry(
        self, request: gallery_pb2.DeleteEntryRequest, context: Context
    ) -> gallery_pb2.DeleteEntryResponse:
        """Remove one entry with its feature and crops."""
        revision = await self._gallery.delete_entry(
            request.collection_id, request.entry_id, allow_missing=request.allow_missing
        )
        return gallery_pb2.DeleteEntryResponse(revision=revision)

    async def DeleteEntries(
        self, request: gallery_pb2.DeleteEntriesRequest, context: Context
    ) -> gallery_pb2.DeleteEntriesResponse:
        """Remove what passes a filter, or count it."""
        if request.max_deletes < 0:
            raise InputError(f"max_deletes is 0 (no cap) or more, found {request.max_deletes}", field="max_deletes")
        matched, deleted, revision = await self._gallery.delete_entries(
            request.collection_id,
            translate.filters(request.filter),
            validate_only=request.validate_only,
            cap=request.max_deletes or None,
        )
        return gallery_pb2.DeleteEntriesResponse(matched_count=matched, deleted_count=deleted, revision=revision)


def enrol_request(request: gallery_pb2.EnrollEntryRequest, collection_id: str) -> EnrolRequest:
    """One enrolment, checked.

    Raises:
        InputError: no source, a bad field, or a child of a batch that names another collection.
    """
    if request.collection_id not in ("", collection_id):
        raise InputError(
            f"a batch enrols into one collection, {collection_id!r}, this item says {request.collection_id!r}",
            field="collection_id",
        )
    kind = request.WhichOneof("source")
    if kind is None:
        raise InputError("nothing to enrol: set image, shots or embedding", field="source")
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InputError(f"request_id has at most {MAX_REQUEST_ID} characters: use a UUID", field="request_id")
    digest = hashlib.sha256(collection_id.encode() + b"\0" + _canonical(request)).digest()
    return EnrolRequest(
        translate.entry(request.entry),
        translate.source(request, kind),
        replace=request.on_duplicate == gallery_pb2.DUPLICATE_POLICY_REPLACE,
        request_id=request.request_id,
        digest=digest if request.request_id else b"",
    )


def _canonical(request: gallery_pb2.EnrollEntryRequest) -> bytes:
    """The request's bytes without the name of its collection, which a child of a batch may leave out."""
    copy = gallery_pb2.EnrollEntryRequest()
    copy.CopyFrom(request)
    copy.ClearField("collection_id")
    return copy.SerializeToString(deterministic=True)


def page_size(asked: int) -> int:
    """What a page holds: 100 when not told, at most 1000.

    Raises:
        InputError: negative.
    """
    if asked < 0:
        raise InputError(f"page_size is 0 (for {DEFAULT_PAGE}) to {MAX_PAGE}, found {asked}", field="page_size")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)
