"""GalleryService: collections, entries, feedback and stored crops."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

from resight.errors import CropsMissingError, InputError, ReIDError
from resight.service import call_events
from resight.service.access.auth import current
from resight.service.access.interceptors import Context, check_batch, deadline_of
from resight.service.gallery import EnrolmentRequest, Gallery, may_outlive
from resight.service.records import Collection, Enrolled
from resight.service.rpc import convert
from resight.service.rpc.convert import check_request_id, key_of_token, name_of_token, page_size, page_token
from resight.service.settings import Settings
from resight.service.storage import feedback
from resight.service.storage.audit import AuditEvent
from resight.service.storage.data_folder import keyed_hash
from resight.service.storage.feedback import FeedbackRecord
from resight.service.storage.reads import stream_crops
from resight.service.tenants import Tenants
from resight.v1 import gallery_pb2, gallery_pb2_grpc

AUDIT_EVERY_CROPS = 10_000  # crops per audit row, so that a crash during a long stream loses at most one row

VERDICTS = {
    gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON: True,
    gallery_pb2.FEEDBACK_VERDICT_DIFFERENT_PERSON: False,
}
_VERDICT_OF = {same: verdict for verdict, same in VERDICTS.items()}


class FeedbackServicer(gallery_pb2_grpc.GalleryServiceServicer):
    """The methods for feedback and for the training cycle of a site."""

    def __init__(self, tenants: Tenants, settings: Settings) -> None:
        self._tenants, self._settings = tenants, settings

    async def AddFeedback(
        self, request: gallery_pb2.AddFeedbackRequest, context: Context
    ) -> gallery_pb2.AddFeedbackResponse:
        """Store whether two entries show the same person."""
        if request.verdict not in VERDICTS:
            raise InputError("expected verdict SAME_PERSON or DIFFERENT_PERSON", field="verdict")
        check_request_id(request.request_id)
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        digest = keyed_hash(tenant.store.key, request.SerializeToString(deterministic=True).hex())
        stored, replayed = await tenant.store.write(
            feedback.add,
            collection,
            _pair(request.entry_id, request.other_entry_id),
            _event("AddFeedback"),
            same=VERDICTS[request.verdict],
            request_id=request.request_id,
            digest=digest.encode(),
        )
        return gallery_pb2.AddFeedbackResponse(feedback=feedback_message(stored), replayed=replayed)

    async def ListFeedback(
        self, request: gallery_pb2.ListFeedbackRequest, context: Context
    ) -> gallery_pb2.ListFeedbackResponse:
        """Feedback on a collection's entries, paginated."""
        limit, after = page_size(request.page_size), key_of_token(request.page_token)
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        found = await tenant.store.read(feedback.list_records, collection.key, after=after, limit=limit + 1)
        return gallery_pb2.ListFeedbackResponse(
            feedback=[feedback_message(one) for one in found[:limit]],
            next_page_token=page_token(found[limit - 1].key) if len(found) > limit else "",
        )

    async def RemoveFeedback(
        self, request: gallery_pb2.RemoveFeedbackRequest, context: Context
    ) -> gallery_pb2.RemoveFeedbackResponse:
        """Remove the feedback on two entries."""
        tenant = await self._tenants.tenant(current().tenant)
        collection = await tenant.gallery.collection(request.collection_id)
        pair, event = _pair(request.entry_id, request.other_entry_id), _event("RemoveFeedback")
        await tenant.store.erase(feedback.remove, collection, pair, event, allow_missing=request.allow_missing)
        return gallery_pb2.RemoveFeedbackResponse()

    async def StreamCrops(
        self, request: gallery_pb2.StreamCropsRequest, context: Context
    ) -> AsyncIterator[gallery_pb2.StreamCropsResponse]:
        """Stream the stored crops of a collection, one entry per response, with flow control."""
        filters, after = convert.to_filter(request.filter), key_of_token(request.cursor, "cursor")
        since_us = None
        if request.HasField("enrolled_since"):
            since_us = convert.to_micros(request.enrolled_since, "enrolled_since")
        async with self._tenants.lease(current().tenant) as tenant:
            collection = await tenant.gallery.collection(request.collection_id)
            if not collection.keep_crops:
                raise CropsMissingError(
                    f"collection {collection.name} keeps no crops: set its crop_retention to CROP_RETENTION_STORE to "
                    "keep those of later enrolments",
                    field="collection_id",
                    collection=collection.name,
                )
            count, event = 0, _event("StreamCrops", collection.name)
            try:
                async for one in stream_crops(tenant.store, collection, filters, since_us=since_us, after=after):
                    count += 1
                    yield gallery_pb2.StreamCropsResponse(
                        entry=convert.entry_message(one.entry), images=one.images, cursor=page_token(one.key)
                    )
                    if count == AUDIT_EVERY_CROPS:
                        tenant.audit.add(replace(event, affected=count))
                        count = 0
            finally:
                tenant.audit.add(replace(event, affected=count))


