"""OpenTelemetry traces of calls, sent over OTLP: one span per call, with a child span for each stage.

Needs the packages of ``resight[otel]``. A span has the method, the code, the request id and times; no name, crop or
feature. A caller's ``traceparent`` is used as the parent (W3C Trace Context), so its trace continues here.
The spans are not made by opentelemetry-instrumentation-grpc: its spans hold the caller's address and have no stages.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import grpc

from resight.calibration import Decision
from resight.errors import ReIDError, StartupError
from resight.service import call_events
from resight.service.access.interceptors import ServerCall, request_id
from resight.status import reason_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

STOP_S = 3.0  # for sending the last spans when the collector is unreachable; less than a drain
PROPAGATED_HEADERS = ("traceparent", "tracestate")
INTERNAL_CODES = frozenset((grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS))


class Tracing:
    """An interceptor that traces calls. If the collector is unreachable, spans are lost but calls are not affected.

    Args:
        endpoint: ``http://HOST:PORT``, or ``https://`` for TLS.

    Raises:
        StartupError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise StartupError(
                f"otlp_endpoint is {endpoint}, and OpenTelemetry is not installed ({error.name}): "
                "pip install 'resight[otel]', or leave the setting out"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "resight"}), shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"), timeout=STOP_S)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("resight")
        self._propagator = TraceContextTextMapPropagator()

    def stop(self) -> None:
        """Send the remaining spans, for at most `STOP_S`."""
        self._provider.force_flush(int(STOP_S * 1000))
        self._exporter.shutdown()  # first, or the provider would keep retrying an unreachable collector
        self._provider.shutdown()

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Trace a call, however it ends."""
        from opentelemetry.trace import SpanKind, StatusCode

        metadata = {
            name: str(value) for name, value in call.context.invocation_metadata() or () if name in PROPAGATED_HEADERS
        }
        service, _, method = call.method.lstrip("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "request_id": request_id()},
        )
        code = grpc.StatusCode.OK
        try:
            with call_events.listen_to_call(_CallSpans(self._tracer, span)):
                yield
        except grpc.aio.AbortError:
            code = call.code()
            raise
        except BaseException:
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", int(code.value[0]))
            if code in INTERNAL_CODES:
                span.set_status(StatusCode.ERROR)
            span.end()


class _CallSpans:
    """Turns the events of one call into spans."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    def stage_ended(self, stage: call_events.Stage, started_ns: int, ended_ns: int) -> None:
        from opentelemetry.trace import set_span_in_context

        wall = time.time_ns() - time.perf_counter_ns()
        span = self._tracer.start_span(stage, context=set_span_in_context(self._span), start_time=wall + started_ns)
        span.end(wall + ended_ns)

    def failed(self, error: ReIDError) -> None:
        self._span.add_event("refused", {"reason": reason_of(error)})

    def decided(self, decisions: Sequence[Decision | None]) -> None:
        self._span.set_attribute("resight.queries", len(decisions))
