"""Call interceptors: request id, error conversion, authentication and authorisation, rate limit, deadline.

An interceptor is an asynchronous context manager around the servicer's method; raising before the method runs rejects
the call. `resight.service.app` lists the interceptors in order, outermost first. Error conversion wraps the checks, so
that a rejected call also gets a rich status.

The request id is the client's ``x-request-id`` or generated here; it is in every log line and in the trailers. The rate
limit is a token bucket for each principal, so that one client in a loop cannot starve the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from resight.errors import (
    DeadlineError,
    FormatError,
    LimitError,
    PermissionDeniedError,
    RateLimitedError,
    ReIDError,
    UnauthenticatedError,
    UnavailableError,
)
from resight.service import call_events
from resight.service.access.auth import (
    ANONYMOUS_ADMIN,
    Principal,
    Role,
    TokenLookup,
    acting_as,
    current,
    required_role,
)
from resight.service.records import DEFAULT_TENANT
from resight.service.settings import Settings
from resight.status import DOMAIN

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class ServerCall:
    """A call as interceptors see it.

    Attributes:
        method: full name, ``/resight.v1.SearchService/Search``.
        context: gRPC's servicer context.
        streaming: whether the request or the response is a stream.
        trailers: trailing metadata, sent with every status.
    """

    method: str
    context: Context
    streaming: bool
    trailers: tuple[tuple[str, str | bytes], ...] = ()

    def code(self) -> grpc.StatusCode:
        """The status code it was aborted with; gRPC stores it as a number."""
        number = self.context.code()
        return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


CallInterceptor = Callable[[ServerCall], AbstractAsyncContextManager[None]]


def deadline_of(context: grpc.aio.ServicerContext[Any, Any], default_s: float) -> float:
    """The deadline of a call in `time.monotonic` seconds: the client's, or ``default_s`` from now."""
    remaining_s = context.time_remaining()
    return time.monotonic() + (default_s if remaining_s is None else remaining_s)


def check_batch(count: int, settings: Settings, field: str) -> None:
    """Check the size of a batch.

    Raises:
        LimitError: outside 1..max_batch_items.
    """
    if not 1 <= count <= settings.max_batch_items:
        raise LimitError(
            f"a batch has 1 to {settings.max_batch_items} items, found {count}: split it",
            field=field,
            max_batch_items=settings.max_batch_items,
        )


class InterceptorChain(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Runs every call, unary or streaming, inside the interceptors."""

    def __init__(self, interceptors: Sequence[CallInterceptor]) -> None:
        self._interceptors = tuple(interceptors)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap a method of any of the four kinds; returns None for an unknown method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method, coders = str(handler_call_details.method), (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._wrap(method, handler.unary_unary), *coders)
        if handler.stream_unary is not None:
            wrapped = self._wrap(method, handler.stream_unary, streaming=True)
            return grpc.stream_unary_rpc_method_handler(wrapped, *coders)
        if handler.unary_stream is not None:
            wrapped = self._wrap(method, _write_stream(handler.unary_stream), streaming=True)
            return grpc.unary_stream_rpc_method_handler(wrapped, *coders)
        wrapped = self._wrap(method, _write_stream(handler.stream_stream), streaming=True)
        return grpc.stream_stream_rpc_method_handler(wrapped, *coders)

    def _wrap(self, method: str, inner: Any, *, streaming: bool = False) -> Any:
        interceptors = self._interceptors

        async def handle(request: Any, context: Context) -> Any:
            call = ServerCall(method, context, streaming)

            async def step(number: int) -> Any:
                if number == len(interceptors):
                    return await inner(request, context)
                async with interceptors[number](call):
                    return await step(number + 1)

            return await step(0)

        return handle


def _write_stream(behaviour: Any) -> Any:
    """Turn a method that yields responses into one that writes them, so that the interceptors wrap the whole stream."""

    async def written(request: Any, context: Context) -> None:
        responses = behaviour(request, context)
        if not hasattr(responses, "__aiter__"):
            await responses  # it writes them itself, like Watch of the health service
            return
        async with contextlib.aclosing(responses):
            async for response in responses:
                await context.write(response)

    return written


@contextlib.asynccontextmanager
async def report_errors(call: ServerCall) -> AsyncIterator[None]:
    """Convert every error into a ``google.rpc.Status``.

    An unexpected error becomes INTERNAL with a correlation id that is also logged, without paths or stack traces.
    """
    try:
        yield
        return
    except ReIDError as error:
        status = call_events.record_error(error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        status = internal_error_status(call.method)
    rich = rpc_status.to_status(status)
    await call.context.abort(rich.code, rich.details, (*rich.trailing_metadata, *call.trailers))


class Deadlines:
    """Ends calls at the client's deadline, or at the default one; streams have no default deadline."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Run the call until its deadline."""
        remaining_s: float | None = call.context.time_remaining()
        if remaining_s is None and not call.streaming:
            batch = call.method.rpartition("/")[2].startswith("Batch")
            remaining_s = self._settings.batch_deadline_s if batch else self._settings.deadline_s
        try:
            async with asyncio.timeout(remaining_s) as timer:
                yield
        except TimeoutError as error:
            if not timer.expired():  # raised by the method itself: an unexpected error
                raise
            raise DeadlineError(
                "the deadline passed before the response was ready: allow more time or send less"
            ) from error


def internal_error_status(method: str) -> status_pb2.Status:
    """Log the exception being handled, and return an INTERNAL status with a correlation id."""
    correlation = secrets.token_hex(8)
    log.exception("internal error method=%s correlation=%s", method, correlation)
    status = status_pb2.Status(
        code=code_pb2.INTERNAL, message=f"internal error {correlation}: report it with this id and the server's log"
    )
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"correlation": correlation}))
    status.details.append(packed)
    return status


