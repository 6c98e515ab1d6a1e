"""The parts that the sync and the async client share: call plans, retries, error conversion, TLS and tokens.

A call plan is a generator that yields the calls and pauses of one client method and receives their results. It does no
I/O itself: `resight.client.client.Client` runs it blocking, `resight.client.async_client.AsyncClient` with ``await``.
Retries are made here and not by gRPC's ``retryPolicy``, which does not read the server's ``RetryInfo`` and cannot
repeat only the refused items of a batch.
"""

from __future__ import annotations

import ipaddress
import itertools
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from resight.errors import InputError, LimitError, OverloadedError, ReIDError, UnavailableError
from resight.status import from_status
from resight.v1 import (
    admin_pb2_grpc,
    embedding_pb2_grpc,
    gallery_pb2_grpc,
    model_pb2_grpc,
    operation_pb2_grpc,
    search_pb2_grpc,
)

T = TypeVar("T")
M = TypeVar("M", bound=Message)

MAX_ATTEMPTS = 5  # if the server is unavailable; an overloaded server is retried until the timeout
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 0.8  # doubled at each attempt: 1.5 s in total, the time of a server's restart
MAX_BATCH_ITEMS = 64  # the server's default limit on a batch
MAX_BATCH_BYTES = 7 * 1024 * 1024  # of the server's 8 MiB, leaving room for the other fields
BATCH_TIMEOUT_FACTOR = 6  # 60 s for a batch instead of 10 s for one item, as on the server
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of a reply; the server has its own limit
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC's own 1 s outlasts a restart
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Stubs:
    """The stubs of all services on a channel, blocking or asyncio."""

    def __init__(self, channel: Any) -> None:
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        self.search = search_pb2_grpc.SearchServiceStub(channel)
        self.gallery = gallery_pb2_grpc.GalleryServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.operations = operation_pb2_grpc.OperationServiceStub(channel)

    def method(self, name: str) -> Any:
        """The stub's method for a service and method name such as ``search.Search``."""
        return attrgetter(name)(self)


@dataclass
class UnaryCall:
    """A unary call of a plan; the plan receives its reply.

    Attributes:
        method: name for `Stubs.method`.
        retry: retry with jitter while the server is overloaded or unavailable, not before the time it states.
        batch: use the longer timeout of batches.
    """

    method: str
    request: Any
    retry: bool = True
    batch: bool = False


@dataclass
class Sleep:
    """A pause of a plan."""

    seconds: float


CallPlan = Generator[UnaryCall | Sleep, Any, T]


@dataclass
class PagedCall(Generic[T]):
    """A paged list: the call for a page, and the function that converts a page's items."""

    call: UnaryCall
    items: Callable[[Any], list[T]]


@dataclass
class ResumableStream(Generic[T]):
    """A server stream whose replies carry a ``cursor``, so that it can be resumed after a lost connection.

    Attributes:
        method: name for `Stubs.method`.
        request: its ``cursor`` is the position to resume behind.
        make: converts a reply to an item.
        timeout_s: of one attempt; None = no limit.
        failures: failed attempts since the last reply.
    """

    method: str
    request: Any
    make: Callable[[Any], T]
    timeout_s: float | None = None
    failures: int = 0

    def advance(self, reply: Any) -> T:
        """Move the cursor behind a reply; returns its item."""
        self.request.cursor, self.failures = reply.cursor, 0
        return self.make(reply)

    def pause(self, error: ReIDError) -> float:
        """Seconds to wait before the next attempt; raises the error if it cannot be retried."""
        pause_s = backoff_s(error, self.failures)
        if pause_s is None:
            raise error
        self.failures += 1
        return pause_s


@dataclass
class Attempt:
    """One attempt of a call; its reply, or its error as a `ReIDError`, is sent back."""

    timeout_s: float


def attempts(timeout_s: float, *, retry: bool) -> Generator[Attempt | Sleep, Any, Any]:
    """The attempts of one call within a total timeout; returns the reply.

    Raises:
        ReIDError: the server's error; `UnavailableError` and `DeadlineError` also from gRPC itself.
    """
    deadline = time.monotonic() + timeout_s
    for number in itertools.count():
        reply = yield Attempt(max(0.0, deadline - time.monotonic()))
        if not isinstance(reply, ReIDError):
            return reply
        pause_s = backoff_s(reply, number)
        if not retry or pause_s is None or time.monotonic() + pause_s >= deadline:
            raise reply
        yield Sleep(pause_s)
    raise AssertionError("unreachable")


