"""The blocking client; `resight.client` documents it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resight.arrays import Feature
from resight.client import admin_methods, methods
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
    channel_credentials,
    open_channel,
    to_error,
)
from resight.errors import ReIDError, UnavailableError

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:50051"


def _method(plan: Callable[P, CallPlan[T]]) -> Callable[Concatenate[Client, P], T]:
    """Make a client method from a function that returns a call plan."""

    @wraps(plan)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(plan(*args, **kwargs))

    return method


def _paged(plan: Callable[P, PagedCall[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """Make a client method from a paged call: it iterates over the items and requests each page when it is needed."""

    @wraps(plan)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        pages = plan(*args, **kwargs)
        while True:
            page = self._call(pages.call)
            yield from pages.items(page)
            if not page.next_page_token:
                return
            pages.call.request.page_token = page.next_page_token

    return method


def _resumable(plan: Callable[P, ResumableStream[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    """Make a client method from a resumable stream: after a lost connection it resumes behind the last reply."""

    @wraps(plan)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        stream = plan(*args, **kwargs)
        while True:
            call = self._stubs.method(stream.method)(stream.request, timeout=stream.timeout_s)
            try:
                for reply in call:
                    yield stream.advance(reply)
                return
            except grpc.RpcError as failure:
                pause_s = stream.pause(to_error(failure, self.address))
            finally:
                call.cancel()
            time.sleep(pause_s)

    return method


class Client:
    """A connection to one server; threads may share it. Close it, or use it in a ``with``.

    Args:
        address: ``HOST:PORT``.
        timeout_s: for one call including its retries; batch calls get six times as long.
        token: as printed by `resight token create`, if the server requires one.
        tls_ca: PEM file of the authorities that sign the server's certificate; None = plaintext.
        tls_cert: PEM file of this client's certificate, if the server requires one.
        tls_key: PEM file of the certificate's private key.

    Raises:
        InputError: a file cannot be read, or the token would be sent to another machine in plaintext.
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
        self._channel = open_channel(address, CHANNEL_OPTIONS, credentials, token)
        self._stubs = Stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def _run(self, plan: CallPlan[T]) -> T:
        result: Any = None
        while True:
            try:
                step = plan.send(result)
            except StopIteration as end:
                value: T = end.value
                return value
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                result = None
            else:
                result = self._call(step)

    def _call(self, call: UnaryCall) -> Any:
        method, outcome = self._stubs.method(call.method), None
        plan = attempts(self._timeout_s * (BATCH_TIMEOUT_FACTOR if call.batch else 1), retry=call.retry)
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._attempt(method, call, step)

    def _attempt(self, method: Any, call: UnaryCall, attempt: Attempt) -> Any:
        try:
            return method(call.request, timeout=attempt.timeout_s)
        except grpc.RpcError as failure:
            return to_error(failure, self.address)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server reports that it is serving.

        Raises:
            UnavailableError: it is not within ``timeout_s``.
        """
        health, deadline = health_pb2_grpc.HealthStub(self._channel), time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=min(left_s, 1.0))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not ready yet
            time.sleep(0.05)
        raise UnavailableError(f"no server became ready at {self.address} within {timeout_s:.0f} s: see its log")

    def stream_embed(
        self, images: Iterable[bytes], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, Feature | ReIDError]]:
        """Embed a stream of crops; yields (number of the crop, result) as each is ready. No time limit by default."""
        return self._stream(methods.embed_stream(), images, timeout_s)

    def stream_search(
        self, collection: str, queries: Iterable[Query], *, timeout_s: float | None = None
    ) -> Iterator[tuple[int, SearchAnswer | ReIDError]]:
        """Run a stream of queries; yields (number of the query, result) as each is ready. No time limit by default."""
        return self._stream(methods.search_stream(collection), queries, timeout_s)

    def _stream(
        self, stream: methods.StreamPlan[methods.Item, T], items: Iterable[methods.Item], timeout_s: float | None
    ) -> Iterator[tuple[int, T | ReIDError]]:
        sent = (stream.request(number, item) for number, item in enumerate(items))
        call = self._stubs.method(stream.method)(sent, timeout=timeout_s)
        try:
            for reply in call:
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
