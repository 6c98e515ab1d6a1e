"""The server: it wires the components, listens, becomes ready, and drains at the end.

The data folder is locked and the port taken before the model is loaded, so that a mistake shows at once; no call is
answered before the model has been verified and the indexes are loaded.

Health and reflection are served under both names of reflection: grpcurl asks for ``grpc.reflection.v1`` first and
grpcio-reflection has ``v1alpha`` only; the messages differ in the package name alone, so one servicer answers both.
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
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # 64 searches of 1000 hits without features take 10 MiB
MAX_METADATA_BYTES = 16 * 1024  # gRPC's own hard limit; set as the soft one too, so that none is refused by chance
KEEPALIVE_MS, MIN_CLIENT_PING_MS = 60_000, 30_000  # gRPC's own 5 minutes send eager clients away
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 30 * 60_000, 30_000  # lets DNS load balancing work


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(settings: Settings) -> None:
    """Refuse addresses that other machines can reach, unless callers are authenticated and the way is encrypted.

    Raises:
        StartupError: authentication or encryption is missing.
    """
    for address in (settings.listen, settings.metrics_listen):
        if address is not None and not is_loopback(address.rpartition(":")[0].strip("[]")):
            _check_open(address, settings)


def _check_open(address: str, settings: Settings) -> None:
    told = f"{address} can be reached from other machines"
    if settings.auth != "tokens" and not TokenFile(settings.data).exists():
        raise StartupError(
            f"{told}, and nobody would be authenticated: make a token with `resight token create NAME --role admin "
            f"--data {settings.data}`, or listen on 127.0.0.1"
        )
    if settings.tls_cert is None and not settings.behind_tls_proxy:
        raise StartupError(
            f"{told}, and crops and tokens would travel in clear: give --tls-cert and --tls-key, say "
            "--behind-tls-proxy where a proxy with TLS stands before this port and nothing else reaches it, or listen "
            "on 127.0.0.1"
        )


def certificates(settings: Settings) -> Certificates | None:
    """The certificate to serve with; None = plaintext.

    Raises:
        StartupError: a file cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def bind(settings: Settings, guard: InterceptorChain, tls: Certificates | None) -> tuple[grpc.aio.Server, int]:
    """A server that holds its port, not yet answering.

    Raises:
        StartupError: the address is taken or not ours.
    """
    options = [
        ("grpc.so_reuseport", 0),  # or a second server would share the port instead of being refused
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
    ]
    server = grpc.aio.server(interceptors=[guard], options=options, maximum_concurrent_rpcs=settings.max_rpcs)
    try:
        if tls is None:
            port = server.add_insecure_port(settings.listen)
        else:
            port = server.add_secure_port(settings.listen, tls.credentials())
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.listen}: the port is taken or the address is not this machine's: stop the "
            "other server or choose another --listen (port 0 takes a free one)",
            listen=settings.listen,
        ) from error
    return server, port


REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


async def add_standard_services(
    server: grpc.aio.Server, services: Sequence[str], settings: Settings
) -> health.HealthServicer:
    """Health for the whole and for each service; reflection where it is wanted, on loopback unless told."""
    status = health.HealthServicer()
    for name in ("", *services):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    if is_loopback(settings.host) if settings.reflection is None else settings.reflection:
        _add_reflection(server, (*services, HEALTH))
    return status


def _add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    _describe_v1()
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


def _describe_v1() -> None:
    """Put the description of v1, v1alpha's under its other name, where reflection looks services up."""
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
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once.

    Raises:
        StartupError: the folder is held, the port taken, a TLS file unusable, or the address open to others.
        BundleError: the model is damaged or fails its probes.
        StoreError: the gallery's database is damaged or of another version.
        FormatError: the tokens are damaged, or open to others.
    """
    stopping = asyncio.Event()
    impatient = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (impatient if stopping.is_set() else stopping).set())
    async with running_server(settings) as server:
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
async def running_server(settings: Settings) -> AsyncIterator[Server]:
    """A ready server for the time of the block; leaving it stops everything and flushes the store."""
    check_listen(settings)
    tls = certificates(settings)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(DataFolder(settings.data))
        book = TokenLookup(TokenFile(settings.data))
        watchers = Monitoring(settings, book)
        server, port = bind(settings, InterceptorChain(_interceptors(settings, book, watchers.stages)), tls)
        metrics_url = stack.enter_context(watchers.answering())
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
        work = JobRunner()
        stack.push_async_callback(work.stop)
        shadows = ShadowManager(models, embedder.waiting, work)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingServicer(models, settings), server)
        search_pb2_grpc.add_SearchServiceServicer_to_server(SearchServicer(tenants, settings, shadows), server)
        gallery_pb2_grpc.add_GalleryServiceServicer_to_server(GalleryServicer(tenants, settings), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(tenants, models, work, settings), server)
        migrations = Migrations(models)
        stack.push_async_callback(migrations.stop)
        model_servicer = ModelServicer(models, migrations, shadows, tenants, work)
        model_pb2_grpc.add_ModelServiceServicer_to_server(model_servicer, server)
        operation_pb2_grpc.add_OperationServiceServicer_to_server(OperationServicer(tenants), server)
        status = await add_standard_services(server, SERVICES, settings)
        canary = Canary(models, tenants, status, interval_s=settings.canary_interval_s)
        stack.push_async_callback(canary.stop)
        await canary.check()
        await server.start()
        watchers.attach(embedder, models, tenants, shadows, status)
        await migrations.resume_all(tenants)
        stack.push_async_callback(server.stop, 0)
        address = f"{settings.listen.rpartition(':')[0]}:{port}"
        space = models.active.space
        folder.announce(address, space.space_id, metrics_url)
        log.info("serving %s space=%s model=%s", address, space.space_id, space.model_id)
        canary.start()
        yield Server(server, status, address)


def _interceptors(
    settings: Settings, tokens: TokenLookup, watchers: tuple[CallInterceptor, ...]
) -> tuple[CallInterceptor, ...]:
    """What a call passes through, outermost first: what refuses it is told like any error, and has an id."""
    limits: tuple[CallInterceptor, ...] = (
        (RateLimit(settings.rate_limit, settings.rate_burst),) if settings.rate_limit else ()
    )
    gate = Authentication(tokens, always=settings.auth == "tokens")
    return (assign_request_id, *watchers, report_errors, gate, *limits, Deadlines(settings))
