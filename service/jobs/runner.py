"""Work that goes on when the call that began it has ended: a task for each operation in the table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from resight.errors import ReIDError
from resight.service.storage.operations import Operation, Operations

log = logging.getLogger(__name__)

JobFunction = Callable[[Operation], Awaitable[dict[str, str]]]
"""Does it and returns the operation's result; what it raises is the operation's error."""


class JobCancelled(Exception):
    """Work ended because it was asked to; raised by the work itself."""


class JobRunner:
    """What runs, of all tenants. `stop` it in the event loop, before the stores are closed.

    What still runs then stays RUNNING in its table, and is INTERRUPTED at the next start.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, operations: Operations, kind: str, work: JobFunction, **details: Any) -> Operation:
        """Note an operation in a tenant's table and begin it."""
        operation = await operations.start(kind, **details)
        task = asyncio.create_task(_run_job(operations, operation, work), name=kind)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def stop(self) -> None:
        """Give up what runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _run_job(operations: Operations, operation: Operation, work: JobFunction) -> None:
    of = operation.operation_id
    try:
        await operations.finish(of, result=await work(operation))
    except JobCancelled:
        await operations.finish(of, cancelled=True)
    except ReIDError as error:
        log.warning("operation %s %s failed: %s", operation.kind, of, error)
        await operations.finish(of, error=error)
    except Exception:
        log.exception("operation %s %s failed", operation.kind, of)
        await operations.finish(of, error=ReIDError(f"internal error: the server's log has it under {of}"))
