"""The gRPC server: wiring of the components, start-up, readiness and drain.

The data folder is locked and the port is bound before the model is loaded, so that configuration errors show at once.
No call is served before the model is verified and the indexes are loaded.

Reflection is served as ``grpc.reflection.v1``, which grpcurl tries first, and as ``v1alpha``, the only version in
grpcio-reflection. The messages differ only in the package name, so one servicer handles both.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator, Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from resight.errors import StartupError
from resight.service.access.auth import TokenFile, TokenLookup
from resight.service.access.interceptors import (
    Authentication,
    CallInterceptor,
    Deadlines,
    InterceptorChain,
    RateLimit,
    assign_request_id,
    report_errors,
)
from resight.service.access.tls import Certificates, TlsFiles
from resight.service.gallery import Gallery
from resight.service.inference.embedder import Embedder
from resight.service.inference.models import ModelHost
from resight.service.jobs.migration import Migrations
from resight.service.jobs.runner import JobRunner
from resight.service.jobs.shadow import ShadowManager
from resight.service.monitoring.canary import Canary
from resight.service.monitoring.setup import Monitoring
from resight.service.rpc.admin import AdminServicer
from resight.service.rpc.embedding import EmbeddingServicer
from resight.service.rpc.gallery import GalleryServicer
from resight.service.rpc.models import ModelServicer
from resight.service.rpc.operations import OperationServicer
from resight.service.rpc.search import SearchServicer
from resight.service.settings import Settings
from resight.service.storage.data_folder import DataFolder
from resight.service.tenants import Tenants
from resight.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    gallery_pb2,
    gallery_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    operation_pb2,
    operation_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
)

STREAMS_PER_CONNECTION = 100
MAX_RESPONSE_BYTES = 64 * 1024 * 1024  # 64 searches of 1000 hits without features take 10 MiB
MAX_METADATA_BYTES = 16 * 1024  # gRPC's default hard limit; between soft and hard limit calls are rejected at random
KEEPALIVE_MS, MIN_CLIENT_PING_MS = 60_000, 30_000  # gRPC's default, 5 minutes, disconnects eager clients
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 30 * 60_000, 30_000  # clients reconnect, and so see new DNS records


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(settings: Settings) -> None:
    """Refuse a non-loopback address unless callers are authenticated and the connection is encrypted.

    Raises:
        StartupError: authentication or encryption is not configured.
    """
    for address in (settings.listen, settings.metrics_listen):
        if address is not None and not is_loopback(address.rpartition(":")[0].strip("[]")):
            _check_exposed(address, settings)


def _check_exposed(address: str, settings: Settings) -> None:
    exposed = f"{address} can be reached from other machines"
    if settings.auth != "tokens" and not TokenFile(settings.data).exists():
        raise StartupError(
            f"{exposed}, but authentication is off: create a token with `resight token create NAME --role admin "
            f"--data {settings.data}`, or listen on 127.0.0.1"
        )
    if settings.tls_cert is None and not settings.behind_tls_proxy:
        raise StartupError(
            f"{exposed}, but crops and tokens would be sent unencrypted: pass --tls-cert and --tls-key, or "
            "--behind-tls-proxy if a TLS proxy is the only client of this port, or listen on 127.0.0.1"
        )


def certificates(settings: Settings) -> Certificates | None:
    """The TLS certificates to serve with; None = plaintext.

    Raises:
        StartupError: a file cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def bind(settings: Settings, interceptors: InterceptorChain, tls: Certificates | None) -> tuple[grpc.aio.Server, int]:
    """Create a server, bound to its port but not started; returns it and the port.

    Raises:
        StartupError: the address is in use or not local.
    """
    options = [
        ("grpc.so_reuseport", 0),  # otherwise a second server could bind the same port
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
    ]
    server = grpc.aio.server(interceptors=[interceptors], options=options, maximum_concurrent_rpcs=settings.max_rpcs)
    try:
        if tls is None:
            port = server.add_insecure_port(settings.listen)
        else:
            port = server.add_secure_port(settings.listen, tls.credentials())
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.listen}: the port is in use or the address is not local: stop the other "
            "server or choose another --listen (port 0 selects a free port)",
            listen=settings.listen,
        ) from error
    return server, port


REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


async def add_standard_services(
    server: grpc.aio.Server, services: Sequence[str], settings: Settings
) -> health.HealthServicer:
    """Add health (for the server and each service), and reflection if enabled (by default only on loopback)."""
    status = health.HealthServicer()
    for name in ("", *services):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    if is_loopback(settings.host) if settings.reflection is None else settings.reflection:
        _add_reflection(server, (*services, HEALTH))
    return status


def _add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    _register_v1_descriptor()
    names = (*services, REFLECTION_V1, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    servicer = ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(REFLECTION_V1, methods),))


