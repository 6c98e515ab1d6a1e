"""What every call passes through: its deadline, and the translation of errors into rich statuses."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from resight.errors import DeadlineError, LimitError, ReIDError
from resight.reasons import DOMAIN, to_status
from resight.service.settings import Settings

log = logging.getLogger(__name__)


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


class ErrorGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Ends calls after their deadline and answers every error as ``google.rpc.Status``.

    What nobody foresaw becomes INTERNAL with a correlation id that the log has too, and nothing else:
    no path, no trace.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the unary methods; the streams of health and reflection pass as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = str(handler_call_details.method)
        inner: Any = handler.unary_unary
        batch = method.rpartition("/")[2].startswith("Batch")
        default_s = self._settings.batch_deadline_s if batch else self._settings.deadline_s

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                async with asyncio.timeout(deadline_of(context, default_s) - time.monotonic()):
                    return await inner(request, context)
            except TimeoutError:
                error = DeadlineError("the deadline passed before the answer was ready: allow more time or send less")
                status = to_status(error)
            except ReIDError as error:
                status = to_status(error)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception:
                status = _internal(method)
            answer = rpc_status.to_status(status)
            await context.abort(answer.code, answer.details, answer.trailing_metadata)

        return grpc.unary_unary_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)


def _internal(method: str) -> status_pb2.Status:
    correlation = secrets.token_hex(8)
    log.exception("internal error method=%s correlation=%s", method, correlation)
    status = status_pb2.Status(
        code=code_pb2.INTERNAL, message=f"internal error {correlation}: report it with this number and the server's log"
    )
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"correlation": correlation}))
    status.details.append(packed)
    return status
