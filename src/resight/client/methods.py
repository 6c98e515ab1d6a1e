"""The call plans of the client's methods on crops, collections, entries, searches and feedback.

Each function builds a call's request and converts its reply. `resight.client.client.Client` and
`resight.client.async_client.AsyncClient` make their methods from these functions and take over their docstrings.
`resight.client.admin_methods` holds the calls for operators.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, Unpack
from uuid import uuid4

from resight.arrays import Feature
from resight.client import convert
from resight.client.requests import (
    CollectionChange,
    EntryId,
    GivenFeature,
    NewEntry,
    Query,
    SearchOptions,
    Source,
    Where,
    crop_set,
    set_time,
)
from resight.client.responses import (
    CollectionInfo,
    Comparison,
    EmbeddedCrop,
    Entry,
    Erased,
    Feedback,
    KeptCrops,
    SearchAnswer,
    ServerInfo,
)
from resight.client.transport import (
    BATCH_TIMEOUT_FACTOR,
    CallPlan,
    PagedCall,
    ResumableStream,
    Sleep,
    UnaryCall,
    backoff_s,
    item_result,
    split_batches,
)
from resight.errors import OverloadedError, ReIDError
from resight.v1 import admin_pb2, common_pb2, embedding_pb2, gallery_pb2, search_pb2

ENROL_RETRY_S = 10.0 * BATCH_TIMEOUT_FACTOR  # total time to resend entries of a batch that an overloaded server refused


def info() -> CallPlan[ServerInfo]:
    """The server's version, active model and limits."""
    return convert.server_info((yield UnaryCall("admin.GetServerInfo", admin_pb2.GetServerInfoRequest())))


def embed(image: bytes, *, model: str = "") -> CallPlan[Feature]:
    """Embed one crop, a JPEG, PNG or WebP file: float32 (D,) of unit length. ``model`` empty = the active one."""
    request = embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=image), model_id=model)
    return convert.feature((yield UnaryCall("embedding.Embed", request)).embedding)


def embed_crop(image: bytes, *, model: str = "") -> CallPlan[EmbeddedCrop]:
    """As `embed`, with the embedding space and the quality of the crop."""
    request = embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=image), model_id=model)
    return convert.embedded_crop((yield UnaryCall("embedding.Embed", request)))


def embed_batch(images: Sequence[bytes], *, model: str = "") -> CallPlan[list[Feature | ReIDError]]:
    """Embed crops; returns one result per crop, in the same order."""
    out: list[Feature | ReIDError] = []
    for part in split_batches([common_pb2.ImageCrop(data=image) for image in images]):
        request = embedding_pb2.BatchEmbedRequest(images=part, model_id=model)
        reply = yield UnaryCall("embedding.BatchEmbed", request, batch=True)
        out += [item_result(result, "embedding", convert.feature) for result in reply.results]
    return out


def create_collection(
    name: str,
    *,
    ttl: timedelta | None = None,
    unlimited_retention: bool = False,
    keep_crops: bool = False,
    max_entries: int = 0,
    accept_probability: float = 0.0,
    reject_probability: float = 0.0,
    min_quality: float = 0.0,
    model: str = "",
) -> CallPlan[CollectionInfo]:
    """Create an empty collection for features of a loaded model.

    Args:
        name: 1-63 characters of ``a-z 0-9 -``, starting with a letter.
        ttl: lifetime of entries without an ``expire_time`` of their own.
        unlimited_retention: must be set if there is no ``ttl``.
        keep_crops: store the images, so that they can be embedded again with another model.
        max_entries: 0 = no limit.
        accept_probability: lowest probability of a match; 0 = from the calibration.
        reject_probability: lower probabilities are decided as unknown; 0 = from the calibration.
        min_quality: crops of lower quality are rejected at enrolment.
        model: empty = the active one.
    """
    settings = CollectionChange(ttl, max_entries, keep_crops, accept_probability, reject_probability, min_quality)
    request = gallery_pb2.CreateCollectionRequest(
        collection=settings.message(name)[0], allow_unlimited_retention=unlimited_retention, model_id=model
    )
    return convert.collection((yield UnaryCall("gallery.CreateCollection", request, retry=False)).collection)


