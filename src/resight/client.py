"""The Python client of a resight server. Needs no torch, faiss or onnxruntime.

    with Client("127.0.0.1:50051") as client:
        client.create_collection("lobby", ttl=timedelta(days=30))
        client.enrol("lobby", NewEntry(jpeg, camera_id="door", subject_id="anna"))
        for hit in client.search("lobby", other_jpeg).hits:
            ...

The server's errors arrive as the classes of `resight.errors`. Calls that can be repeated without
harm are, while the server is overloaded or away; that includes enrolments, which carry a request id.
`resight.client_async` has the same methods to await.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resight import asks, asks_lessons, asks_models, asks_operator, streams
from resight.answers import (
    AuditRow,
    CollectionInfo,
    CollectionStats,
    Comparison,
    Entry,
    Erased,
    Feedback,
    KeptCrops,
    ModelInfo,
    OperationInfo,
    SearchAnswer,
    SearchHit,
    ServerInfo,
)
from resight.answers_figures import SearchFigures, Shadow
from resight.calls import BATCH_FACTOR, OPTIONS, Ask, Listing, Pause, Resuming, Road, Stubs, Try, translated, tries
from resight.channel import channel_credentials, open_channel
from resight.errors import ReIDError, UnavailableError
from resight.questions import CollectionChange, EntryId, Feature, GivenFeature, NewEntry, Query, Rerank, Where

__all__ = [
    "AuditRow",
    "Client",
    "CollectionChange",
    "CollectionInfo",
    "CollectionStats",
    "Comparison",
    "Entry",
    "EntryId",
    "Erased",
    "Feedback",
    "GivenFeature",
    "KeptCrops",
    "ModelInfo",
    "NewEntry",
    "OperationInfo",
    "Query",
    "Rerank",
    "SearchAnswer",
    "SearchFigures",
    "SearchHit",
    "ServerInfo",
    "Shadow",
    "Where",
]

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:50051"


def does(road: Callable[P, Road[T]]) -> Callable[Concatenate[Client, P], T]:
    """A method that walks a road."""

    @wraps(road)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._walk(road(*args, **kwargs))

    return method


def lists(listing: Callable[P, Listing[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """A method that goes through a listing, asking for a page when it is needed."""

    @wraps(listing)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        found = listing(*args, **kwargs)
        while True:
            page = self._reply(found.ask)
            yield from found.items(page)
            if not page.next_page_token:
                return
            found.ask.request.page_token = page.next_page_token

    return method


def resumes(begin: Callable[P, Resuming[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """A method that takes a stream of answers and, when the server went away, goes on behind the last one."""

    @wraps(begin)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        stream = begin(*args, **kwargs)
        while True:
            call = self._stubs.method(stream.method)(stream.request, timeout=stream.timeout_s)
            try:
                for reply in call:
                    yield stream.took(reply)
                return
            except grpc.RpcError as failure:
                pause_s = stream.pause(translated(failure, self.address))
            finally:
                call.cancel()
            time.sleep(pause_s)

    return method


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
        credentials = channel_credentials(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
        self._channel = open_channel(address, OPTIONS, credentials, token)
        self._stubs = Stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls in flight are cancelled."""
        self._channel.close()

    def _walk(self, road: Road[T]) -> T:
        told: Any = None
        while True:
            try:
                step = road.send(told)
            except StopIteration as end:
                found: T = end.value
                return found
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                told = None
            else:
                told = self._reply(step)

    def _reply(self, ask: Ask) -> Any:
        method, told = self._stubs.method(ask.method), None
        trying = tries(self._timeout_s * (BATCH_FACTOR if ask.batch else 1), retry=ask.retry)
        while True:
            try:
                step = trying.send(told)
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                told = None
            else:
                told = self._told(method, ask, step)

    def _told(self, method: Any, ask: Ask, step: Try) -> Any:
        try:
            return method(ask.request, timeout=step.timeout_s)
        except grpc.RpcError as failure:
            return translated(failure, self.address)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server says that it serves.

        Raises:
            UnavailableError: it did not within ``timeout_s``.
        """
        health, deadline = health_pb2_grpc.HealthStub(self._channel), time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=min(left_s, 1.0))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not there yet, which is what is waited for
            time.sleep(0.05)
        raise UnavailableError(f"no server became ready at {self.address} within {timeout_s:.0f} s: see its log")

    def stream_embed(
        self, images: Iterable[bytes], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, Feature | ReIDError]]:
        """Embed crops as they come: (number of the crop, outcome), as they are ready. No time limit by default."""
        return self._stream(streams.embedding(), images, timeout_s)

    def stream_search(
        self, collection: str, queries: Iterable[Query], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, SearchAnswer | ReIDError]]:
        """Search as queries come: (number of the query, outcome), as they are ready. No time limit by default."""
        return self._stream(streams.searching(collection), queries, timeout_s)

    def _stream(
        self, stream: streams.Stream[streams.Item, T], items: Iterable[streams.Item], timeout_s: float | None
    ) -> Iterator[tuple[int, T | ReIDError]]:
        sent = (stream.request(number, item) for number, item in enumerate(items))
        call = self._stubs.method(stream.method)(sent, timeout=timeout_s)
        try:
            for reply in call:
                yield stream.outcome(reply)
        except grpc.RpcError as failure:
            raise translated(failure, self.address) from None
        finally:
            call.cancel()

    info = does(asks.info)
    embed = does(asks.embed)
    embed_batch = does(asks.embed_batch)
    create_collection = does(asks.create_collection)
    collection = does(asks.collection)
    collections = lists(asks.collections)
    update_collection = does(asks.update_collection)
    delete_collection = does(asks.delete_collection)
    enrol = does(asks.enrol)
    enrol_batch = does(asks.enrol_batch)
    search = does(asks.search)
    search_batch = does(asks.search_batch)
    verify = does(asks.verify)
    get_entry = does(asks.get_entry)
    get_feature = does(asks.get_feature)
    entries = lists(asks.entries)
    update_entry = does(asks.update_entry)
    delete_entry = does(asks.delete_entry)
    delete_entries = does(asks.delete_entries)
    erase_subject = does(asks.erase_subject)
    confirm = does(asks_lessons.confirm)
    reject = does(asks_lessons.reject)
    list_feedback = lists(asks_lessons.list_feedback)
    stream_crops = resumes(asks_lessons.stream_crops)
    remove_feedback = does(asks_lessons.remove_feedback)
    stats = does(asks_operator.stats)
    search_figures = does(asks_operator.search_figures)
    rebuild_index = does(asks_operator.rebuild_index)
    create_snapshot = does(asks_operator.create_snapshot)
    audit_events = lists(asks_operator.audit_events)
    operation = does(asks_operator.operation)
    operations = lists(asks_operator.operations)
    cancel_operation = does(asks_operator.cancel_operation)
    start_adaptation = does(asks_operator.start_adaptation)
    pending_adaptations = lists(asks_operator.pending_adaptations)
    report_adaptation = does(asks_operator.report_adaptation)
    wait = does(asks_operator.wait)
    models = lists(asks_models.models)
    model = does(asks_models.model)
    load_model = does(asks_models.load_model)
    unload_model = does(asks_models.unload_model)
    activate_model = does(asks_models.activate_model)
    migrate = does(asks_models.migrate)
    activate_space = does(asks_models.activate_space)
    start_shadow = does(asks_models.start_shadow)
    get_shadow = does(asks_models.get_shadow)
    stop_shadow = does(asks_models.stop_shadow)
