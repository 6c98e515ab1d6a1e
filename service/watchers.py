"""Everything that watches a server, wired: metrics always, traces and the HTTP endpoint where asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs

from resight.service.canary import EMBEDDING, SEARCHING
from resight.service.embedder import Embedder
from resight.service.endpoint import Endpoint, Watched
from resight.service.figures import Figures
from resight.service.guard import Stage
from resight.service.metrics import Metrics
from resight.service.models import ModelHost
from resight.service.settings import Settings
from resight.service.shadows import Shadows
from resight.service.tenants import Tenants
from resight.service.tokens import TokenBook
from resight.service.tracing import Tracing


class Watchers:
    """The watchers of one server.

    Args:
        settings: which are asked for.
        book: whose tokens open ``/metrics``.

    Raises:
        StartupError: traces are asked for, and OpenTelemetry is not installed.
    """

    def __init__(self, settings: Settings, book: TokenBook) -> None:
        self._settings, self._book = settings, book
        self._metrics = Metrics()
        self._tracing = None if settings.otlp_endpoint is None else Tracing(settings.otlp_endpoint)
        self._figures: Figures | None = None
        self._health: health.HealthServicer | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """For the guard, outside of what tells errors."""
        return (self._metrics,) if self._tracing is None else (self._metrics, self._tracing)

    @contextlib.contextmanager
    def answering(self) -> Iterator[str]:
        """The HTTP endpoint for the time of the block, its URL, empty where none is asked for; then flushes traces.

        It answers from the beginning: alive, and not ready until `know` was called.

        Raises:
            StartupError: its address is taken.
        """
        endpoint = None
        if self._settings.metrics_listen is not None:
            watched = Watched(self._metrics.registry, self._refresh, self._status, self._book, self._settings)
            endpoint = Endpoint(self._settings, self._settings.metrics_listen, watched)
        try:
            yield "" if endpoint is None else endpoint.url
        finally:
            if endpoint is not None:
                endpoint.stop()
            if self._tracing is not None:
                self._tracing.stop()

    def know(
        self,
        embedder: Embedder,
        models: ModelHost,
        tenants: Tenants,
        shadows: Shadows,
        status: health.HealthServicer,
    ) -> None:
        """Watch these from now on."""
        self._health = status
        self._figures = Figures(self._settings, embedder, models, tenants, shadows)
        self._metrics.registry.register(self._figures)

    async def _refresh(self) -> None:
        if self._figures is not None:
            self._figures.forget()
            await self._figures.gather()

    async def _status(self) -> int:
        if self._health is None:
            return int(health_pb2.HealthCheckResponse.NOT_SERVING)
        for name in (*EMBEDDING, *SEARCHING):
            answer = await self._health.Check(health_pb2.HealthCheckRequest(service=name), None)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                break
        return int(answer.status)
