"""Streams: requests are worked on together, answered as they are ready, and read no faster than answers are taken."""

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
    requests: AsyncIterator[RequestT], work: Callable[[RequestT], Awaitable[ResponseT]], most: int
) -> AsyncIterator[ResponseT]:
    """Answers in the order in which they become ready.

    A request is read when fewer than ``most`` are unanswered, and one counts as answered when its answer was taken:
    a client that sends faster than it reads is held back by gRPC's own flow control.

    Args:
        requests: the stream; its end lets the answers end.
        work: one request's answer; it must not raise.
        most: at least 1.
    """
    ready: asyncio.Queue[ResponseT | None] = asyncio.Queue()
    room = asyncio.Semaphore(most)
    running: set[asyncio.Task[None]] = set()

    async def answer(request: RequestT) -> None:
        ready.put_nowait(await work(request))

    async def read() -> None:
        await room.acquire()
        async for request in requests:
            task = asyncio.create_task(answer(request))
            running.add(task)
            task.add_done_callback(running.discard)
            await room.acquire()
        await asyncio.gather(*running)
        ready.put_nowait(None)

    reading = asyncio.create_task(read(), name="stream")
    reading.add_done_callback(lambda task: ready.put_nowait(None))
    try:
        while (one := await ready.get()) is not None:
            yield one
            room.release()
        await reading  # raises what broke it
    finally:
        for task in (reading, *running):
            task.cancel()
        await asyncio.gather(reading, *running, return_exceptions=True)


async def item_outcome(
    work: Callable[[float], Awaitable[ResponseT]], context: Context, *, method: str, limit_s: float
) -> ResponseT | status_pb2.Status:
    """One item of a stream: what it became, or the status of its own error.

    Args:
        work: given the item's deadline, in `time.monotonic` seconds.
        context: of the stream, whose deadline holds for every item.
        method: for the log.
        limit_s: for this item, from now.
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