def collection(name: str) -> CallPlan[CollectionInfo]:
    """Get a collection."""
    request = gallery_pb2.GetCollectionRequest(collection_id=name)
    return convert.collection((yield UnaryCall("gallery.GetCollection", request)).collection)


def collections() -> PagedCall[CollectionInfo]:
    """List all collections, ordered by name."""
    call = UnaryCall("gallery.ListCollections", gallery_pb2.ListCollectionsRequest())
    return PagedCall(call, lambda page: [convert.collection(one) for one in page.collections])


def update_collection(name: str, change: CollectionChange, *, etag: str = "") -> CallPlan[CollectionInfo]:
    """Change a collection's settings; with an ``etag`` only if it was not changed since (`ConflictError`)."""
    message, paths = change.message(name, etag)
    request = gallery_pb2.UpdateCollectionRequest(collection=message)
    request.update_mask.paths.extend(paths)
    return convert.collection((yield UnaryCall("gallery.UpdateCollection", request, retry=not etag)).collection)


def delete_collection(name: str, *, force: bool = False, etag: str = "") -> CallPlan[None]:
    """Delete a collection; with ``force`` also one that has entries."""
    request = gallery_pb2.DeleteCollectionRequest(collection_id=name, force=force, etag=etag)
    yield UnaryCall("gallery.DeleteCollection", request, retry=False, batch=True)


def enrol(collection: str, entry: NewEntry) -> CallPlan[Entry]:
    """Enrol one entry; when this returns, it is on the server's disk."""
    reply = yield UnaryCall("gallery.EnrollEntry", entry.message(collection, str(uuid4())))
    return convert.entry(reply.entry, revision=reply.revision, replayed=reply.replayed)


def enrol_batch(
    collection: str, entries: Sequence[NewEntry], *, atomic: bool = False
) -> CallPlan[list[Entry | ReIDError]]:
    """Enrol entries; returns one result per entry, in the same order. Entries refused by overload are sent again.

    With ``atomic`` either all are enrolled or none, at most one batch of them, and the first error is raised.
    """
    messages = [entry.message("", str(uuid4())) for entry in entries]
    out: list[Entry | ReIDError] = []
    for part in [messages] if atomic else split_batches(messages):
        deadline = time.monotonic() + ENROL_RETRY_S
        done = yield from _enrol_part(collection, part, atomic=atomic)
        for number in itertools.count():
            refused = [(at, error) for at, error in enumerate(done) if isinstance(error, OverloadedError)]
            pause_s = max((backoff_s(error, number) or 0.0 for _, error in refused), default=0.0)
            if not refused or time.monotonic() + pause_s >= deadline:
                break
            yield Sleep(pause_s)
            again = yield from _enrol_part(collection, [part[at] for at, _ in refused])
            for (at, _), result in zip(refused, again, strict=True):
                done[at] = result
        out += done
    return out


def _enrol_part(
    collection: str, part: Sequence[gallery_pb2.EnrollEntryRequest], *, atomic: bool = False
) -> CallPlan[list[Entry | ReIDError]]:
    request = gallery_pb2.BatchEnrollEntriesRequest(collection_id=collection, requests=part, atomic=atomic)
    reply = yield UnaryCall("gallery.BatchEnrollEntries", request, batch=True)
    return [item_result(result, "entry", partial(convert.entry, revision=reply.revision)) for result in reply.results]


def search(collection: str, source: Source | EntryId, **options: Unpack[SearchOptions]) -> CallPlan[SearchAnswer]:
    """Search for the entries nearest to a crop, several crops of one person, a feature or an entry.

    Args:
        collection: its name.
        source: what to search for.
        **options: the attributes of `Query`.
    """
    if options.get("where") is None:
        options.pop("where", None)
    request = Query(source, **options).message(collection)  # type: ignore[arg-type]  # where is not None any more
    return convert.search_answer((yield UnaryCall("search.Search", request)))


