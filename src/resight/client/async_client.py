"""The asyncio client: the methods of `resight.client.Client` as coroutines and asynchronous iterators.

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


def _method(plan: Callable[P, CallPlan[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """Make a client method from a function that returns a call plan."""

    @wraps(plan)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(plan(*args, **kwargs))

    return method


def _paged(plan: Callable[P, PagedCall[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    """Make a client method from a paged call: it iterates over the items and requests each page when it is needed."""

    @wraps(plan)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        pages = plan(*args, **kwargs)
        while True:
            page = await self._call(pages.call)
            for item in pages.items(page):
                yield item
            if not page.next_page_token:
                return
            pages.call.request.page_token = page.next_page_token

    return method


def _resumable(plan: Callable[P, ResumableStream[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    """Make a client method from a resumable stream: after a lost connection it resumes behind the last reply."""

    @wraps(plan)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        stream = plan(*args, **kwargs)
        streaming = self._stubs.method(stream.method)
        while True:
            call = streaming(stream.request, timeout=stream.timeout_s, metadata=self._metadata)
            try:
                async for reply in call:
                    yield stream.advance(reply)
                return
            except grpc.RpcError as failure:
                pause_s = stream.pause(to_error(failure, self.address))
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    return method


class AsyncClient:
    """A connection to one server, used in one event loop. Close it, or use it in an ``async with``.

    Takes the same arguments as `resight.client.Client` and raises the same errors.
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
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close(None)

    async def _run(self, plan: CallPlan[T]) -> T:
        result: Any = None
        while True:
            try:
                step = plan.send(result)
            except StopIteration as end:
                value: T = end.value
                return value
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                result = None
            else:
                result = await self._call(step)

    async def _call(self, call: UnaryCall) -> Any:
        method, outcome = self._stubs.method(call.method), None
        plan = attempts(self._timeout_s * (BATCH_TIMEOUT_FACTOR if call.batch else 1), retry=call.retry)
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._attempt(method, call, step)

    async def _attempt(self, method: Any, call: UnaryCall, attempt: Attempt) -> Any:
        try:
            return await method(call.request, timeout=attempt.timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            return to_error(failure, self.address)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server reports that it is serving.

        Raises:
            UnavailableError: it is not within ``timeout_s``.
        """
        check: Any = health_pb2_grpc.HealthStub(self._channel).Check
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                reply = await check(health_pb2.HealthCheckRequest(), timeout=min(left_s, 1.0))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not ready yet
            await asyncio.sleep(0.05)
        raise UnavailableError(f"no server became ready at {self.address} within {timeout_s:.0f} s: see its log")

    def stream_embed(
        self, images: Iterable[bytes] | AsyncIterable[bytes], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, Feature | ReIDError]]:
        """Embed a stream of crops; yields (number of the crop, result) as each is ready. No time limit by default."""
        return self._stream(methods.embed_stream(), images, timeout_s)

    def stream_search(
        self, collection: str, queries: Iterable[Query] | AsyncIterable[Query], *, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, SearchAnswer | ReIDError]]:
        """Run a stream of queries; yields (number of the query, result) as each is ready. No time limit by default."""
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
    embed_crop = _method(methods.embed_crop)
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
    search_statistics = _method(admin_methods.search_statistics)
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
    """The stream's requests, numbered from 0."""
    number = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield stream.request(number, item)
            number += 1
        return
    for number, item in enumerate(items):
        yield stream.request(number, item)
