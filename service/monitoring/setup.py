"""Sets up the monitoring of a server: logs and metrics always, traces and the HTTP endpoint where configured.

A log line, as text or JSON, is one event with the id of its call, and never contains a crop, a feature, a token, or the
id of a subject or an entry: those belong in the audit log. `tests/service/monitoring/test_logs.py` searches a server's
log for them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs
from pythonjsonlogger.json import JsonFormatter

from resight.service.access.auth import TokenLookup
from resight.service.access.interceptors import CallInterceptor, RequestIdFilter
from resight.service.inference.embedder import Embedder
from resight.service.inference.models import ModelHost
from resight.service.jobs.shadow import ShadowManager
from resight.service.monitoring.canary import EMBEDDING_SERVICES, SEARCH_SERVICES
from resight.service.monitoring.endpoint import Endpoint, EndpointSource
from resight.service.monitoring.metrics import CallMetrics, ServerGauges
from resight.service.monitoring.tracing import Tracing
from resight.service.settings import Settings
from resight.service.tenants import Tenants


class Monitoring:
    """The metrics, traces and HTTP endpoint of one server.

    Args:
        settings: which of them are enabled.
        tokens: that give access to ``/metrics``.

    Raises:
        StartupError: traces are enabled, and OpenTelemetry is not installed.
    """

    def __init__(self, settings: Settings, tokens: TokenLookup) -> None:
        self._settings, self._tokens = settings, tokens
        self._metrics = CallMetrics()
        self._tracing = None if settings.otlp_endpoint is None else Tracing(settings.otlp_endpoint)
        self._gauges: ServerGauges | None = None
        self._health: health.HealthServicer | None = None

    @property
    def stages(self) -> tuple[CallInterceptor, ...]:
        """Interceptors of each call; they go outside the one that reports errors."""
        return (self._metrics,) if self._tracing is None else (self._metrics, self._tracing)

    @contextlib.contextmanager
    def endpoint(self) -> Iterator[str]:
        """Run the HTTP endpoint during the block; yields its URL, empty if disabled. Flushes traces at the end.

        Until `attach` is called the server is reported as alive but not ready.

        Raises:
            StartupError: the address is in use.
        """
        endpoint = None
        if self._settings.metrics_listen is not None:
            source = EndpointSource(self._metrics.registry, self._refresh, self._status, self._tokens, self._settings)
            endpoint = Endpoint(self._settings, self._settings.metrics_listen, source)
        try:
            yield "" if endpoint is None else endpoint.url
        finally:
            if endpoint is not None:
                endpoint.stop()
            if self._tracing is not None:
                self._tracing.stop()

    def attach(
        self,
        embedder: Embedder,
        models: ModelHost,
        tenants: Tenants,
        shadows: ShadowManager,
        status: health.HealthServicer,
    ) -> None:
        """Include these in the metrics and the readiness from now on."""
        self._health = status
        self._gauges = ServerGauges(self._settings, embedder, models, tenants, shadows)
        self._metrics.registry.register(self._gauges)

    async def _refresh(self) -> None:
        if self._gauges is not None:
            self._gauges.clear()
            await self._gauges.gather()

    async def _status(self) -> int:
        if self._health is None:
            return int(health_pb2.HealthCheckResponse.NOT_SERVING)
        for name in (*EMBEDDING_SERVICES, *SEARCH_SERVICES):
            answer = await self._health.Check(health_pb2.HealthCheckRequest(service=name), None)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                break
        return int(answer.status)


TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s request=%(request_id)s %(message)s"


def json_formatter() -> logging.Formatter:
    """Lines of JSON: time (RFC 3339, UTC), level, logger, request, message, and the stack of an error."""
    return JsonFormatter(
        "{levelname}{name}{request_id}{message}",
        style="{",
        rename_fields={"levelname": "level", "name": "logger", "request_id": "request", "exc_info": "stack"},
        timestamp="time",
        defaults={"request_id": "-"},
        json_ensure_ascii=False,
    )


def configure_logging(form: Literal["text", "json"]) -> None:
    """Log to standard error in one format, level INFO and above."""
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(json_formatter() if form == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
