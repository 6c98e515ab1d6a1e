"""What the sync and the async client share: what a call asks, its tries, and the server's errors as errors of ours.

A road is a generator that says what to do next and is told how it went; it never waits and never touches the network.
`resight.client` and `resight.client.async_client` walk the same roads, one by blocking and one by awaiting.

A client's way to a server: TLS, the client's own certificate, and the token that goes with every call.
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

MAX_ATTEMPTS = 5  # while nobody answers; an overloaded server is asked until the time is up
MIN_BACKOFF_S, MAX_BACKOFF_S = (
    0.1,
    0.8,
)  # doubled at each try: 1.5 s in all for a server that is away, a restart's length
MAX_BATCH_ITEMS = 64  # the server's default limit on a batch
MAX_BATCH_BYTES = 7 * 1024 * 1024  # of the server's 8 MiB, leaving room for what is not image
BATCH_TIMEOUT_FACTOR = 6  # a batch may take 60 s where a lone item may take 10, as on the server
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of an answer; the server has its own limit
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC's own 1 s outlasts a restart
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Stubs:
    """The services of a channel, blocking or not."""

    def __init__(self, channel: Any) -> None:
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        self.search = search_pb2_grpc.SearchServiceStub(channel)
        self.gallery = gallery_pb2_grpc.GalleryServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.operations = operation_pb2_grpc.OperationServiceStub(channel)

    def method(self, name: str) -> Any:
        """A method by service and name, such as ``search.Search``."""
        return attrgetter(name)(self)


@dataclass
class UnaryCall:
    """One call to make: its reply is sent back.

    Attributes:
        method: service and name, as `Stubs.method` takes it.
        retry: try again while the server is overloaded or away, with jitter and not before it says.
        batch: it may take as long as a batch.
    """

    method: str
    request: Any
    retry: bool = True
    batch: bool = False


@dataclass
class Sleep:
    """A wait in seconds."""

    seconds: float


CallPlan = Generator[UnaryCall | Sleep, Any, T]


@dataclass
class PagedCall(Generic[T]):
    """A list that comes page by page: what asks for a page, and what makes of each the items."""

    ask: UnaryCall
    items: Callable[[Any], list[T]]


@dataclass
class ResumableStream(Generic[T]):
    """A stream of answers that each carry a ``cursor``: after a break it goes on behind the last one that was taken.

    Attributes:
        method: service and name, as `Stubs.method` takes it.
        request: has a ``cursor`` too.
        make: of each answer the item.
        timeout_s: of one try; None = as long as it takes.
        failures: tries that failed since an answer was taken.
    """

    method: str
    request: Any
    make: Callable[[Any], T]
    timeout_s: float | None = None
    failures: int = 0

    def took(self, reply: Any) -> T:
        """Note an answer; the item."""
        self.request.cursor, self.failures = reply.cursor, 0
        return self.make(reply)

    def pause(self, error: ReIDError) -> float:
        """How long to wait before the next try, in seconds; raises the error where none would help."""
        pause_s = backoff_s(error, self.failures)
        if pause_s is None:
            raise error
        self.failures += 1
        return pause_s


@dataclass
class Attempt:
    """One try of a call; what came of it, a reply or an error of ours, is sent back."""

    timeout_s: float


def attempts(timeout_s: float, *, retry: bool) -> Generator[Attempt | Sleep, Any, Any]:
    """The tries of one call, within a time for all of them together; returns the reply.

    Raises:
        ReIDError: the leaf the server named; `UnavailableError` and `DeadlineError` also from gRPC itself.
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
    """How long to wait after failure ``number``, from 0: what the server asked for, and jitter, in seconds.

    None = another try would not help.
    """
    jitter_s = random.uniform(0.5, 1.0) * min(MIN_BACKOFF_S * 2.0**number, MAX_BACKOFF_S)
    if isinstance(error, OverloadedError):
        return error.retry_after_s + jitter_s
    return jitter_s if isinstance(error, UnavailableError) and number < MAX_ATTEMPTS - 1 else None


def to_error(failure: Any, address: str) -> ReIDError:
    """The error of ours for one of gRPC's, of a blocking call or not."""
    try:
        status = rpc_status.from_call(failure)
    except ValueError:  # details that contradict the status: a proxy wrote one of them
        status = None
    if status is not None:
        return from_status(status)
    text = failure.details() or failure.code().name
    if failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return LimitError(f"the server takes no message of this size ({text}): send, or ask for, less at once")
    error = from_status(status_pb2.Status(code=failure.code().value[0], message=text))
    if isinstance(error, UnavailableError):
        return UnavailableError(f"no server answers at {address} ({text}): start one with `resight serve`")
    return error


def split_batches(messages: Sequence[M]) -> Iterator[Sequence[M]]:
    """Cut a list so that each part fits in one request, by number and by bytes."""
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
    """One item of a batch: what it became, or the error the server gave it."""
    if result.WhichOneof("outcome") == good:
        return make(getattr(result, good))
    return from_status(result.error)


AUTHORIZATION_HEADER = "authorization"


def channel_credentials(
    *, tls_ca: Path | None = None, tls_cert: Path | None = None, tls_key: Path | None = None
) -> grpc.ChannelCredentials | None:
    """What a secure channel needs; None = plaintext, where no file is given.

    Args:
        tls_ca: PEM authorities that the server's certificate must come from.
        tls_cert: PEM certificate of this client with its chain, for servers that ask for one.
        tls_key: PEM private key of it.

    Raises:
        InputError: a file cannot be read, or one that another needs is missing.
    """
    if (tls_cert is None) != (tls_key is None):
        raise InputError("a client's certificate and its key come together: give both or none")
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
    """Refuse a token that cannot be sent, or would go to another machine in clear.

    Raises:
        InputError: it is not printable ASCII without spaces, or there is no TLS and the address is not on loopback.
    """
    if token is None:
        return
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("a token is one word of printable ASCII, such as `resight token create` prints")
    if not secure and not _is_loopback(address):
        raise InputError(
            f"the token would travel to {address} in clear: give tls_ca (RESIGHT_TLS_CA), the PEM file of the "
            "authorities that sign the server's certificate"
        )


def open_channel(
    address: str, options: Sequence[tuple[str, Any]], credentials: grpc.ChannelCredentials | None, token: str | None
) -> grpc.Channel:
    """A channel whose calls carry the token.

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
    """The metadata of a call that shows a token."""
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
        self._own = bearer(token)

    def _sent(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), self._own)
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

    intercept_unary_unary: Any = _sent
    intercept_unary_stream: Any = _sent
    intercept_stream_unary: Any = _sent
    intercept_stream_stream: Any = _sent


def _is_loopback(address: str) -> bool:
    """Whether an address stays on this machine."""
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
