"""The Python client of a resight server. Needs no torch, faiss or onnxruntime.

    with Client("127.0.0.1:50051") as client:
        client.create_collection("lobby", ttl=timedelta(days=30))
        client.enrol("lobby", NewEntry(jpeg, camera_id="door", subject_id="anna"))
        for hit in client.search("lobby", other_jpeg).hits:
            ...

The server's errors arrive as the classes of `resight.errors`. Calls that can be repeated without
harm are, while the server is overloaded or away; that includes enrolments, which carry a request id.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resight import answers
from resight.answers import (
    CollectionInfo,
    Entry,
    EntryId,
    Feature,
    GivenFeature,
    NewEntry,
    Query,
    SearchAnswer,
    SearchHit,
    ServerInfo,
    Source,
    Where,
)
from resight.calls import call, chunks, outcome, pause
from resight.channel import channel_credentials, open_channel
from resight.errors import OverloadedError, ReIDError, UnavailableError
from resight.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    embedding_pb2,
    embedding_pb2_grpc,
    gallery_pb2,
    gallery_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
)

__all__ = [
    "Client",
    "CollectionInfo",
    "Entry",
    "EntryId",
    "GivenFeature",
    "NewEntry",
    "Query",
    "SearchAnswer",
    "SearchHit",
    "ServerInfo",
    "Where",
]

T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:50051"
MESSAGE_BYTES = 64 * 1024 * 1024  # of an answer; the server has its own limit
BATCH_FACTOR = 6  # a batch may take 60 s where a lone item may take 10, as on the server


class Client:
    """A connection to one server; threads may share it. Close it, or use it in a ``with``.

    Args:
        address: ``HOST:PORT``.
        timeout_s: for one call with its retries; batches get six times as much.
        token: what `resight token create` printed, where the server asks for one.
        tls_ca: PEM file of the authorities that sign the server's certificate; None = plaintext.
        tls_cert: PEM file of this client's certificate, where the server asks for one.
        tls_key: PEM file of its private key.

    Raises:
        InputError: a file cannot be read, or the token would travel to another machine in clear.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 10.0,
        token: str | None = None,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self.address, self._timeout_s = address, timeout_s
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC's own 1 s outlasts a restart
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        credentials = channel_credentials(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
        self._channel = open_channel(address, options, credentials, token)
        self._embedding = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)
        self._search = search_pb2_grpc.SearchServiceStub(self._channel)
        self._gallery = gallery_pb2_grpc.GalleryServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls in flight are cancelled."""
        self._channel.close()

    def _call(self, method: Callable[..., T], request: Message, *, retry: bool = True, batch: bool = False) -> T:
        timeout_s = self._timeout_s * (BATCH_FACTOR if batch else 1)
        return call(method, request, address=self.address, timeout_s=timeout_s, retry=retry)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server says that it serves.

        Raises:
            UnavailableError: it did not within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                reply = self._health.Check(health_pb2.HealthCheckRequest(), timeout=min(left_s, 1.0))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not there yet, which is what is waited for
            time.sleep(0.05)
        raise UnavailableError(f"no server became ready at {self.address} within {timeout_s:.0f} s: see its log")

    def info(self) -> ServerInfo:
        """What the server serves and accepts."""
        return answers.server_info(self._call(self._admin.GetServerInfo, admin_pb2.GetServerInfoRequest()))

    def embed(self, image: bytes) -> Feature:
        """Embed one crop, a JPEG, PNG or WebP file: float32 (D,) of unit length."""
        request = embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=image))
        return answers.feature(self._call(self._embedding.Embed, request).embedding)

    def embed_batch(self, images: Sequence[bytes]) -> list[Feature | ReIDError]:
        """Embed crops; the outcomes stand in their order."""
        out: list[Feature | ReIDError] = []
        for part in chunks([common_pb2.ImageCrop(data=image) for image in images]):
            reply = self._call(self._embedding.BatchEmbed, embedding_pb2.BatchEmbedRequest(images=part), batch=True)
            out += [outcome(result, "embedding", answers.feature) for result in reply.results]
        return out

    def create_collection(
        self, name: str, *, ttl: timedelta | None = None, unlimited_retention: bool = False, keep_crops: bool = False
    ) -> CollectionInfo:
        """Make an empty collection for features of the model now served.

        Args:
            name: 1-63 of ``a-z 0-9 -``, a letter first.
            ttl: how long entries live that say nothing else.
            unlimited_retention: must be said where no ``ttl`` is.
            keep_crops: keep the images, to embed them again with another model.
        """
        kept = gallery_pb2.CROP_RETENTION_STORE if keep_crops else gallery_pb2.CROP_RETENTION_NONE
        wanted = gallery_pb2.Collection(collection_id=name, crop_retention=kept)
        if ttl is not None:
            wanted.default_ttl.FromTimedelta(ttl)
        request = gallery_pb2.CreateCollectionRequest(collection=wanted, allow_unlimited_retention=unlimited_retention)
        return answers.collection(self._call(self._gallery.CreateCollection, request, retry=False).collection)

    def collection(self, name: str) -> CollectionInfo:
        """One collection."""
        request = gallery_pb2.GetCollectionRequest(collection_id=name)
        return answers.collection(self._call(self._gallery.GetCollection, request).collection)

    def collections(self) -> Iterator[CollectionInfo]:
        """All collections by name."""
        request = gallery_pb2.ListCollectionsRequest()
        while True:
            reply = self._call(self._gallery.ListCollections, request)
            yield from (answers.collection(collection) for collection in reply.collections)
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    def delete_collection(self, name: str, *, force: bool = False) -> None:
        """Remove a collection; with ``force`` also one that has entries."""
        request = gallery_pb2.DeleteCollectionRequest(collection_id=name, force=force)
        self._call(self._gallery.DeleteCollection, request, retry=False, batch=True)

    def enrol(self, collection: str, entry: NewEntry) -> Entry:
        """Enrol one entry; when this returns, it is on the server's disk."""
        request = entry.message(collection, str(uuid4()))
        return answers.entry(self._call(self._gallery.EnrollEntry, request).entry)

    def enrol_batch(self, collection: str, entries: Sequence[NewEntry]) -> list[Entry | ReIDError]:
        """Enrol entries; the outcomes stand in their order. Those the server had no room for are sent again."""
        messages = [entry.message("", str(uuid4())) for entry in entries]
        out: list[Entry | ReIDError] = []
        for part in chunks(messages):
            deadline = time.monotonic() + self._timeout_s * BATCH_FACTOR
            done = self._enrol_part(collection, part)
            for number in itertools.count():
                refused = [(at, error) for at, error in enumerate(done) if isinstance(error, OverloadedError)]
                pause_s = max((pause(error, number) or 0.0 for _, error in refused), default=0.0)
                if not refused or time.monotonic() + pause_s >= deadline:
                    break
                time.sleep(pause_s)
                again = self._enrol_part(collection, [part[at] for at, _ in refused])
                for (at, _), result in zip(refused, again, strict=True):
                    done[at] = result
            out += done
        return out

    def _enrol_part(self, collection: str, part: Sequence[gallery_pb2.EnrollEntryRequest]) -> list[Entry | ReIDError]:
        request = gallery_pb2.BatchEnrollEntriesRequest(collection_id=collection, requests=part)
        reply = self._call(self._gallery.BatchEnrollEntries, request, batch=True)
        return [outcome(result, "entry", answers.entry) for result in reply.results]

    def search(
        self,
        collection: str,
        source: Source | EntryId,
        *,
        top_k: int | None = None,
        where: Where | None = None,
        min_similarity: float | None = None,
        with_features: bool = False,
    ) -> SearchAnswer:
        """The entries nearest to a crop, to several of one person, to a feature or to an entry."""
        query = Query(source, top_k, where or Where(), min_similarity, with_features)
        return answers.search_answer(self._call(self._search.Search, query.message(collection)))

    def search_batch(self, collection: str, queries: Sequence[Query]) -> list[SearchAnswer | ReIDError]:
        """Search one collection for many queries; the outcomes stand in their order."""
        out: list[SearchAnswer | ReIDError] = []
        for part in chunks([query.message(collection) for query in queries]):
            reply = self._call(self._search.BatchSearch, search_pb2.BatchSearchRequest(requests=part), batch=True)
            out += [outcome(result, "response", answers.search_answer) for result in reply.results]
        return out

    def get_entry(self, collection: str, entry_id: str) -> Entry:
        """One entry."""
        request = gallery_pb2.GetEntryRequest(collection_id=collection, entry_id=entry_id)
        return answers.entry(self._call(self._gallery.GetEntry, request).entry)

    def get_feature(self, collection: str, entry_id: str) -> GivenFeature:
        """The stored feature of an entry."""
        request = gallery_pb2.GetEntryRequest(collection_id=collection, entry_id=entry_id, include_embedding=True)
        found = self._call(self._gallery.GetEntry, request).embedding
        return GivenFeature(answers.feature(found), found.space_id)

    def entries(self, collection: str, *, where: Where | None = None, page_size: int = 1000) -> Iterator[Entry]:
        """The entries of a collection in order of enrolment, fetched page by page."""
        request = gallery_pb2.ListEntriesRequest(
            collection_id=collection, filter=(where or Where()).message(), page_size=page_size
        )
        while True:
            reply = self._call(self._gallery.ListEntries, request)
            yield from (answers.entry(entry) for entry in reply.entries)
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    def delete_entry(self, collection: str, entry_id: str, *, allow_missing: bool = False) -> None:
        """Remove an entry with its feature and crops."""
        request = gallery_pb2.DeleteEntryRequest(
            collection_id=collection, entry_id=entry_id, allow_missing=allow_missing
        )
        self._call(self._gallery.DeleteEntry, request, retry=allow_missing)

    def delete_entries(self, collection: str, where: Where, *, max_deletes: int = 0, dry_run: bool = False) -> int:
        """Remove what passes a filter; returns how many. ``max_deletes`` 0 = no cap; a dry run only counts."""
        request = gallery_pb2.DeleteEntriesRequest(
            collection_id=collection, filter=where.message(), max_deletes=max_deletes, validate_only=dry_run
        )
        return self._call(self._gallery.DeleteEntries, request, retry=dry_run, batch=True).matched_count
