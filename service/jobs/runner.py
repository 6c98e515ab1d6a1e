"""Background jobs: an asyncio task per long-running operation, which outlives the call that started it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from resight.errors import ReIDError
from resight.service.storage.operations import Operation, Operations

log = logging.getLogger(__name__)

JobFunction = Callable[[Operation], Awaitable[dict[str, str]]]
"""Does the work and returns the operation's result; an exception becomes the operation's error."""


class JobCancelled(Exception):
    """Raised by a job that ends because its cancellation was requested."""


class JobRunner:
    """The running jobs of all tenants. Call `stop` in the event loop, before the stores are closed.

    Jobs that still run then stay RUNNING in the database, and become INTERRUPTED at the next start.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, operations: Operations, kind: str, work: JobFunction, **details: Any) -> Operation:
        """Create an operation in a tenant's database and start its job."""
        operation = await operations.start(kind, **details)
        task = asyncio.create_task(_run_job(operations, operation, work), name=kind)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def stop(self) -> None:
        """Cancel the running jobs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _run_job(operations: Operations, operation: Operation, work: JobFunction) -> None:
    operation_id = operation.operation_id
    try:
        await operations.finish(operation_id, result=await work(operation))
    except JobCancelled:
        await operations.finish(operation_id, cancelled=True)
    except ReIDError as error:
        log.warning("operation %s %s failed: %s", operation.kind, operation_id, error)
        await operations.finish(operation_id, error=error)
    except Exception:
        log.exception("operation %s %s failed", operation.kind, operation_id)
        failure = ReIDError(f"internal error: see the server's log, under {operation_id}")
        await operations.finish(operation_id, error=failure)