def search_batch(collection: str, queries: Sequence[Query]) -> CallPlan[list[SearchAnswer | ReIDError]]:
    """Search one collection for many queries; returns one result per query, in the same order."""
    out: list[SearchAnswer | ReIDError] = []
    for part in split_batches([query.message(collection) for query in queries]):
        reply = yield UnaryCall("search.BatchSearch", search_pb2.BatchSearchRequest(requests=part), batch=True)
        out += [item_result(result, "response", convert.search_answer) for result in reply.results]
    return out


def verify(collection: str, left: bytes | Sequence[bytes], right: bytes | Sequence[bytes]) -> CallPlan[Comparison]:
    """Compare two sets of crops with the calibration and thresholds of a collection, which may be empty."""
    request = search_pb2.VerifyRequest(collection_id=collection, left=crop_set(left), right=crop_set(right))
    return convert.comparison((yield UnaryCall("search.Verify", request)))


def get_entry(collection: str, entry_id: str) -> CallPlan[Entry]:
    """Get an entry."""
    request = gallery_pb2.GetEntryRequest(collection_id=collection, entry_id=entry_id)
    return convert.entry((yield UnaryCall("gallery.GetEntry", request)).entry)


def get_feature(collection: str, entry_id: str) -> CallPlan[GivenFeature]:
    """Get the stored feature of an entry."""
    request = gallery_pb2.GetEntryRequest(collection_id=collection, entry_id=entry_id, include_embedding=True)
    found = (yield UnaryCall("gallery.GetEntry", request)).embedding
    return GivenFeature(convert.feature(found), found.space_id)


def entries(collection: str, *, where: Where | None = None, page_size: int = 1000) -> PagedCall[Entry]:
    """List the entries of a collection in order of enrolment, fetched page by page."""
    filters = (where or Where()).message()
    request = gallery_pb2.ListEntriesRequest(collection_id=collection, filter=filters, page_size=page_size)
    return PagedCall(
        UnaryCall("gallery.ListEntries", request), lambda page: [convert.entry(one) for one in page.entries]
    )


def update_entry(
    collection: str,
    entry_id: str,
    *,
    subject_id: str | None = None,
    labels: dict[str, str] | None = None,
    expire_time: datetime | None = None,
    etag: str = "",
) -> CallPlan[Entry]:
    """Change the fields of an entry; None leaves a field unchanged, an empty string or dict clears it.

    With an ``etag`` only if the entry was not changed since (`ConflictError`).
    """
    request = gallery_pb2.UpdateEntryRequest(collection_id=collection)
    request.entry.entry_id, request.entry.etag = entry_id, etag
    if subject_id is not None:
        request.entry.subject_id = subject_id
        request.update_mask.paths.append("subject_id")
    if labels is not None:
        request.entry.labels.update(labels)
        request.update_mask.paths.append("labels")
    if expire_time is not None:
        set_time(request.entry.expire_time, expire_time, "expire_time")
        request.update_mask.paths.append("expire_time")
    reply = yield UnaryCall("gallery.UpdateEntry", request, retry=not etag)
    return convert.entry(reply.entry, revision=reply.revision)


def delete_entry(collection: str, entry_id: str, *, allow_missing: bool = False, etag: str = "") -> CallPlan[None]:
    """Delete an entry with its feature and crops."""
    request = gallery_pb2.DeleteEntryRequest(
        collection_id=collection, entry_id=entry_id, allow_missing=allow_missing, etag=etag
    )
    yield UnaryCall("gallery.DeleteEntry", request, retry=allow_missing)


def delete_entries(collection: str, where: Where, *, max_deletes: int = 0, dry_run: bool = False) -> CallPlan[int]:
    """Delete the entries that match a filter; returns how many. ``max_deletes`` 0 = no limit; a dry run only counts."""
    request = gallery_pb2.DeleteEntriesRequest(
        collection_id=collection, filter=where.message(), max_deletes=max_deletes, validate_only=dry_run
    )
    count: int = (yield UnaryCall("gallery.DeleteEntries", request, retry=dry_run, batch=True)).matched_count
    return count


def erase_subject(subject_id: str, *, collection: str = "", reason: str = "") -> CallPlan[Erased]:
    """Erase all entries of a person, in one collection or in all of the tenant; the reason is recorded in the audit."""
    request = gallery_pb2.EraseSubjectRequest(collection_id=collection, subject_id=subject_id, reason=reason)
    return convert.erased((yield UnaryCall("gallery.EraseSubject", request, retry=False, batch=True)))


