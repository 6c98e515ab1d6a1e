"""What a call tells those who watch it: where its time went, what was refused, what its best hit is taken for.

Whoever does the work says so once, here, and knows of no metric and no trace. A stage of the guard listens for the
time of a call (`resight.service.monitoring.metrics`, `resight.service.monitoring.tracing`); work outside of calls, such
as a migration's, is heard by nobody.
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
from resight.status import to_status

Stage = Literal["decode", "queue", "infer", "search", "rerank"]


class CallListener(Protocol):
    """Is told in the thread of the event loop."""

    def stage_ended(self, stage: Stage, started_ns: int, ended_ns: int) -> None:
        """A part of the call is done; `time.perf_counter_ns` at its ends."""

    def failed(self, error: ReIDError) -> None:
        """The call, or one item of it, was answered with an error."""

    def decided(self, decisions: Sequence[Decision | None]) -> None:
        """Queries were searched; what each one's best hit is taken for, None = nothing was fitted."""


_listeners: ContextVar[tuple[CallListener, ...]] = ContextVar("resight_listeners", default=())


@contextlib.contextmanager
def listen_to_call(listener: CallListener) -> Iterator[None]:
    """Tell a listener what the calls within the block tell."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def record_stage(stage: Stage, started_ns: int, ended_ns: int) -> None:
    """Tell that a part of the call is done; `time.perf_counter_ns` at its ends."""
    for listener in _listeners.get():
        listener.stage_ended(stage, started_ns, ended_ns)


@contextlib.contextmanager
def timed_stage(stage: Stage) -> Iterator[None]:
    """Tell how long the block took, if it ends well."""
    started_ns = time.perf_counter_ns()
    yield
    record_stage(stage, started_ns, time.perf_counter_ns())


def record_decisions(decisions: Sequence[Decision | None]) -> None:
    """Tell what the best hits of some queries are taken for."""
    for listener in _listeners.get():
        listener.decided(decisions)


def record_error(error: ReIDError, *, field: str = "") -> status_pb2.Status:
    """An error as the other side is told it, as `resight.status.to_status`, and those who watch."""
    for listener in _listeners.get():
        listener.failed(error)
    return to_status(error, field=field)