def _register_v1_descriptor() -> None:
    """Register the descriptor of v1, a renamed copy of v1alpha, in the pool in which reflection looks up services."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(REFLECTION_V1)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        text = text_format.MessageToString(file).replace("v1alpha", "v1")
        pool.AddSerializedFile(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()).SerializeToString())


log = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (embedding_pb2, "EmbeddingService"),
        (search_pb2, "SearchService"),
        (gallery_pb2, "GalleryService"),
        (admin_pb2, "AdminService"),
        (model_pb2, "ModelService"),
        (operation_pb2, "OperationService"),
    )
)


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal aborts the drain.

    Raises:
        StartupError: the folder is locked, the port in use, a TLS file unusable, or the address exposed without TLS
            or authentication.
        BundleError: the model is damaged or fails its probes.
        StoreError: the gallery's database is damaged or of another version.
        FormatError: the token file is damaged, or other users can read it.
    """
    stopping = asyncio.Event()
    drain_aborted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (drain_aborted if stopping.is_set() else stopping).set())
    async with running_server(settings) as server:
        await stopping.wait()
        log.info("draining")
        await server.drain(settings, drain_aborted)
    log.info("stopped")


class Server:
    """A running server, which listens on ``address``."""

    def __init__(self, grpc_server: grpc.aio.Server, status: health.HealthServicer, address: str) -> None:
        self.address = address
        self._server, self._status = grpc_server, status

    async def drain(self, settings: Settings, drain_aborted: asyncio.Event) -> None:
        """Report NOT_SERVING, give load balancers time to notice, then refuse new calls and finish those in flight."""
        await self._status.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drain_aborted.wait(), settings.drain_delay_s)
        stopped = asyncio.create_task(self._server.stop(settings.drain_grace_s))
        aborted = asyncio.create_task(drain_aborted.wait())
        await asyncio.wait((stopped, aborted), return_when=asyncio.FIRST_COMPLETED)
        aborted.cancel()
        if not stopped.done():
            await self._server.stop(0)
        await stopped


@contextlib.asynccontextmanager
async def running_server(settings: Settings) -> AsyncIterator[Server]:
    """Start a server and yield it when it is ready; on exit, stop all components and flush the store."""
    check_listen(settings)
    tls = certificates(settings)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(DataFolder(settings.data))
        tokens = TokenLookup(TokenFile(settings.data))
        monitoring = Monitoring(settings, tokens)
        interceptors = InterceptorChain(_interceptors(settings, tokens, monitoring.stages))
        server, port = bind(settings, interceptors, tls)
        metrics_url = stack.enter_context(monitoring.endpoint())
        stack.push_async_callback(server.stop, 0)
        embedder = Embedder(settings)
        embedder.start()
        stack.push_async_callback(embedder.stop)
        models = ModelHost(embedder, settings, settings.data)
        await models.start()
        dim = models.active.space.dim
        tenants = Tenants(settings.data, settings, dim=dim, make=lambda store: Gallery(store, models, settings))
        stack.push_async_callback(tenants.stop)
        await tenants.start()
        jobs = JobRunner()
        stack.push_async_callback(jobs.stop)
        shadows = ShadowManager(models, embedder.waiting, jobs)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingServicer(models, settings), server)
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchServicer(tenants, settings, shadows), server)
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryServicer(tenants, settings), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(tenants, models, jobs, settings), server)
        migrations = Migrations(models)
        stack.push_async_callback(migrations.stop)
        model_servicer = ModelServicer(models, migrations, shadows, tenants, jobs)
        model_pb2_grpc.add_ModelServiceServicer_to_server(model_servicer, server)
        operation_pb2_grpc.add_OperationServiceServicer_to_server(OperationServicer(tenants), server)
        status = await add_standard_services(server, SERVICES, settings)
        canary = Canary(models, tenants, status, interval_s=settings.canary_interval_s)
        stack.push_async_callback(canary.stop)
        await canary.check()
        await server.start()
        monitoring.attach(embedder, models, tenants, shadows, status)
        await migrations.resume_all(tenants)
        stack.push_async_callback(server.stop, 0)
        address = f"{settings.listen.rpartition(':')[0]}:{port}"
        space = models.active.space
        folder.announce(address, space.space_id, metrics_url)
        log.info("serving %s space=%s model=%s", address, space.space_id, space.model_id)
        canary.start()
        yield Server(server, status, address)


def _interceptors(
    settings: Settings, tokens: TokenLookup, monitoring: tuple[CallInterceptor, ...]
) -> tuple[CallInterceptor, ...]:
    """The interceptors of a call, outermost first.

    The request id and error reporting come before the checks, so that a rejected call has an id and a rich status too.
    """
    limits: tuple[CallInterceptor, ...] = (
        (RateLimit(settings.rate_limit, settings.rate_burst),) if settings.rate_limit else ()
    )
    authentication = Authentication(tokens, always=settings.auth == "tokens")
    return (assign_request_id, *monitoring, report_errors, authentication, *limits, Deadlines(settings))