def backoff_s(error: ReIDError, number: int) -> float | None:
    """Seconds to wait after failure ``number`` (from 0): the server's ``retry_after_s``, if any, plus jitter.

    None = the error cannot be retried.
    """
    jitter_s = random.uniform(0.5, 1.0) * min(MIN_BACKOFF_S * 2.0**number, MAX_BACKOFF_S)
    if isinstance(error, OverloadedError):
        return error.retry_after_s + jitter_s
    return jitter_s if isinstance(error, UnavailableError) and number < MAX_ATTEMPTS - 1 else None


def to_error(failure: Any, address: str) -> ReIDError:
    """Convert an error of a blocking or asyncio gRPC call."""
    try:
        status = rpc_status.from_call(failure)
    except ValueError:  # details that contradict the status: a proxy wrote one of them
        status = None
    if status is not None:
        return from_status(status)
    text = failure.details() or failure.code().name
    if failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return LimitError(f"the message is larger than the server accepts ({text}): send or request less at once")
    error = from_status(status_pb2.Status(code=failure.code().value[0], message=text))
    if isinstance(error, UnavailableError):
        return UnavailableError(f"no server answers at {address} ({text}): start one with `resight serve`")
    return error


def split_batches(messages: Sequence[M]) -> Iterator[Sequence[M]]:
    """Split messages into parts that each fit into one request, by number and by bytes."""
    start, size = 0, 0
    for number, message in enumerate(messages):
        own = message.ByteSize()
        if number > start and (number - start == MAX_BATCH_ITEMS or size + own > MAX_BATCH_BYTES):
            yield messages[start:number]
            start, size = number, 0
        size += own
    if start < len(messages):
        yield messages[start:]


def item_result(result: Any, good: str, make: Callable[[Any], T]) -> T | ReIDError:
    """Convert one result of a batch: the value of its field ``good``, or the server's error."""
    if result.WhichOneof("outcome") == good:
        return make(getattr(result, good))
    return from_status(result.error)


AUTHORIZATION_HEADER = "authorization"


def channel_credentials(
    *, tls_ca: Path | None = None, tls_cert: Path | None = None, tls_key: Path | None = None
) -> grpc.ChannelCredentials | None:
    """Credentials of a TLS channel; None (plaintext) if no file is given.

    Args:
        tls_ca: PEM file of the authorities that sign the server's certificate.
        tls_cert: PEM file of this client's certificate with its chain, if the server requires one.
        tls_key: PEM file of the certificate's private key.

    Raises:
        InputError: a file cannot be read, or a required one is missing.
    """
    if (tls_cert is None) != (tls_key is None):
        raise InputError("a client's certificate and its key are used together: give both or none")
    if tls_ca is None:
        if tls_cert is not None:
            raise InputError("a client's certificate needs TLS: give tls_ca, the authorities that sign the server's")
        return None
    return grpc.ssl_channel_credentials(
        _read_pem(tls_ca),
        None if tls_key is None else _read_pem(tls_key),
        None if tls_cert is None else _read_pem(tls_cert),
    )


def check_token(address: str, token: str | None, *, secure: bool) -> None:
    """Reject a token that cannot be sent, or would be sent to another machine in plaintext.

    Raises:
        InputError: it is not printable ASCII without spaces, or there is no TLS and the address is not loopback.
    """
    if token is None:
        return
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("a token is printable ASCII without spaces, as printed by `resight token create`")
    if not secure and not _is_loopback(address):
        raise InputError(
            f"the token would be sent to {address} in plaintext: give tls_ca (RESIGHT_TLS_CA), the PEM file of the "
            "authorities that sign the server's certificate"
        )


def open_channel(
    address: str, options: Sequence[tuple[str, Any]], credentials: grpc.ChannelCredentials | None, token: str | None
) -> grpc.Channel:
    """Open a channel whose calls carry the token.

    Raises:
        InputError: see `check_token`.
    """
    check_token(address, token, secure=credentials is not None)
    if credentials is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, credentials, options=options)
    return channel if token is None else grpc.intercept_channel(channel, Bearer(token))


def bearer(token: str) -> tuple[str, str]:
    """The call metadata that carries a token."""
    return AUTHORIZATION_HEADER, f"Bearer {token}"


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs only
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Adds the token to every call, unary or streaming."""

    def __init__(self, token: str) -> None:
        self._header = bearer(token)

    def _add_header(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), self._header)
        return continuation(
            _Details(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary: Any = _add_header
    intercept_unary_stream: Any = _add_header
    intercept_stream_unary: Any = _add_header
    intercept_stream_stream: Any = _add_header


def _is_loopback(address: str) -> bool:
    """Whether an address is on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_pem(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: name a PEM file") from error
