"""Searches that wait while one runs are run together: a bound, deadlines, and no fixed delay.

The search thread is asked once in a turn of the event loop to take what waits: what came out of one batch of crops is
searched together, an idle thread starts at once, and a busy one finds company gathered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from resight.errors import DeadlineError, DrainingError, ExpiredInQueueError, OverloadedError

Kind = TypeVar("Kind")
Job = TypeVar("Job")
Answer = TypeVar("Answer")

MAX_TOGETHER = 64  # queries of one run: of a matrix product's gain little is left above (b 256: 1.07, b 64: 1.3 ms)
MIN_RETRY_S = 0.05  # below this a retry arrives before the queue has moved
SMOOTHING = 0.2  # weight of the newest run in the running mean of seconds a query


@dataclass
class _Item(Generic[Kind, Job, Answer]):
    kind: Kind
    jobs: Sequence[Job]
    deadline: float
    result: asyncio.Future[list[Answer]]
    loop: asyncio.AbstractEventLoop
    queued: float = field(default_factory=time.monotonic)


class SearchQueue(Generic[Kind, Job, Answer]):
    """Gathers jobs of equal kind. Of one event loop at a time.

    Args:
        thread: one thread, which runs them.
        run: answers jobs of one kind, in their order; what it raises is every one's answer.
        most: queries that may wait or run.

    Attributes:
        taken: queries that wait or run.
    """

    def __init__(self, thread: Executor, run: Callable[[Kind, Sequence[Job]], list[Answer]], *, most: int) -> None:
        self._thread, self._run, self._most = thread, run, most
        self._items: deque[_Item[Kind, Job, Answer]] = deque()
        self.taken = 0
        self._each_s = 0.0
        self._asking: asyncio.AbstractEventLoop | None = None  # which will ask the thread when it comes round

    async def submit(self, kind: Kind, jobs: Sequence[Job], *, deadline: float) -> list[Answer]:
        """Answers of some jobs.

        Args:
            kind: jobs of equal kinds may be run together.
            jobs: at least one.
            deadline: in `time.monotonic` seconds.

        Raises:
            DeadlineError: it passed before the run began.
            OverloadedError: too many wait, or the wait would outlast the deadline.
        """
        self._admit(len(jobs), deadline)
        loop = asyncio.get_running_loop()
        item: _Item[Kind, Job, Answer] = _Item(kind, jobs, deadline, loop.create_future(), loop)
        self.taken += len(jobs)
        try:
            self._items.append(item)
            if self._asking is not loop:
                self._asking = loop
                loop.call_soon(self._ask)
            return await item.result
        finally:
            self.taken -= len(jobs)

    def close(self) -> None:
        """Refuse who still waits; call it when the thread has ended."""
        while self._items:
            closing = DrainingError("the gallery is closing: try again when the server is back")
            _tell([(self._items.popleft(), closing)])

    def _admit(self, count: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _late()
        wait_s = self.taken * self._each_s
        retry_s = max(MIN_RETRY_S, wait_s)
        if self.taken + count > self._most or (self.taken and wait_s > left_s):
            raise OverloadedError(
                f"{self.taken} queries are being searched, {count} more came; at most {self._most} may, and the "
                f"deadline leaves {left_s:.2f} s: try again in {retry_s:.2f} s",
                retry_after_s=retry_s,
                max_search_queue=self._most,
            )

    def _ask(self) -> None:
        """Let the thread take what waits."""
        self._asking = None
        try:
            self._thread.submit(self._drain)
        except RuntimeError:  # it has ended
            self.close()

    def _drain(self) -> None:
        """Take what waits, up to `MAX_TOGETHER`, and run it kind by kind."""
        together: dict[Kind, list[_Item[Kind, Job, Answer]]] = {}
        count = 0
        while self._items and (not count or count + len(self._items[0].jobs) <= MAX_TOGETHER):
            item = self._items.popleft()
            if item.result.done():  # its caller left
                continue
            if time.monotonic() >= item.deadline:
                _tell([(item, _late())])
                continue
            together.setdefault(item.kind, []).append(item)
            count += len(item.jobs)
        if self._items:
            with contextlib.suppress(RuntimeError):  # it is ending, and `close` tells them
                self._thread.submit(self._drain)
        started = time.monotonic()
        for kind, items in together.items():
            try:
                answers = self._run(kind, [job for item in items for job in item.jobs])
            except Exception as error:
                _tell([(item, error) for item in items])
                continue
            ends = itertools.accumulate(len(item.jobs) for item in items)
            _tell([(item, answers[end - len(item.jobs) : end]) for item, end in zip(items, ends, strict=True)])
        if count:
            self._each_s += SMOOTHING * ((time.monotonic() - started) / count - self._each_s)


def _late() -> DeadlineError:
    return ExpiredInQueueError("the deadline passed before the search began: allow more time or send less at once")


def _tell(outcomes: Sequence[tuple[_Item[Kind, Job, Answer], list[Answer] | Exception]]) -> None:
    """Hand outcomes to the callers' loop, all at once, unless that has ended; callers who left are passed over."""

    def told() -> None:
        for item, outcome in outcomes:
            if item.result.done():
                continue
            if isinstance(outcome, Exception):
                item.result.set_exception(outcome)
            else:
                item.result.set_result(outcome)

    if outcomes:
        with contextlib.suppress(RuntimeError):
            outcomes[0][0].loop.call_soon_threadsafe(told)