REQUEST_ID_HEADER = "x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}")  # a UUID has 36; no character that could forge a log line
_request_id: ContextVar[str] = ContextVar("resight_request_id", default="-")


def request_id() -> str:
    """The id of the current call; ``-`` outside of calls."""
    return _request_id.get()


@contextlib.asynccontextmanager
async def assign_request_id(call: ServerCall) -> AsyncIterator[None]:
    """Assign the call its request id; a malformed one from the client is replaced."""
    given = next((value for name, value in call.context.invocation_metadata() or () if name == REQUEST_ID_HEADER), "")
    text = given if isinstance(given, str) and _WELL_FORMED.fullmatch(given) else f"{random.getrandbits(64):016x}"
    call.trailers = (*call.trailers, (REQUEST_ID_HEADER, text))
    call.context.set_trailing_metadata(call.trailers)
    token = _request_id.set(text)
    try:
        yield
    finally:
        _request_id.reset(token)


class RequestIdFilter(logging.Filter):
    """Adds ``request_id`` to every record of a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the id; accepts every record."""
        record.request_id = request_id()
        return True


HEADER, SCHEME = "authorization", "bearer"
ANONYMOUS_READER = Principal("anonymous", DEFAULT_TENANT, Role.READER)  # for methods that require no credential
LOG_EVERY_S = 1.0  # so that brute-force attempts do not fill the log


class Authentication:
    """Authenticates callers by token and checks their role.

    Args:
        tokens: of the data folder.
        always: require a token even before the first one is created.
    """

    def __init__(self, tokens: TokenLookup, *, always: bool) -> None:
        self._tokens, self._always = tokens, always
        self._rejected, self._log_at = 0, 0.0

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Run the call as its principal."""
        with acting_as(self._authenticate(call)):
            yield

    def _authenticate(self, call: ServerCall) -> Principal:
        """The principal of a call.

        Raises:
            UnauthenticatedError: no token, or an invalid one.
            PermissionDeniedError: the role is not sufficient.
            UnavailableError: the tokens cannot be read.
        """
        least = required_role(call.method)
        if least is None:
            return ANONYMOUS_READER
        try:
            self._tokens.reload()
            if not (self._always or self._tokens.required):
                return ANONYMOUS_ADMIN
            principal = self._tokens.find(_bearer(call))
        except FormatError as error:
            log.error("all calls are rejected: %s", error)
            raise UnavailableError("the server cannot read its token file: see its log") from error
        except UnauthenticatedError:
            self._log_rejection(call, "no token")
            raise
        if principal is None:
            self._log_rejection(call, "unknown token")
            raise UnauthenticatedError(
                "the token is unknown, expired or revoked: create a new one with `resight token create`"
            )
        if principal.role < least:
            self._log_rejection(call, f"role {principal.role.word}, name {principal.name}")
            raise PermissionDeniedError(
                f"this call requires the role {least.word}, and {principal.name} has {principal.role.word}: "
                "use another token, or have one created with that role",
                role=principal.role.word,
                needed=least.word,
            )
        return principal

    def _log_rejection(self, call: ServerCall, why: str) -> None:
        """Log a rejected call, at most once a second; the line counts those since the previous one."""
        self._rejected += 1
        if time.monotonic() >= self._log_at:
            log.warning(
                "rejected %s from %s: %s (%d since the last line)",
                call.method,
                call.context.peer(),
                why,
                self._rejected,
            )
            self._rejected, self._log_at = 0, time.monotonic() + LOG_EVERY_S


def _bearer(call: ServerCall) -> str:
    """The bearer token of a call.

    Raises:
        UnauthenticatedError: no token, several, or another scheme.
    """
    found = [value for name, value in call.context.invocation_metadata() or () if name == HEADER]
    scheme, _, secret = str(found[0]).partition(" ") if len(found) == 1 else ("", "", "")
    if scheme.lower() != SCHEME or not secret:
        raise UnauthenticatedError(
            "a token is required: send one `authorization: Bearer TOKEN` header, or set RESIGHT_TOKEN for the command "
            "line"
        )
    return secret.strip()


MAX_PRINCIPALS = 10_000  # only a bound on memory: names come from our own credentials


class RateLimit:
    """Token-bucket rate limit for each principal: ``rate`` calls per second, bursts of ``burst``.

    Args:
        rate: calls per second, > 0.
        burst: capacity of the bucket in calls, >= 1.
        clock: monotonic seconds.
    """

    def __init__(self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # (calls left, as of)

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Take one call from the caller's bucket; methods without authentication are not limited."""
        if required_role(call.method) is not None:
            self.take(current())
        yield

    def take(self, principal: Principal) -> None:
        """Take one call.

        Raises:
            RateLimitedError: the bucket is empty; ``retry_after_s`` says when the next call is allowed.
        """
        key, now = (principal.tenant, principal.name), self._clock()
        left, then = self._buckets.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        allowed = left >= 1.0
        self._buckets[key] = (left - 1.0 if allowed else left, now)
        while len(self._buckets) > MAX_PRINCIPALS:
            self._buckets.popitem(last=False)  # the least recently active, whose bucket is the fullest
        if not allowed:
            raise RateLimitedError(
                f"{principal.name} may make {self._rate:g} calls per second, with bursts of {self._burst:g}: "
                "retry later, send crops in batches, or ask the operator for a higher limit",
                retry_after_s=(1.0 - left) / self._rate,
                principal=principal.name,
                rate_limit=self._rate,
            )
