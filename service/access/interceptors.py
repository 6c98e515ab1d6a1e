"""The stages every call passes: request id, errors, authentication with role, rate limit, deadline.

A stage is an asynchronous context manager around the servicer's method: an exception before the method runs refuses
the call. `resight.service.app` names the stages in their order, outermost first. Errors are converted outside the
checks, so that a refusal is a rich status too.

The request id comes from the client's ``x-request-id`` or is made here; it is in every log line and in the trailers.
The rate limit is a token bucket for each principal, so that one camera's loop cannot starve the rest.
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
    """One call on its way in.

    Attributes:
        method: full name, ``/resight.v1.SearchService/Search``.
        context: of gRPC.
        streaming: the answer is a stream, or the request.
        trailers: metadata that goes out with the status, whatever it is.
    """

    method: str
    context: Context
    streaming: bool
    trailers: tuple[tuple[str, str | bytes], ...] = ()

    def code(self) -> grpc.StatusCode:
        """What it was aborted with; gRPC keeps its number."""
        number = self.context.code()
        return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


CallInterceptor = Callable[[ServerCall], AbstractAsyncContextManager[None]]


def deadline_of(context: grpc.aio.ServicerContext[Any, Any], default_s: float) -> float:
    """When the answer must be there, in `time.monotonic` seconds; the client's deadline or ours."""
    remaining_s = context.time_remaining()
    return time.monotonic() + (default_s if remaining_s is None else remaining_s)


def check_batch(count: int, settings: Settings, field: str) -> None:
    """Refuse an empty batch and one that is too large.

    Raises:
        LimitError: outside 1..max_batch_items.
    """
    if not 1 <= count <= settings.max_batch_items:
        raise LimitError(
            f"a batch has 1 to {settings.max_batch_items} items, found {count}: send it in parts",
            field=field,
            max_batch_items=settings.max_batch_items,
        )


class InterceptorChain(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Leads every call, unary or streaming, through the stages to its method."""

    def __init__(self, stages: Sequence[CallInterceptor]) -> None:
        self._stages = tuple(stages)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap a method of any of the four kinds; None, for a method nobody serves, stays None."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method, coders = str(handler_call_details.method), (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._guarded(method, handler.unary_unary), *coders)
        if handler.stream_unary is not None:
            guarded = self._guarded(method, handler.stream_unary, streaming=True)
            return grpc.stream_unary_rpc_method_handler(guarded, *coders)
        if handler.unary_stream is not None:
            guarded = self._guarded(method, _as_writer(handler.unary_stream), streaming=True)
            return grpc.unary_stream_rpc_method_handler(guarded, *coders)
        guarded = self._guarded(method, _as_writer(handler.stream_stream), streaming=True)
        return grpc.stream_stream_rpc_method_handler(guarded, *coders)

    def _guarded(self, method: str, inner: Any, *, streaming: bool = False) -> Any:
        stages = self._stages

        async def through(request: Any, context: Context) -> Any:
            call = ServerCall(method, context, streaming)

            async def step(number: int) -> Any:
                if number == len(stages):
                    return await inner(request, context)
                async with stages[number](call):
                    return await step(number + 1)

            return await step(0)

        return through


def _as_writer(behaviour: Any) -> Any:
    """A method with a stream of answers as one that writes them itself, so that one frame holds it to its end."""

    async def written(request: Any, context: Context) -> None:
        answers = behaviour(request, context)
        if not hasattr(answers, "__aiter__"):
            await answers  # it writes them itself, as health's Watch does
            return
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await context.write(answer)

    return written


@contextlib.asynccontextmanager
async def report_errors(call: ServerCall) -> AsyncIterator[None]:
    """Answer every error as ``google.rpc.Status``.

    What nobody foresaw becomes INTERNAL with a correlation id that the log has too, and nothing else:
    no path, no trace.
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
    answer = rpc_status.to_status(status)
    await call.context.abort(answer.code, answer.details, (*answer.trailing_metadata, *call.trailers))


class Deadlines:
    """Ends calls after their deadline, which is ours where the client set none; streams have only the client's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Let the call run until its deadline."""
        remaining_s: float | None = call.context.time_remaining()
        if remaining_s is None and not call.streaming:
            batch = call.method.rpartition("/")[2].startswith("Batch")
            remaining_s = self._settings.batch_deadline_s if batch else self._settings.deadline_s
        try:
            async with asyncio.timeout(remaining_s) as timer:
                yield
        except TimeoutError as error:
            if not timer.expired():  # somebody else's timeout, which nobody foresaw
                raise
            raise DeadlineError(
                "the deadline passed before the answer was ready: allow more time or send less"
            ) from error


def internal_error_status(method: str) -> status_pb2.Status:
    """The status of an error that nobody foresaw, which the log tells in full; call it where it is handled."""
    correlation = secrets.token_hex(8)
    log.exception("internal error method=%s correlation=%s", method, correlation)
    status = status_pb2.Status(
        code=code_pb2.INTERNAL, message=f"internal error {correlation}: report it with this number and the server's log"
    )
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"correlation": correlation}))
    status.details.append(packed)
    return status


