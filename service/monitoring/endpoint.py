"""The HTTP endpoint: ``/metrics`` for Prometheus, ``/livez`` and ``/readyz`` for orchestrators and load balancers.

It has its own threads, so that a server whose event loop is blocked reports that instead of hanging. The two probes
return one word and need no credentials, like gRPC's health checks; ``/metrics`` requires a token if calls do. It uses
TLS if the gRPC port does, with the same files, read for each connection, so a renewed certificate is used at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from resight.errors import FormatError, StartupError
from resight.service.access.auth import Role, TokenLookup
from resight.service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
ALIVE_S = 2.0  # no single step of the event loop takes so long
GATHER_S = 5.0  # half of Prometheus' default time limit
CONNECTION_S = 5.0
CONNECTIONS = 16  # two scrapers and a kubelet use three
TEXT = "text/plain; charset=utf-8"


class EndpointSource:
    """The data behind the endpoint; its methods are called from the endpoint's threads.

    Args:
        registry: of the metrics.
        refresh: updates the metrics; runs in the event loop.
        status: SERVING if every service with a canary is; runs in the event loop.
        tokens: for access to the metrics.
        settings: of the server; decide whether a token is always required.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        refresh: Callable[[], Awaitable[None]],
        status: Callable[[], Awaitable[int]],
        tokens: TokenLookup,
        settings: Settings,
    ) -> None:
        self._registry, self._refresh, self._status, self._tokens = registry, refresh, status, tokens
        self._always = settings.auth == "tokens"
        self._loop = asyncio.get_running_loop()

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        with contextlib.suppress(TimeoutError):  # the counters of calls are still valid
            self._run_in_loop(self._refresh, GATHER_S)
        return generate_latest(self._registry)

    def alive(self) -> bool:
        """Whether the event loop responds."""
        try:
            self._run_in_loop(_noop, ALIVE_S)
            return True
        except TimeoutError:
            return False

    def ready(self) -> bool:
        """Whether the health status is SERVING, and the event loop responds."""
        try:
            return bool(self._run_in_loop(self._status, ALIVE_S) == health_pb2.HealthCheckResponse.SERVING)
        except TimeoutError:
            return False

    def may_read_metrics(self, header: str) -> bool:
        """Whether an ``Authorization`` header gives access to ``/metrics``: the token of any operator does."""
        scheme, _, secret = header.partition(" ")
        try:
            self._tokens.reload()
            if not (self._always or self._tokens.required):
                return True
            found = self._tokens.find(secret.strip()) if scheme.lower() == "bearer" else None
        except FormatError as error:
            log.error("access to the metrics is denied: %s", error)
            return False
        return found is not None and found.role >= Role.OPERATOR

    def _run_in_loop(self, function: Callable[[], Awaitable[T]], limit_s: float) -> T:
        """Run a function in the event loop; raises TimeoutError if that takes too long or the loop has ended."""

        async def run() -> T:
            return await function()

        coroutine = run()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # the loop has ended
            coroutine.close()
            raise TimeoutError from error
        try:
            return future.result(limit_s)
        except TimeoutError:
            future.cancel()
            raise


class Endpoint:
    """The HTTP server; it runs until `stop`.

    Raises:
        StartupError: the address is in use or not of this machine.
    """

    def __init__(self, settings: Settings, address: str, source: EndpointSource) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            self._server = _Server(host, int(port), settings, _handler(source))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {address}: {error.strerror}: choose another --metrics (port 0 takes a free one)",
                metrics_listen=address,
            ) from error
        scheme = "http" if settings.tls_cert is None else "https"
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; a running scrape is aborted."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, settings: Settings, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._settings, self._slots = settings, threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless there are `CONNECTIONS` already."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Do the TLS handshake in the connection's own thread, so that a slow client does not block others."""
        try:
            request.settimeout(CONNECTION_S)
            if self._settings.tls_cert is not None:
                request = _tls(self._settings).wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError as error:  # ssl.SSLError is one
            log.debug("a connection to the metrics failed: %s", error)
            self.shutdown_request(request)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at DEBUG only: a client that disconnects is not an error of the server."""
        log.debug("a request to the metrics failed", exc_info=True)


def _tls(settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert settings.tls_cert is not None
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL  # a kubelet's probe has no certificate; `/metrics` requires one
        context.load_verify_locations(settings.tls_client_ca)
    return context


def _handler(source: EndpointSource) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "resight", ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/livez":
                self._probe(source.alive())
            elif path == "/readyz":
                self._probe(source.ready())
            elif path != "/metrics":
                self._answer(HTTPStatus.NOT_FOUND, TEXT, b"/metrics, /livez or /readyz\n")
            elif not source.may_read_metrics(self.headers.get("Authorization", "")) or not self._has_certificate():
                body = b"an operator's token is needed: Authorization: Bearer TOKEN\n"
                self._answer(HTTPStatus.UNAUTHORIZED, TEXT, body)
            else:
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, source.metrics())

        do_HEAD = do_GET

        def _has_certificate(self) -> bool:
            """Whether the client has presented a certificate, if one is required."""
            context = getattr(self.connection, "context", None)
            required = context is not None and context.verify_mode is not ssl.CERT_NONE
            return not required or bool(self.connection.getpeercert())

        def _probe(self, good: bool) -> None:
            status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, TEXT, b"ok\n" if good else b"not now\n")

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status is HTTPStatus.UNAUTHORIZED:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

    return Handler


async def _noop() -> None:
    return None