def feedback_message(record: FeedbackRecord) -> gallery_pb2.Feedback:
    """Convert a feedback record."""
    return gallery_pb2.Feedback(
        entry_id=record.entry_id,
        other_entry_id=record.other_entry_id,
        verdict=_VERDICT_OF[record.same],
        principal=record.principal,
        feedback_time=convert.timestamp(record.at_us),
    )


def _pair(one: str, other: str) -> tuple[str, str]:
    return convert.check_id(one, "entry_id"), convert.check_id(other, "other_entry_id")


def _event(method: str, collection: str = "") -> AuditEvent:
    return AuditEvent(current().name, f"GalleryService.{method}", collection)


class GalleryServicer(FeedbackServicer):
    """See gallery.proto."""

    async def _gallery(self) -> Gallery:
        """The gallery of the caller's tenant."""
        return await self._tenants.gallery(current().tenant)

    async def CreateCollection(
        self, request: gallery_pb2.CreateCollectionRequest, context: Context
    ) -> gallery_pb2.CreateCollectionResponse:
        """Create an empty collection in the space of a loaded model."""
        gallery = await self._gallery()
        new = convert.to_collection(request.collection, gallery.space_of(request.model_id))
        created = await gallery.create_collection(new, allow_unlimited=request.allow_unlimited_retention)
        (message,) = await _messages(gallery, created)
        return gallery_pb2.CreateCollectionResponse(collection=message)

    async def GetCollection(
        self, request: gallery_pb2.GetCollectionRequest, context: Context
    ) -> gallery_pb2.GetCollectionResponse:
        """One collection."""
        gallery = await self._gallery()
        (message,) = await _messages(gallery, await gallery.collection(request.collection_id))
        return gallery_pb2.GetCollectionResponse(collection=message)

    async def ListCollections(
        self, request: gallery_pb2.ListCollectionsRequest, context: Context
    ) -> gallery_pb2.ListCollectionsResponse:
        """Collections sorted by name, paginated."""
        gallery = await self._gallery()
        limit = page_size(request.page_size)
        found = await gallery.collections(after=name_of_token(request.page_token), limit=limit + 1)
        return gallery_pb2.ListCollectionsResponse(
            collections=await _messages(gallery, *found[:limit]),
            next_page_token=page_token(found[limit - 1].name) if len(found) > limit else "",
        )

    async def UpdateCollection(
        self, request: gallery_pb2.UpdateCollectionRequest, context: Context
    ) -> gallery_pb2.UpdateCollectionResponse:
        """Change the settings in the update mask."""
        gallery = await self._gallery()
        new = convert.to_collection(request.collection, gallery.space)
        fields = convert.masked_fields(request.update_mask, convert.COLLECTION_PATHS)
        changed = await gallery.update_collection(new, fields, etag=request.collection.etag)
        (message,) = await _messages(gallery, changed)
        return gallery_pb2.UpdateCollectionResponse(collection=message)

    async def DeleteCollection(
        self, request: gallery_pb2.DeleteCollectionRequest, context: Context
    ) -> gallery_pb2.DeleteCollectionResponse:
        """Delete a collection; ``force`` is required if it has entries."""
        gallery = await self._gallery()
        await gallery.delete_collection(request.collection_id, force=request.force, etag=request.etag)
        return gallery_pb2.DeleteCollectionResponse()

    async def EnrollEntry(
        self, request: gallery_pb2.EnrollEntryRequest, context: Context
    ) -> gallery_pb2.EnrollEntryResponse:
        """Enrol one entry; it is on disk when the call returns."""
        gallery = await self._gallery()
        deadline = deadline_of(context, self._settings.deadline_s)
        enrolment = enrol_request(request, request.collection_id)
        (outcome,) = await gallery.enrol(request.collection_id, [enrolment], deadline, method="EnrollEntry")
        if isinstance(outcome, ReIDError):
            raise outcome
        return gallery_pb2.EnrollEntryResponse(
            entry=convert.entry_message(outcome.entry), revision=outcome.revision, replayed=outcome.replayed
        )

    async def BatchEnrollEntries(
        self, request: gallery_pb2.BatchEnrollEntriesRequest, context: Context
    ) -> gallery_pb2.BatchEnrollEntriesResponse:
        """Enrol up to 64 entries, each with its own status, or with ``atomic`` all or none."""
        gallery = await self._gallery()
        check_batch(len(request.requests), self._settings, "requests")
        deadline = deadline_of(context, self._settings.batch_deadline_s)
        enrolments: list[EnrolmentRequest] = []
        outcomes: list[Enrolled | ReIDError | None] = []
        for number, child in enumerate(request.requests):
            try:
                enrolments.append(enrol_request(child, request.collection_id))
                outcomes.append(None)
            except ReIDError as error:
                if request.atomic:
                    raise _item_error(error, number) from None
                outcomes.append(error)
        if request.atomic:
            try:
                enrolled: Iterator[Enrolled | ReIDError] = iter(
                    await gallery.enrol_atomic(request.collection_id, enrolments, deadline)
                )
            except ReIDError as error:
                raise _item_error(error, int(error.facts.pop("item", -1))) from None
        else:
            method = "BatchEnrollEntries"
            enrolled = iter(await gallery.enrol(request.collection_id, enrolments, deadline, method=method))
        revision, results = 0, []
        for number, invalid in enumerate(outcomes):
            outcome = invalid or next(enrolled)
            if isinstance(outcome, ReIDError):
                status = call_events.record_error(outcome, field=f"requests[{number}]")
                results.append(gallery_pb2.EnrollResult(error=status))
            else:
                revision = max(revision, outcome.revision)
                results.append(gallery_pb2.EnrollResult(entry=convert.entry_message(outcome.entry)))
        return gallery_pb2.BatchEnrollEntriesResponse(results=results, revision=revision)

    async def GetEntry(self, request: gallery_pb2.GetEntryRequest, context: Context) -> gallery_pb2.GetEntryResponse:
        """One entry, with its feature if requested."""
        gallery = await self._gallery()
        collection, entry, feature = await gallery.entry(
            request.collection_id, request.entry_id, with_feature=request.include_embedding
        )
        return gallery_pb2.GetEntryResponse(
            entry=convert.entry_message(entry),
            embedding=None if feature is None else convert.feature_message(feature, collection.space),
        )

    async def ListEntries(
        self, request: gallery_pb2.ListEntriesRequest, context: Context
    ) -> gallery_pb2.ListEntriesResponse:
        """Entries in order of enrolment, paginated."""
        gallery = await self._gallery()
        limit = page_size(request.page_size)
        after = key_of_token(request.page_token)
        filters = convert.to_filter(request.filter)
        found = await gallery.entries(request.collection_id, filters, after=after, limit=limit + 1)
        return gallery_pb2.ListEntriesResponse(
            entries=[convert.entry_message(entry) for _, entry in found[:limit]],
            next_page_token=page_token(found[limit - 1][0]) if len(found) > limit else "",
        )

    async def UpdateEntry(
        self, request: gallery_pb2.UpdateEntryRequest, context: Context
    ) -> gallery_pb2.UpdateEntryResponse:
        """Change the fields of an entry in the update mask."""
        gallery = await self._gallery()
        new, etag = convert.to_entry(request.entry), request.entry.etag
        fields = convert.masked_fields(request.update_mask, convert.ENTRY_PATHS)
        changed = await gallery.update_entry(request.collection_id, new, fields, etag=etag)
        return gallery_pb2.UpdateEntryResponse(entry=convert.entry_message(changed.entry), revision=changed.revision)

    async def DeleteEntry(
        self, request: gallery_pb2.DeleteEntryRequest, context: Context
    ) -> gallery_pb2.DeleteEntryResponse:
        """Delete an entry with its features and crops."""
        gallery = await self._gallery()
        revision = await gallery.delete_entry(
            request.collection_id, request.entry_id, allow_missing=request.allow_missing, etag=request.etag
        )
        return gallery_pb2.DeleteEntryResponse(revision=revision)

    async def DeleteEntries(
        self, request: gallery_pb2.DeleteEntriesRequest, context: Context
    ) -> gallery_pb2.DeleteEntriesResponse:
        """Delete the entries that match a filter, or with ``validate_only`` count them."""
        if request.max_deletes < 0:
            raise InputError(f"max_deletes is 0 (no cap) or more, found {request.max_deletes}", field="max_deletes")
        gallery = await self._gallery()
        matched, deleted, revision = await gallery.delete_entries(
            request.collection_id,
            convert.to_filter(request.filter),
            validate_only=request.validate_only,
            cap=request.max_deletes or None,
        )
        return gallery_pb2.DeleteEntriesResponse(matched_count=matched, deleted_count=deleted, revision=revision)

    async def EraseSubject(
        self, request: gallery_pb2.EraseSubjectRequest, context: Context
    ) -> gallery_pb2.EraseSubjectResponse:
        """Erase a person, and report whether the storage was scrubbed."""
        gallery = await self._gallery()
        subject_id = convert.check_id(request.subject_id, "subject_id")
        deadline = deadline_of(context, self._settings.deadline_s)
        result = await gallery.erase(request.collection_id, subject_id, reason=request.reason, deadline=deadline)
        return gallery_pb2.EraseSubjectResponse(
            erased_count=result.erased_count, audit_id=result.audit_id, storage_scrubbed=result.storage_scrubbed
        )