REQUEST_ID_HEADER = "x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}")  # a UUID has 36; nothing that could forge a line of the log
_request_id: ContextVar[str] = ContextVar("resight_request_id", default="-")


def request_id() -> str:
    """The id of the call that this code serves; ``-`` outside of calls."""
    return _request_id.get()


@contextlib.asynccontextmanager
async def assign_request_id(call: ServerCall) -> AsyncIterator[None]:
    """The stage that gives a call its id; one that is not well formed is replaced."""
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
    """Gives every line of a log handler a ``request_id``, for its format."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the line through, with its id."""
        record.request_id = request_id()
        return True


HEADER, SCHEME = "authorization", "bearer"
ANONYMOUS_READER = Principal("anonymous", DEFAULT_TENANT, Role.READER)  # of a method that asks for no credential
LOG_EVERY_S = 1.0  # a guesser must not fill the disk


class Authentication:
    """Asks for a token where authentication is on.

    Args:
        tokens: the tokens.
        always: on although no token was ever made: nobody gets in until one is.
    """

    def __init__(self, tokens: TokenLookup, *, always: bool) -> None:
        self._tokens, self._always = tokens, always
        self._refused, self._log_at = 0, 0.0

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Let the call act as its principal."""
        with acting_as(self._admit(call)):
            yield

    def _admit(self, call: ServerCall) -> Principal:
        """Who calls.

        Raises:
            UnauthenticatedError: no token, or not a good one.
            PermissionDeniedError: the role is too small.
            UnavailableError: the tokens cannot be read.
        """
        least = required_role(call.method)
        if least is None:
            return ANONYMOUS_READER
        try:
            self._tokens.follow()
            if not (self._always or self._tokens.required):
                return ANONYMOUS_ADMIN
            principal = self._tokens.find(_bearer(call))
        except FormatError as error:
            log.error("nobody gets in: %s", error)
            raise UnavailableError("the server cannot read its tokens: its log says why") from error
        except UnauthenticatedError:
            self._told(call, "no token")
            raise
        if principal is None:
            self._told(call, "unknown token")
            raise UnauthenticatedError(
                "the token is unknown, expired or revoked: `resight token create` makes a new one"
            )
        if principal.role < least:
            self._told(call, f"role {principal.role.word}, name {principal.name}")
            raise PermissionDeniedError(
                f"this call needs the role {least.word}, and {principal.name} is {principal.role.word}: "
                "use another token, or have one made with that role",
                role=principal.role.word,
                needed=least.word,
            )
        return principal

    def _told(self, call: ServerCall, why: str) -> None:
        """A line for a refusal; those of the same second are counted in the next."""
        self._refused += 1
        if time.monotonic() >= self._log_at:
            log.warning(
                "refused %s from %s: %s (%d since last told)", call.method, call.context.peer(), why, self._refused
            )
            self._refused, self._log_at = 0, time.monotonic() + LOG_EVERY_S


def _bearer(call: ServerCall) -> str:
    """The token that a call carries.

    Raises:
        UnauthenticatedError: none, two, or another scheme.
    """
    found = [value for name, value in call.context.invocation_metadata() or () if name == HEADER]
    scheme, _, secret = str(found[0]).partition(" ") if len(found) == 1 else ("", "", "")
    if scheme.lower() != SCHEME or not secret:
        raise UnauthenticatedError(
            "a token is needed: send `authorization: Bearer TOKEN` once, or set RESIGHT_TOKEN for the command line"
        )
    return secret.strip()


MAX_PRINCIPALS = 10_000  # names come from our own credentials; the fence is for an operator who makes one a day


class RateLimit:
    """The stage that lets each principal make ``rate`` calls a second, and ``burst`` at once after a rest.

    Args:
        rate: calls a second, > 0.
        burst: calls, >= 1.
        clock: seconds, never backwards.
    """

    def __init__(self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # calls left, at what time

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Take one call from the caller's bucket; health checks are free."""
        if required_role(call.method) is not None:
            self.take(current())
        yield

    def take(self, principal: Principal) -> None:
        """Take one call.

        Raises:
            RateLimitedError: the bucket is empty; it says when the next call fits.
        """
        key, now = (principal.tenant, principal.name), self._clock()
        left, then = self._buckets.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        allowed = left >= 1.0
        self._buckets[key] = (left - 1.0 if allowed else left, now)
        while len(self._buckets) > MAX_PRINCIPALS:
            self._buckets.popitem(last=False)  # the one that rested longest, whose bucket is full again soonest
        if not allowed:
            raise RateLimitedError(
                f"{principal.name} may make {self._rate:g} calls a second, and {self._burst:g} at once: "
                "wait, send crops in batches, or ask the operator for more",
                retry_after_s=(1.0 - left) / self._rate,
                principal=principal.name,
                rate_limit=self._rate,
            )
