"""What every call passes through, in stages around the servicer's method.

A stage is an asynchronous context manager around a call: what it raises before the method runs refuses
the call. `resight.service.app` names them in their order, outermost first: request id, errors told,
authentication with role, rate, deadline. Errors are told outside the checks, so that a refusal is
a rich status too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from resight.errors import DeadlineError, LimitError, ReIDError
from resight.reasons import DOMAIN
from resight.service import watch
from resight.service.settings import Settings

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
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


Stage = Callable[[Call], AbstractAsyncContextManager[None]]


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


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Leads every call, unary or streaming, through the stages to its method."""

    def __init__(self, stages: Sequence[Stage]) -> None:
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
            guarded = self._guarded(method, _writing(handler.unary_stream), streaming=True)
            return grpc.unary_stream_rpc_method_handler(guarded, *coders)
        guarded = self._guarded(method, _writing(handler.stream_stream), streaming=True)
        return grpc.stream_stream_rpc_method_handler(guarded, *coders)

    def _guarded(self, method: str, inner: Any, *, streaming: bool = False) -> Any:
        stages = self._stages

        async def through(request: Any, context: Context) -> Any:
            call = Call(method, context, streaming)

            async def step(number: int) -> Any:
                if number == len(stages):
                    return await inner(request, context)
                async with stages[number](call):
                    return await step(number + 1)

            return await step(0)

        return through


def _writing(behaviour: Any) -> Any:
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
async def errors_told(call: Call) -> AsyncIterator[None]:
    """Answer every error as ``google.rpc.Status``.

    What nobody foresaw becomes INTERNAL with a correlation id that the log has too, and nothing else:
    no path, no trace.
    """
    try:
        yield
        return
    except ReIDError as error:
        status = watch.told(error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        status = internal(call.method)
    answer = rpc_status.to_status(status)
    await call.context.abort(answer.code, answer.details, (*answer.trailing_metadata, *call.trailers))


class Deadlines:
    """Ends calls after their deadline, which is ours where the client set none; streams have only the client's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
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


def internal(method: str) -> status_pb2.Status:
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
