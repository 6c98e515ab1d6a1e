"""What the sync and the async client share: what a call asks, its tries, and the server's errors as errors of ours.

A road is a generator that says what to do next and is told how it went; it never waits and never touches the network.
`resight.client` and `resight.client_async` walk the same roads, one by blocking and one by awaiting.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from resight.errors import LimitError, OverloadedError, ReIDError, UnavailableError
from resight.reasons import from_status
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

TRIES = 5  # while nobody answers; an overloaded server is asked until the time is up
FIRST_PAUSE_S, LAST_PAUSE_S = (
    0.1,
    0.8,
)  # doubled at each try: 1.5 s in all for a server that is away, a restart's length
MAX_ITEMS = 64  # the server's default limit on a batch
MAX_BYTES = 7 * 1024 * 1024  # of the server's 8 MiB, leaving room for what is not image
BATCH_FACTOR = 6  # a batch may take 60 s where a lone item may take 10, as on the server
MESSAGE_BYTES = 64 * 1024 * 1024  # of an answer; the server has its own limit
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
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
class Ask:
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
class Pause:
    """A wait in seconds."""

    seconds: float


Road = Generator[Ask | Pause, Any, T]


@dataclass
class Listing(Generic[T]):
    """A list that comes page by page: what asks for a page, and what makes of each the items."""

    ask: Ask
    items: Callable[[Any], list[T]]


@dataclass
class Resuming(Generic[T]):
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
        pause_s = pause(error, self.failures)
        if pause_s is None:
            raise error
        self.failures += 1
        return pause_s


@dataclass
class Try:
    """One try of a call; what came of it, a reply or an error of ours, is sent back."""

    timeout_s: float


def tries(timeout_s: float, *, retry: bool) -> Generator[Try | Pause, Any, Any]:
    """The tries of one call, within a time for all of them together; returns the reply.

    Raises:
        ReIDError: the leaf the server named; `UnavailableError` and `DeadlineError` also from gRPC itself.
    """
    deadline = time.monotonic() + timeout_s
    for number in itertools.count():
        reply = yield Try(max(0.0, deadline - time.monotonic()))
        if not isinstance(reply, ReIDError):
            return reply
        pause_s = pause(reply, number)
        if not retry or pause_s is None or time.monotonic() + pause_s >= deadline:
            raise reply
        yield Pause(pause_s)
    raise AssertionError("unreachable")


def pause(error: ReIDError, number: int) -> float | None:
    """How long to wait after failure ``number``, from 0: what the server asked for, and jitter, in seconds.

    None = another try would not help.
    """
    jitter_s = random.uniform(0.5, 1.0) * min(FIRST_PAUSE_S * 2.0**number, LAST_PAUSE_S)
    if isinstance(error, OverloadedError):
        return error.retry_after_s + jitter_s
    return jitter_s if isinstance(error, UnavailableError) and number < TRIES - 1 else None


def translated(failure: Any, address: str) -> ReIDError:
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


def chunks(messages: Sequence[M]) -> Iterator[Sequence[M]]:
    """Cut a list so that each part fits in one request, by number and by bytes."""
    start, size = 0, 0
    for number, message in enumerate(messages):
        own = message.ByteSize()
        if number > start and (number - start == MAX_ITEMS or size + own > MAX_BYTES):
            yield messages[start:number]
            start, size = number, 0
        size += own
    if start < len(messages):
        yield messages[start:]


def outcome(result: Any, good: str, make: Callable[[Any], T]) -> T | ReIDError:
    """One item of a batch: what it became, or the error the server gave it."""
    if result.WhichOneof("outcome") == good:
        return make(getattr(result, good))
    return from_status(result.error)
