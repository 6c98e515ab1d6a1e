"""The client of `resight.client` for programs with an event loop: the same methods, to await.

async with AsyncClient("127.0.0.1:50051") as client:
    answer = await client.search("lobby", jpeg, group_by="subject")
    async for entry in client.entries("lobby"):
        ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resight import asks, asks_lessons, asks_models, asks_operator, streams
from resight.answers import SearchAnswer
from resight.calls import BATCH_FACTOR, OPTIONS, Ask, Listing, Pause, Resuming, Road, Stubs, Try, translated, tries
from resight.channel import bearer, channel_credentials, check_token
from resight.client import DEFAULT_ADDRESS
from resight.errors import ReIDError, UnavailableError
from resight.questions import Feature, Query

P = ParamSpec("P")
T = TypeVar("T")


def does(road: Callable[P, Road[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """A method that walks a road."""

    @wraps(road)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._walk(road(*args, **kwargs))

    return method


def lists(listing: Callable[P, Listing[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    """A method that goes through a listing, asking for a page when it is needed."""

    @wraps(listing)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        found = listing(*args, **kwargs)
        while True:
            page = await self._reply(found.ask)
            for item in found.items(page):
                yield item
            if not page.next_page_token:
                return
            found.ask.request.page_token = page.next_page_token

    return method


def resumes(begin: Callable[P, Resuming[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    """A method that takes a stream of answers and, when the server went away, goes on behind the last one."""

    @wraps(begin)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        stream = begin(*args, **kwargs)
        streaming = self._stubs.method(stream.method)
        while True:
            call = streaming(stream.request, timeout=stream.timeout_s, metadata=self._metadata)
            try:
                async for reply in call:
                    yield stream.took(reply)
                return
            except grpc.RpcError as failure:
                pause_s = stream.pause(translated(failure, self.address))
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    return method


class AsyncClient:
    """A connection to one server, used in one event loop. Close it, or use it in an ``async with``.

    Takes what `resight.client.Client` takes, and raises the same.
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
        check_token(address, token, secure=credentials is not None)
        self._metadata = () if token is None else (bearer(token),)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        self._stubs = Stubs(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; calls in flight are cancelled."""
        await self._channel.close(None)

    async def _walk(self, road: Road[T]) -> T:
        told: Any = None
        while True:
            try:
                step = road.send(told)
            except StopIteration as end:
                found: T = end.value
                return found
            told = await (asyncio.sleep(step.seconds) if isinstance(step, Pause) else self._reply(step))

    async def _reply(self, ask: Ask) -> Any:
        method, told = self._stubs.method(ask.method), None
        trying = tries(self._timeout_s * (BATCH_FACTOR if ask.batch else 1), retry=ask.retry)
        while True:
            try:
                step = trying.send(told)
            except StopIteration as end:
                return end.value
            told = await (asyncio.sleep(step.seconds) if isinstance(step, Pause) else self._told(method, ask, step))

    async def _told(self, method: Any, ask: Ask, step: Try) -> Any:
        try:
            return await method(ask.request, timeout=step.timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            return translated(failure, self.address)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the server says that it serves.

        Raises:
            UnavailableError: it did not within ``timeout_s``.
        """
        check: Any = health_pb2_grpc.HealthStub(self._channel).Check
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                reply = await check(health_pb2.HealthCheckRequest(), timeout=min(left_s, 1.0))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not there yet, which is what is waited for
            await asyncio.sleep(0.05)
        raise UnavailableError(f"no server became ready at {self.address} within {timeout_s:.0f} s: see its log")

    def stream_embed(
        self, images: Iterable[bytes] | AsyncIterable[bytes], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, Feature | ReIDError]]:
        """Embed crops as they come: (number of the crop, outcome), as they are ready. No time limit by default."""
        return self._stream(streams.embedding(), images, timeout_s)

    def stream_search(
        self, collection: str, queries: Iterable[Query] | AsyncIterable[Query], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, SearchAnswer | ReIDError]]:
        """Search as queries come: (number of the query, outcome), as they are ready. No time limit by default."""
        return self._stream(streams.searching(collection), queries, timeout_s)

    async def _stream(
        self,
        stream: streams.Stream[streams.Item, T],
        items: Iterable[streams.Item] | AsyncIterable[streams.Item],
        timeout_s: float | None,
    ) -> AsyncIterator[tuple[int, T | ReIDError]]:
        sent = _numbered(stream, items)
        call = self._stubs.method(stream.method)(sent, timeout=timeout_s, metadata=self._metadata)
        try:
            async for reply in call:
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


async def _numbered(
    stream: streams.Stream[streams.Item, T], items: Iterable[streams.Item] | AsyncIterable[streams.Item]
) -> AsyncIterator[Any]:
    """The requests of a stream."""
    number = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield stream.request(number, item)
            number += 1
        return
    for number, item in enumerate(items):
        yield stream.request(number, item)
