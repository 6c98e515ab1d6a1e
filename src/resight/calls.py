"""One gRPC call of the client: its deadline, its retries, and the server's errors as errors of ours."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from resight.errors import LimitError, OverloadedError, ReIDError, UnavailableError
from resight.reasons import from_status

T = TypeVar("T")
M = TypeVar("M", bound=Message)

TRIES = 5  # while nobody answers; an overloaded server is asked until the time is up
FIRST_PAUSE_S, LAST_PAUSE_S = (
    0.1,
    0.8,
)  # doubled at each try: 1.5 s in all for a server that is away, a restart's length
MAX_ITEMS = 64  # the server's default limit on a batch
MAX_BYTES = 7 * 1024 * 1024  # of the server's 8 MiB, leaving room for what is not image


def call(method: Callable[..., T], request: Message, *, address: str, timeout_s: float, retry: bool) -> T:
    """Call one method.

    Args:
        method: of a stub.
        request: its message.
        address: for the message of an error.
        timeout_s: for all tries together.
        retry: try again while the server is overloaded or away, with jitter and not before it says.

    Raises:
        ReIDError: the leaf the server named; `UnavailableError` and `DeadlineError` also from gRPC itself.
    """
    deadline = time.monotonic() + timeout_s
    for number in itertools.count():
        try:
            return method(request, timeout=max(0.0, deadline - time.monotonic()))
        except grpc.RpcError as failure:
            error = _translated(failure, address)
        pause_s = pause(error, number)
        if not retry or pause_s is None or time.monotonic() + pause_s >= deadline:
            raise error
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def pause(error: ReIDError, number: int) -> float | None:
    """How long to wait after failure ``number``, from 0: what the server asked for, and jitter, in seconds.

    None = another try would not help.
    """
    jitter_s = random.uniform(0.5, 1.0) * min(FIRST_PAUSE_S * 2.0**number, LAST_PAUSE_S)
    if isinstance(error, OverloadedError):
        return error.retry_after_s + jitter_s
    return jitter_s if isinstance(error, UnavailableError) and number < TRIES - 1 else None


def _translated(failure: grpc.RpcError, address: str) -> ReIDError:
    """The error of ours for one of gRPC's."""
    assert isinstance(failure, grpc.Call)
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
