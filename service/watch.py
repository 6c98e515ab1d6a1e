"""What a call tells those who watch it: where its time went, what was refused, what its best hit is taken for.

Whoever does the work says so once, here, and knows of no metric and no trace. A stage of the guard listens for the
time of a call (`resight.service.metrics`, `resight.service.tracing`); work outside of calls, such as a migration's, is
heard by nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, Protocol

from google.rpc import status_pb2

from resight.calibration import Decision
from resight.errors import ReIDError
from resight.reasons import to_status
from resight.service.lanes import Job

Stage = Literal["decode", "queue", "infer", "search", "rerank"]


class Listener(Protocol):
    """Is told in the thread of the event loop."""

    def spent(self, stage: Stage, started_ns: int, ended_ns: int) -> None:
        """A part of the call is done; `time.perf_counter_ns` at its ends."""

    def refused(self, error: ReIDError) -> None:
        """The call, or one item of it, was answered with an error."""

    def searched(self, decisions: Sequence[Decision | None]) -> None:
        """Queries were searched; what each one's best hit is taken for, None = nothing was fitted."""


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("resight_listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener what the calls within the block tell."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def spent(stage: Stage, started_ns: int, ended_ns: int) -> None:
    """Tell that a part of the call is done; `time.perf_counter_ns` at its ends."""
    for listener in _listeners.get():
        listener.spent(stage, started_ns, ended_ns)


@contextlib.contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """Tell how long the block took, if it ends well."""
    started_ns = time.perf_counter_ns()
    yield
    spent(stage, started_ns, time.perf_counter_ns())


def embedded(jobs: Sequence[Job]) -> None:
    """Tell where the time of crops that were embedded went, from the first one's begin to the last one's end.

    The stages of different crops overlap; of one crop they follow one another.
    """
    done = [job for job in jobs if job.queue_ns or job.infer_ns]
    if not done or not _listeners.get():
        return
    ready = [job.queued_ns for job in done]
    begun = [job.queued_ns + job.queue_ns for job in done]
    spent("decode", min(job.queued_ns - job.decode_ns for job in done), max(ready))
    spent("queue", min(ready), max(begun))
    spent("infer", min(begun), time.perf_counter_ns())


def searched(decisions: Sequence[Decision | None]) -> None:
    """Tell what the best hits of some queries are taken for."""
    for listener in _listeners.get():
        listener.searched(decisions)


def told(error: ReIDError, *, field: str = "") -> status_pb2.Status:
    """An error as the other side is told it, as `resight.reasons.to_status`, and those who watch."""
    for listener in _listeners.get():
        listener.refused(error)
    return to_status(error, field=field)
