"""Events of a call for metrics and traces: time of each stage, errors, decisions.

The code that does the work reports an event once, here, and does not depend on metrics or tracing. The interceptors of
`resight.service.monitoring.metrics` and `resight.service.monitoring.tracing` register a listener for the duration of a
call. Work outside of calls, such as a migration's, has no listener.
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
    """Receives the events of a call, in the event loop's thread."""

    def stage_ended(self, stage: Stage, started_ns: int, ended_ns: int) -> None:
        """A stage of the call has ended; times as of `time.perf_counter_ns`."""

    def failed(self, error: ReIDError) -> None:
        """The call, or one of its items, failed with an error."""

    def decided(self, decisions: Sequence[Decision | None]) -> None:
        """Queries were searched; the decision on each one's best hit, None = the space has no calibration."""


_listeners: ContextVar[tuple[CallListener, ...]] = ContextVar("resight_listeners", default=())


def has_listeners() -> bool:
    """Whether any listener is registered, so that events need to be computed."""
    return bool(_listeners.get())


@contextlib.contextmanager
def listen_to_call(listener: CallListener) -> Iterator[None]:
    """Send the events of calls within the block to a listener."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def record_stage(stage: Stage, started_ns: int, ended_ns: int) -> None:
    """Report that a stage has ended; times as of `time.perf_counter_ns`."""
    for listener in _listeners.get():
        listener.stage_ended(stage, started_ns, ended_ns)


@contextlib.contextmanager
def timed_stage(stage: Stage) -> Iterator[None]:
    """Report the time of the block as a stage, unless it raises."""
    started_ns = time.perf_counter_ns()
    yield
    record_stage(stage, started_ns, time.perf_counter_ns())


def record_decisions(decisions: Sequence[Decision | None]) -> None:
    """Report the decisions on the best hits of some queries."""
    for listener in _listeners.get():
        listener.decided(decisions)


def record_error(error: ReIDError, *, field: str = "") -> status_pb2.Status:
    """Report an error and return its status for the client, as `resight.status.to_status`."""
    for listener in _listeners.get():
        listener.failed(error)
    return to_status(error, field=field)