Item = TypeVar("Item")
Result = TypeVar("Result")


class StreamPlan(NamedTuple, Generic[Item, Result]):
    """A bidirectional stream: its method, the request for item ``number``, and a reply's number and result."""

    method: str
    request: Callable[[int, Item], Any]
    outcome: Callable[[Any], tuple[int, Result | ReIDError]]


def embed_stream() -> StreamPlan[bytes, Feature]:
    """Embed a stream of crops."""
    return StreamPlan(
        "embedding.StreamEmbed",
        lambda number, image: embedding_pb2.StreamEmbedRequest(
            request_id=str(number), image=common_pb2.ImageCrop(data=image)
        ),
        lambda reply: (int(reply.request_id), item_result(reply.result, "embedding", convert.feature)),
    )


def search_stream(collection: str) -> StreamPlan[Query, SearchAnswer]:
    """Run a stream of queries on one collection."""
    return StreamPlan(
        "search.StreamSearch",
        lambda number, query: search_pb2.StreamSearchRequest(request_id=str(number), request=query.message(collection)),
        lambda reply: (int(reply.request_id), item_result(reply.result, "response", convert.search_answer)),
    )


def confirm(collection: str, entry_id: str, other_entry_id: str) -> CallPlan[Feedback]:
    """Record that two entries of a collection show the same person.

    Raises:
        FeedbackConflictError: feedback on other pairs contradicts it; the message names them.
    """
    return _add_feedback(collection, entry_id, other_entry_id, gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON)


def reject(collection: str, entry_id: str, other_entry_id: str) -> CallPlan[Feedback]:
    """Record that two entries of a collection show different people; raises as `confirm`."""
    return _add_feedback(collection, entry_id, other_entry_id, gallery_pb2.FEEDBACK_VERDICT_DIFFERENT_PERSON)


def _add_feedback(
    collection: str, one: str, other: str, verdict: gallery_pb2.FeedbackVerdict.ValueType
) -> CallPlan[Feedback]:
    request = gallery_pb2.AddFeedbackRequest(
        collection_id=collection, entry_id=one, other_entry_id=other, verdict=verdict, request_id=str(uuid4())
    )
    return convert.feedback((yield UnaryCall("gallery.AddFeedback", request)).feedback)


def list_feedback(collection: str) -> PagedCall[Feedback]:
    """List the feedback on a collection's entries, in the order in which the pairs were first recorded."""
    call = UnaryCall("gallery.ListFeedback", gallery_pb2.ListFeedbackRequest(collection_id=collection, page_size=1000))
    return PagedCall(call, lambda page: [convert.feedback(one) for one in page.feedback])


def remove_feedback(
    collection: str, entry_id: str, other_entry_id: str, *, allow_missing: bool = False
) -> CallPlan[None]:
    """Delete the feedback on two entries."""
    request = gallery_pb2.RemoveFeedbackRequest(
        collection_id=collection, entry_id=entry_id, other_entry_id=other_entry_id, allow_missing=allow_missing
    )
    yield UnaryCall("gallery.RemoveFeedback", request, retry=allow_missing)


def stream_crops(
    collection: str,
    *,
    where: Where | None = None,
    cursor: str = "",
    since: datetime | None = None,
    timeout_s: float | None = None,
) -> ResumableStream[KeptCrops]:
    """Stream the stored crops of a collection, in order of enrolment, as of the start of the call.

    Args:
        collection: its name.
        where: only of entries that match.
        cursor: of the last reply received, to resume behind it; empty = from the beginning.
        since: only enrolled then or later.
        timeout_s: of one attempt; None = no limit. If the connection is lost, the next attempt resumes the stream.

    Raises:
        CropsMissingError: the collection stores no crops.
    """
    request = gallery_pb2.StreamCropsRequest(
        collection_id=collection, filter=(where or Where()).message(), cursor=cursor
    )
    if since is not None:
        set_time(request.enrolled_since, since, "since")
    return ResumableStream("gallery.StreamCrops", request, convert.kept_crops, timeout_s)
