"""Streaming calls: requests are processed concurrently, responses sent as they complete, with flow control."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from google.rpc import status_pb2

from resight.errors import DeadlineError, ReIDError
from resight.service import call_events
from resight.service.access.interceptors import Context, internal_error_status

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


async def map_as_completed(
    requests: AsyncIterator[RequestT], work: Callable[[RequestT], Awaitable[ResponseT]], max_pending: int
) -> AsyncIterator[ResponseT]:
    """Responses in the order in which they complete.

    A request is read only while fewer than ``max_pending`` are pending, that is until their response was taken: gRPC's
    flow control slows down a client that sends faster than it reads.

    Args:
        requests: the stream; when it ends, so do the responses after the pending ones.
        work: returns the response to one request; it must not raise.
        max_pending: at least 1.
    """
    ready: asyncio.Queue[ResponseT | None] = asyncio.Queue()
    slots = asyncio.Semaphore(max_pending)
    running: set[asyncio.Task[None]] = set()

    async def respond(request: RequestT) -> None:
        ready.put_nowait(await work(request))

    async def read() -> None:
        await slots.acquire()
        async for request in requests:
            task = asyncio.create_task(respond(request))
            running.add(task)
            task.add_done_callback(running.discard)
            await slots.acquire()
        await asyncio.gather(*running)
        ready.put_nowait(None)

    reading = asyncio.create_task(read(), name="stream")
    reading.add_done_callback(lambda task: ready.put_nowait(None))
    try:
        while (response := await ready.get()) is not None:
            yield response
            slots.release()
        await reading  # raises its error, if any
    finally:
        for task in (reading, *running):
            task.cancel()
        await asyncio.gather(reading, *running, return_exceptions=True)


async def item_outcome(
    work: Callable[[float], Awaitable[ResponseT]], context: Context, *, method: str, limit_s: float
) -> ResponseT | status_pb2.Status:
    """The response to one item of a stream, or the status of its error.

    Args:
        work: called with the deadline of the item, in `time.monotonic` seconds.
        context: of the stream, whose deadline also applies to each item.
        method: for the log.
        limit_s: time limit of this item.
    """
    remaining_s = context.time_remaining()
    allowed_s = limit_s if remaining_s is None else min(limit_s, remaining_s)
    try:
        async with asyncio.timeout(allowed_s):
            return await work(time.monotonic() + allowed_s)
    except TimeoutError:
        return call_events.record_error(
            DeadlineError("the deadline passed before the response was ready: allow more time or send less")
        )
    except ReIDError as error:
        return call_events.record_error(error)
    except Exception:
        return internal_error_status(method)
