"""The server: everything wired, warmed up, announced, and at the end drained.

Order matters. The data folder is locked and the port taken before the model is loaded, so that a
mistake shows at once; nothing is answered before the model has proved itself and the indexes stand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs

from resight.service.canary import Canary
from resight.service.embedder import Embedder
from resight.service.folder import DataFolder
from resight.service.gallery import Gallery
from resight.service.gate import Gate
from resight.service.guard import Deadlines, Guard, Stage, errors_told
from resight.service.listen import bind, certificates, check_listen
from resight.service.long_work import LongWork
from resight.service.migrate import Migrations
from resight.service.models import ModelHost
from resight.service.rate import RateLimit
from resight.service.request_id import with_request_id
from resight.service.rpc_admin import AdminServicer
from resight.service.rpc_embedding import EmbeddingServicer
from resight.service.rpc_gallery import GalleryServicer
from resight.service.rpc_models import ModelServicer
from resight.service.rpc_operations import OperationServicer
from resight.service.rpc_search import SearchServicer
from resight.service.settings import Settings
from resight.service.shadows import Shadows
from resight.service.standard import add_standard_services
from resight.service.tenants import Tenants
from resight.service.tokens import TokenBook, TokenFile
from resight.service.watchers import Watchers
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
    check_listen(settings)
    tls = certificates(settings)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(DataFolder(settings.data))
        book = TokenBook(TokenFile(settings.data))
        watchers = Watchers(settings, book)
        server, port = bind(settings, Guard(_stages(settings, book, watchers.stages)), tls)
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
        work = LongWork()
        stack.push_async_callback(work.stop)
        shadows = Shadows(models, embedder.waiting, work)
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
        await canary.fly()
        await server.start()
        watchers.know(embedder, models, tenants, shadows, status)
        await migrations.resume_all(tenants)
        stack.push_async_callback(server.stop, 0)
        address = f"{settings.listen.rpartition(':')[0]}:{port}"
        space = models.active.space
        folder.announce(address, space.space_id, metrics_url)
        log.info("serving %s space=%s model=%s", address, space.space_id, space.model_id)
        canary.start()
        yield Server(server, status, address)


def _stages(settings: Settings, tokens: TokenBook, watchers: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """What a call passes through, outermost first: what refuses it is told like any error, and has an id."""
    limits: tuple[Stage, ...] = (RateLimit(settings.rate_limit, settings.rate_burst),) if settings.rate_limit else ()
    gate = Gate(tokens, always=settings.auth == "tokens")
    return (with_request_id, *watchers, errors_told, gate, *limits, Deadlines(settings))
