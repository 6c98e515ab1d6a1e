"""The HTTP side: ``/metrics`` for Prometheus, ``/livez`` and ``/readyz`` for whoever restarts and balances.

It answers from threads of its own, so that a server whose event loop is stuck says so instead of hanging. The two
probes tell a word and need no credential, as gRPC's health checks do; ``/metrics`` asks for a token where calls do. It
speaks TLS where the gRPC port does, with the same files, read for each connection, so a renewed certificate counts at
once.
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
ALIVE_S = 2.0  # the event loop never works for so long at once
GATHER_S = 5.0  # half of Prometheus' own time limit
CONNECTION_S = 5.0
CONNECTIONS = 16  # two scrapers and a kubelet hold three
TEXT = "text/plain; charset=utf-8"


class EndpointSource:
    """What the endpoint asks, from its threads.

    Args:
        registry: to write out.
        refresh: brings it up to date; runs in the event loop.
        status: SERVING when gRPC's health says so of every service with a canary; runs in the event loop.
        book: the tokens.
        settings: whether one is always asked for.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        refresh: Callable[[], Awaitable[None]],
        status: Callable[[], Awaitable[int]],
        book: TokenLookup,
        settings: Settings,
    ) -> None:
        self._registry, self._refresh, self._status, self._book = registry, refresh, status, book
        self._always = settings.auth == "tokens"
        self._loop = asyncio.get_running_loop()

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        with contextlib.suppress(TimeoutError):  # what calls have counted is told nevertheless
            self._ask(self._refresh, GATHER_S)
        return generate_latest(self._registry)

    def alive(self) -> bool:
        """Whether the event loop turns."""
        try:
            self._ask(_noop, ALIVE_S)
            return True
        except TimeoutError:
            return False

    def ready(self) -> bool:
        """Whether health says SERVING, and the event loop turns."""
        try:
            return bool(self._ask(self._status, ALIVE_S) == health_pb2.HealthCheckResponse.SERVING)
        except TimeoutError:
            return False

    def admits(self, header: str) -> bool:
        """Whether an ``Authorization`` header opens ``/metrics``: any operator's token does."""
        scheme, _, secret = header.partition(" ")
        try:
            self._book.reload()
            if not (self._always or self._book.required):
                return True
            found = self._book.find(secret.strip()) if scheme.lower() == "bearer" else None
        except FormatError as error:
            log.error("nobody gets at the metrics: %s", error)
            return False
        return found is not None and found.role >= Role.OPERATOR

    def _ask(self, function: Callable[[], Awaitable[T]], limit_s: float) -> T:
        async def asked() -> T:
            return await function()

        coroutine = asked()
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
    """The HTTP server, answering until `stop`.

    Raises:
        StartupError: the address is taken or not ours.
    """

    def __init__(self, settings: Settings, address: str, watched: EndpointSource) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            self._server = _Server(host, int(port), settings, _handler(watched))
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
        """End; a scrape under way is cut off."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, settings: Settings, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._settings, self._room = settings, threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, as long as there are few."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that a slow client holds up no other."""
        try:
            request.settimeout(CONNECTION_S)
            if self._settings.tls_cert is not None:
                request = _tls(self._settings).wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError as error:  # ssl.SSLError is one
            log.debug("a connection to the metrics failed: %s", error)
            self.shutdown_request(request)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is no error of ours."""
        log.debug("an answer of the metrics failed", exc_info=True)


def _tls(settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert settings.tls_cert is not None
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL  # a kubelet's probe has no certificate; `/metrics` asks for one
        context.load_verify_locations(settings.tls_client_ca)
    return context


def _handler(watched: EndpointSource) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "resight", ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/livez":
                self._probe(watched.alive())
            elif path == "/readyz":
                self._probe(watched.ready())
            elif path != "/metrics":
                self._answer(HTTPStatus.NOT_FOUND, TEXT, b"/metrics, /livez or /readyz\n")
            elif not watched.admits(self.headers.get("Authorization", "")) or not self._known():
                told = b"an operator's token is needed: Authorization: Bearer TOKEN\n"
                self._answer(HTTPStatus.UNAUTHORIZED, TEXT, told)
            else:
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, watched.metrics())

        do_HEAD = do_GET

        def _known(self) -> bool:
            """Whether the client showed a certificate, where one is asked for."""
            context = getattr(self.connection, "context", None)
            asked = context is not None and context.verify_mode is not ssl.CERT_NONE
            return not asked or bool(self.connection.getpeercert())

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
