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

from resight.arrays import Feature
from resight.client import admin_methods, methods
from resight.client.client import DEFAULT_ADDRESS
from resight.client.requests import Query
from resight.client.responses import SearchAnswer
from resight.client.transport import (
    BATCH_TIMEOUT_FACTOR,
    CHANNEL_OPTIONS,
    Attempt,
    CallPlan,
    PagedCall,
    ResumableStream,
    Sleep,
    Stubs,
    UnaryCall,
    attempts,
    bearer,
    channel_credentials,
    check_token,
    to_error,
)
from resight.errors import ReIDError, UnavailableError

P = ParamSpec("P")
T = TypeVar("T")


def _method(road: Callable[P, CallPlan[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """A method that walks a road."""

    @wraps(road)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._walk(road(*args, **kwargs))

    return method


def _paged(listing: Callable[P, PagedCall[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
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


def _resumable(begin: Callable[P, ResumableStream[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
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
                pause_s = stream.pause(to_error(failure, self.address))
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
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
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

    async def _walk(self, road: CallPlan[T]) -> T:
        told: Any = None
        while True:
            try:
                step = road.send(told)
            except StopIteration as end:
                found: T = end.value
                return found
            told = await (asyncio.sleep(step.seconds) if isinstance(step, Sleep) else self._reply(step))

    async def _reply(self, ask: UnaryCall) -> Any:
        method, told = self._stubs.method(ask.method), None
        trying = attempts(self._timeout_s * (BATCH_TIMEOUT_FACTOR if ask.batch else 1), retry=ask.retry)
        while True:
            try:
                step = trying.send(told)
            except StopIteration as end:
                return end.value
            told = await (asyncio.sleep(step.seconds) if isinstance(step, Sleep) else self._told(method, ask, step))

    async def _told(self, method: Any, ask: UnaryCall, step: Attempt) -> Any:
        try:
            return await method(ask.request, timeout=step.timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            return to_error(failure, self.address)

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
        return self._stream(methods.embed_stream(), images, timeout_s)

    def stream_search(
        self, collection: str, queries: Iterable[Query] | AsyncIterable[Query], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, SearchAnswer | ReIDError]]:
        """Search as queries come: (number of the query, outcome), as they are ready. No time limit by default."""
        return self._stream(methods.search_stream(collection), queries, timeout_s)

    async def _stream(
        self,
        stream: methods.StreamPlan[methods.Item, T],
        items: Iterable[methods.Item] | AsyncIterable[methods.Item],
        timeout_s: float | None,
    ) -> AsyncIterator[tuple[int, T | ReIDError]]:
        sent = _numbered(stream, items)
        call = self._stubs.method(stream.method)(sent, timeout=timeout_s, metadata=self._metadata)
        try:
            async for reply in call:
                yield stream.outcome(reply)
        except grpc.RpcError as failure:
            raise to_error(failure, self.address) from None
        finally:
            call.cancel()

    info = _method(methods.info)
    embed = _method(methods.embed)
    embed_batch = _method(methods.embed_batch)
    create_collection = _method(methods.create_collection)
    collection = _method(methods.collection)
    collections = _paged(methods.collections)
    update_collection = _method(methods.update_collection)
    delete_collection = _method(methods.delete_collection)
    enrol = _method(methods.enrol)
    enrol_batch = _method(methods.enrol_batch)
    search = _method(methods.search)
    search_batch = _method(methods.search_batch)
    verify = _method(methods.verify)
    get_entry = _method(methods.get_entry)
    get_feature = _method(methods.get_feature)
    entries = _paged(methods.entries)
    update_entry = _method(methods.update_entry)
    delete_entry = _method(methods.delete_entry)
    delete_entries = _method(methods.delete_entries)
    erase_subject = _method(methods.erase_subject)
    confirm = _method(methods.confirm)
    reject = _method(methods.reject)
    list_feedback = _paged(methods.list_feedback)
    stream_crops = _resumable(methods.stream_crops)
    remove_feedback = _method(methods.remove_feedback)
    stats = _method(admin_methods.stats)
    search_figures = _method(admin_methods.search_figures)
    rebuild_index = _method(admin_methods.rebuild_index)
    create_snapshot = _method(admin_methods.create_snapshot)
    audit_events = _paged(admin_methods.audit_events)
    operation = _method(admin_methods.operation)
    operations = _paged(admin_methods.operations)
    cancel_operation = _method(admin_methods.cancel_operation)
    start_adaptation = _method(admin_methods.start_adaptation)
    pending_adaptations = _paged(admin_methods.pending_adaptations)
    report_adaptation = _method(admin_methods.report_adaptation)
    wait = _method(admin_methods.wait)
    models = _paged(admin_methods.models)
    model = _method(admin_methods.model)
    load_model = _method(admin_methods.load_model)
    unload_model = _method(admin_methods.unload_model)
    activate_model = _method(admin_methods.activate_model)
    migrate = _method(admin_methods.migrate)
    activate_space = _method(admin_methods.activate_space)
    start_shadow = _method(admin_methods.start_shadow)
    get_shadow = _method(admin_methods.get_shadow)
    stop_shadow = _method(admin_methods.stop_shadow)


async def _numbered(
    stream: methods.StreamPlan[methods.Item, T], items: Iterable[methods.Item] | AsyncIterable[methods.Item]
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
