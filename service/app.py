"""The server: everything wired, warmed up, announced, and at the end drained.

Order matters. The data folder is locked and the port taken before the model is loaded, so that a
mistake shows at once; nothing is answered before the model has proved itself and the indexes stand.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs
from grpc_reflection.v1alpha import reflection

from resight.bundle import open_bundle
from resight.errors import StartupError
from resight.service.embedder import Embedder
from resight.service.folder import DataFolder
from resight.service.gallery import Gallery
from resight.service.guard import ErrorGuard
from resight.service.rpc import AdminServicer, EmbeddingServicer, SearchServicer
from resight.service.rpc_gallery import GalleryServicer
from resight.service.runtime import OnnxRuntime
from resight.service.settings import Settings
from resight.service.store import Store
from resight.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    gallery_pb2,
    gallery_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
)

log = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (embedding_pb2, "EmbeddingService"),
        (search_pb2, "SearchService"),
        (gallery_pb2, "GalleryService"),
        (admin_pb2, "AdminService"),
    )
)
STREAMS_PER_CONNECTION = 100
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # 64 searches of 1000 hits without features take 10 MiB
KEEPALIVE_MS, MIN_CLIENT_PING_MS = 60_000, 30_000  # gRPC's own 5 minutes send eager clients away
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 30 * 60_000, 30_000  # lets DNS load balancing work


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once.

    Raises:
        StartupError: the folder is held, the port taken, or the address open to others.
        BundleError: the model is damaged or fails its probes.
        StoreError: the gallery's database is damaged or of another version.
    """
    stopping = asyncio.Event()
    impatient = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (impatient if stopping.is_set() else stopping).set())
    async with serving(settings) as server:
        await stopping.wait()
        log.info("draining")
        await server.drain(settings, impatient)
    log.info("stopped")


class Server:
    """A server that answers at ``address``."""

    def __init__(self, grpc_server: grpc.aio.Server, status: health.HealthServicer, address: str) -> None:
        self.address = address
        self._server, self._status = grpc_server, status

    async def drain(self, settings: Settings, impatient: asyncio.Event) -> None:
        """Turn NOT_SERVING, let balancers notice, refuse new calls and let those in flight end."""
        await self._status.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(impatient.wait(), settings.drain_delay_s)
        stopped = asyncio.create_task(self._server.stop(settings.drain_grace_s))
        hurried = asyncio.create_task(impatient.wait())
        await asyncio.wait((stopped, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not stopped.done():
            await self._server.stop(0)
        await stopped


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Server]:
    """A ready server for the time of the block; leaving it stops everything and flushes the store."""
    _check_listen(settings)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(DataFolder(settings.data))
        server, port = _bind(settings)
        stack.push_async_callback(server.stop, 0)
        runtime = await asyncio.to_thread(_load, settings)
        store = Store(folder.database, dim=runtime.feature_dim, quick_check_s=settings.quick_check_s)
        stack.callback(store.close)
        embedder = Embedder(runtime, settings)
        embedder.start()
        stack.push_async_callback(embedder.stop)
        gallery = Gallery(store, embedder, settings)
        stack.push_async_callback(gallery.stop)
        await gallery.start()
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(
            EmbeddingServicer(embedder, gallery.space, settings), server
        )
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchServicer(gallery, settings), server)
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryServicer(gallery, settings), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(gallery.space, runtime.provider, settings), server
        )
        status = await _add_standard_services(server, settings)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        address = f"{settings.listen.rpartition(':')[0]}:{port}"
        folder.announce(address, runtime.space_id)
        log.info("serving %s space=%s model=%s", address, runtime.space_id, runtime.name)
        yield Server(server, status, address)


def _load(settings: Settings) -> OnnxRuntime:
    return OnnxRuntime(
        open_bundle(settings.bundle),
        provider=settings.provider,
        precision=settings.precision,
        max_batch=settings.max_batch,
        threads=settings.inference_threads,
    )


async def _add_standard_services(server: grpc.aio.Server, settings: Settings) -> health.HealthServicer:
    """Health for the whole and for each service; reflection where it is wanted."""
    status = health.HealthServicer()
    for name in ("", *SERVICES):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflected = _is_loopback(settings.host) if settings.reflection is None else settings.reflection
    if reflected:
        reflection.enable_server_reflection((*SERVICES, HEALTH, reflection.SERVICE_NAME), server)
    return status


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_listen(settings: Settings) -> None:
    if not _is_loopback(settings.host) and not settings.insecure_listen:
        raise StartupError(
            f"{settings.listen} can be reached from other machines, and this server authenticates nobody and encrypts "
            "nothing: listen on 127.0.0.1, put a proxy with TLS and authentication before it, or, where the network "
            "itself is closed, add --insecure-listen"
        )


def _bind(settings: Settings) -> tuple[grpc.aio.Server, int]:
    """A server that holds its port, not yet answering.

    Raises:
        StartupError: the address is taken or not ours.
    """
    options = [
        ("grpc.so_reuseport", 0),  # or a second server would share the port instead of being refused
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
    ]
    server = grpc.aio.server(
        interceptors=[ErrorGuard(settings)], options=options, maximum_concurrent_rpcs=settings.max_rpcs
    )
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.listen}: the port is taken or the address is not this machine's: stop the "
            "other server or choose another --listen (port 0 takes a free one)",
            listen=settings.listen,
        ) from error
    return server, port