async def _messages(gallery: Gallery, *collections: Collection) -> list[gallery_pb2.Collection]:
    return [
        convert.collection_message(collection, count, gallery.searcher.revision(collection))
        for collection, count in await gallery.with_entry_counts(collections)
    ]


def _item_error(error: ReIDError, number: int) -> ReIDError:
    """Prefix the field of an error with its item of the batch; -1 = not of an item."""
    if number >= 0:
        error.field = ".".join(part for part in (f"requests[{number}]", error.field) if part)
    return error


def enrol_request(request: gallery_pb2.EnrollEntryRequest, collection_id: str) -> EnrolmentRequest:
    """Convert and check one enrolment.

    Raises:
        InputError: no source, an invalid field, or an item of a batch with another collection.
    """
    if request.collection_id not in ("", collection_id):
        raise InputError(
            f"a batch enrols into one collection, expected {collection_id!r}, found {request.collection_id!r}",
            field="collection_id",
        )
    kind = request.WhichOneof("source")
    if kind is None:
        raise InputError("the source is missing: set image, shots or embedding", field="source")
    check_request_id(request.request_id)
    digest = hashlib.sha256(collection_id.encode() + b"\0" + _canonical(request)).digest()
    return EnrolmentRequest(
        convert.to_entry(request.entry),
        convert.to_source(request, kind),
        replace=request.on_duplicate == gallery_pb2.DUPLICATE_POLICY_REPLACE,
        request_id=request.request_id,
        digest=digest if request.request_id else b"",
        may_outlive=may_outlive(),
    )


def _canonical(request: gallery_pb2.EnrollEntryRequest) -> bytes:
    """The serialised request without its collection, which items of a batch may leave out."""
    copy = gallery_pb2.EnrollEntryRequest()
    copy.CopyFrom(request)
    copy.ClearField("collection_id")
    return copy.SerializeToString(deterministic=True)
