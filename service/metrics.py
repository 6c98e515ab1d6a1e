"""Prometheus metrics of a server: what calls tell, counted; what stands, asked for at each scrape.

No label holds a person, a token or anything else that a request may make up: methods are those that are served, codes
and reasons those of the tables, and collections are told by name up to a number and summed beyond it
(`resight.service.figures`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import get_args

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from resight.calibration import Decision
from resight.errors import ReIDError
from resight.reasons import reason_of
from resight.service import watch
from resight.service.guard import Call

# Half a millisecond (a search among thousands) to the ten seconds of the default deadline.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHED = frozenset(
    "OVERLOADED RATE_LIMITED EXPIRED_IN_QUEUE DEADLINE_PASSED DRAINING MODEL_NOT_READY "
    "DISK_WATERMARK STORAGE_FULL COLLECTION_FULL".split()
)
"""Reasons that tell of the server's state, not of the request."""


class Metrics:
    """The metrics of one server; a stage of its guard, and a listener of each call.

    Attributes:
        registry: of this server alone, so that two in a process do not mix.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # of each series one more, which nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._calls = Counter("resight_requests", "Calls answered.", ("method", "code"), registry=registry)
        self._running = Gauge("resight_requests_in_flight", "Calls that are being served.", registry=registry)
        self._total = Histogram(
            "resight_request_seconds",
            "Seconds from a call's arrival to its end; of a stream, its whole length.",
            ("method",),
            buckets=SECONDS,
            registry=registry,
        )
        stages = Histogram(
            "resight_stage_seconds",
            "Seconds of a call that a stage took, wall clock; stages of different crops overlap.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._shed = Counter(
            "resight_shed", "Calls or items refused for the server's state.", ("reason",), registry=registry
        )
        self._errors = Counter(
            "resight_errors", "Calls or items answered with an error.", ("reason",), registry=registry
        )
        self._decided = Counter(
            "resight_searches",
            "Queries searched, by what their best hit is taken for.",
            ("decision",),
            registry=registry,
        )
        # Its children by hand: five stages of every call would look for theirs.
        self._stages = {stage: stages.labels(stage) for stage in get_args(watch.Stage)}
        for reason in SHED:
            self._shed.labels(reason)
        for decision in ("match", "uncertain", "unknown", "uncalibrated"):
            self._decided.labels(decision)

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Count a call, however it ends, and listen to it."""
        started, code = time.perf_counter(), grpc.StatusCode.OK
        self._running.inc()
        try:
            with watch.listening(self):
                yield
        except grpc.aio.AbortError:
            code = call.code()
            raise
        except BaseException:
            code = grpc.StatusCode.CANCELLED  # the client left; whatever else there is was told as an abort
            raise
        finally:
            self._running.dec()
            self._calls.labels(call.method, code.name).inc()
            self._total.labels(call.method).observe(time.perf_counter() - started)

    def spent(self, stage: watch.Stage, started_ns: int, ended_ns: int) -> None:
        """Count a stage's time."""
        self._stages[stage].observe((ended_ns - started_ns) / 1e9)

    def refused(self, error: ReIDError) -> None:
        """Count an error by its reason, and load that was shed."""
        reason = reason_of(error)
        self._errors.labels(reason).inc()
        if reason in SHED:
            self._shed.labels(reason).inc()

    def searched(self, decisions: Sequence[Decision | None]) -> None:
        """Count what best hits are taken for."""
        for decision in decisions:
            self._decided.labels(decision or "uncalibrated").inc()
