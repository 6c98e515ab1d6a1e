"""Interceptors over real sockets: credentials, roles, rate limits, request ids, unary and streaming calls."""

import asyncio
import logging

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_status import rpc_status

from resight.client.transport import Bearer, open_channel
from resight.errors import (
    ImageTooSmallError,
    InputError,
    PermissionDeniedError,
    RateLimitedError,
    ReIDError,
    UnauthenticatedError,
    UnavailableError,
)
from resight.service.access import auth as tokens_module
from resight.service.access.auth import Role, TokenFile, TokenLookup, current
from resight.service.access.interceptors import (
    Authentication,
    Deadlines,
    InterceptorChain,
    RateLimit,
    RequestIdFilter,
    assign_request_id,
    report_errors,
    request_id,
)
from resight.service.settings import Settings
from resight.status import from_status
from resight.v1 import admin_pb2, admin_pb2_grpc, embedding_pb2, embedding_pb2_grpc

INFO, STREAM = admin_pb2.GetServerInfoRequest(), embedding_pb2.StreamEmbedRequest


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Returns the principal and the request id."""

    async def GetServerInfo(self, request, context):
        logging.getLogger("servicer").info("answering")
        return admin_pb2.GetServerInfoResponse(server_version=f"{current()} {request_id()}")

    async def RebuildIndex(self, request, context):
        return admin_pb2.RebuildIndexResponse()


class Embedding(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Returns the principal and request id; some requests make it fail."""

    async def StreamEmbed(self, request_iterator, context):
        async for request in request_iterator:
            if request.request_id == "small":
                raise ImageTooSmallError("too small", field="image.data")
            if request.request_id == "bug":
                raise RuntimeError("/secret/path")
            if request.request_id == "wait":
                await asyncio.sleep(60)
            yield embedding_pb2.StreamEmbedResponse(request_id=f"{request.request_id} {current().name} {request_id()}")


class Running:
    """A running server with these servicers."""

    def __init__(self, tmp_path, *, always=False, rate=None):
        self.file = TokenFile(tmp_path)
        settings = Settings(bundle=tmp_path, data=tmp_path)
        limits = () if rate is None else (RateLimit(*rate),)
        authentication = Authentication(TokenLookup(self.file), always=always)
        self.stages = (assign_request_id, report_errors, authentication, *limits, Deadlines(settings))

    async def __aenter__(self):
        self.server = grpc.aio.server(interceptors=[InterceptorChain(self.stages)])
        admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(), self.server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(Embedding(), self.server)
        status = health.HealthServicer()
        await status.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(status, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.info = admin_pb2_grpc.AdminServiceStub(self.channel).GetServerInfo
        self.rebuild = admin_pb2_grpc.AdminServiceStub(self.channel).RebuildIndex
        self.stream = embedding_pb2_grpc.EmbeddingServiceStub(self.channel).StreamEmbed
        self.health = health_pb2_grpc.HealthStub(self.channel)
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        await self.server.stop(0)


def bearer(secret: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"), *more)


async def error_of(call) -> tuple[ReIDError, dict]:
    """The error and trailers of a failed call, unary or streaming."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    trailers = dict(failed.value.trailing_metadata())
    return from_status(rpc_status.from_call(SyncError(failed.value))), trailers


class SyncError:
    """Adapts an aio error to the interface of a sync call, for `rpc_status.from_call`."""

    def __init__(self, failed):
        self.code, self.details, self._failed = failed.code, failed.details, failed

    def trailing_metadata(self):
        return list(self._failed.trailing_metadata())


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(tokens_module, "RELOAD_EVERY_S", 0.0)


def test_without_tokens_callers_are_admins_until_the_first_is_created(tmp_path):
    async def body():
        async with Running(tmp_path) as server:
            assert "anonymous" in (await server.info(INFO)).server_version
            await server.rebuild(admin_pb2.RebuildIndexRequest())
            server.file.create("anna", Role.READER)
            error, _ = await error_of(server.info(INFO))
            assert type(error) is UnauthenticatedError and "Bearer" in str(error)

    asyncio.run(body())


def test_always_requires_a_token_before_the_first_is_created(tmp_path):
    async def body():
        async with Running(tmp_path, always=True) as server:
            error, _ = await error_of(server.info(INFO))
            assert type(error) is UnauthenticatedError
            secret, _ = server.file.create("anna", Role.READER)
            await server.info(INFO, metadata=bearer(secret))

    asyncio.run(body())


def test_a_token_determines_principal_and_permissions(tmp_path, caplog):
    async def body():
        async with Running(tmp_path) as server:
            reader, _ = server.file.create("anna", Role.READER, tenant="north")
            admin, _ = server.file.create("root", Role.ADMIN)
            reported = (await server.info(INFO, metadata=bearer(reader))).server_version
            assert "name='anna', tenant='north', role=<Role.READER: 1>" in reported
            error, _ = await error_of(server.rebuild(admin_pb2.RebuildIndexRequest(), metadata=bearer(reader)))
            assert type(error) is PermissionDeniedError and "requires the role admin, and anna has reader" in str(error)
            assert error.facts == {"role": "reader", "needed": "admin"}
            await server.rebuild(admin_pb2.RebuildIndexRequest(), metadata=bearer(admin))
            server.file.revoke("root")
            error, _ = await error_of(server.rebuild(admin_pb2.RebuildIndexRequest(), metadata=bearer(admin)))
            assert type(error) is UnauthenticatedError and "revoked" in str(error)
            for secret in (reader, admin):
                assert secret not in caplog.text and secret not in str(error)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(body())
    assert "rejected /resight.v1.AdminService/RebuildIndex from ipv4:127.0.0.1" in caplog.text


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Basic {}"),),
        (("authorization", "{}"),),
        (("authorization", "Bearer {}x"),),
        (("authorization", "Bearer {}"), ("authorization", "Bearer {}")),
        (("authorization-bin", b"Bearer {}"),),
        (("x-authorization", "Bearer {}"),),
    ],
)
def test_credentials_other_than_a_bearer_token_are_refused(tmp_path, metadata):
    async def body():
        async with Running(tmp_path) as server:
            secret, _ = server.file.create("anna", Role.ADMIN)
            sent = [(key, value.format(secret) if isinstance(value, str) else value) for key, value in metadata]
            assert type((await error_of(server.info(INFO, metadata=sent)))[0]) is UnauthenticatedError
            assert type((await error_of(server.stream(iter([STREAM()]), metadata=sent)))[0]) is UnauthenticatedError
            await server.info(INFO, metadata=(("authorization", f"bearer {secret}"),))

    asyncio.run(body())


def test_health_needs_no_token(tmp_path):
    async def body():
        async with Running(tmp_path, always=True) as server:
            reply = await server.health.Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            watched = server.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
            watched.cancel()

    asyncio.run(body())


def test_a_damaged_token_file_rejects_all_and_reveals_nothing(tmp_path, caplog):
    async def body():
        async with Running(tmp_path) as server:
            secret, _ = server.file.create("anna", Role.ADMIN)
            good = server.file.path.read_text()
            server.file.path.write_text("{")
            error, _ = await error_of(server.info(INFO, metadata=bearer(secret)))
            assert type(error) is UnavailableError and "see its log" in str(error) and "json" not in str(error)
            server.file.path.write_text(good)
            await server.info(INFO, metadata=bearer(secret))

    asyncio.run(body())
    assert "tokens.json is damaged" in caplog.text


def test_streams_are_authenticated_like_unary_calls(tmp_path, caplog):
    async def body():
        async with Running(tmp_path) as server:
            secret, _ = server.file.create("anna", Role.READER)
            sent = bearer(secret, ("x-request-id", "s-1"))
            answers = server.stream(iter([STREAM(request_id="a"), STREAM(request_id="b")]), metadata=sent)
            assert [answer.request_id async for answer in answers] == ["a anna s-1", "b anna s-1"]
            assert dict(await answers.trailing_metadata())["x-request-id"] == "s-1"
            error, trailers = await error_of(server.stream(iter([STREAM(request_id="small")]), metadata=sent))
            assert type(error) is ImageTooSmallError and error.field == "image.data"
            assert trailers["x-request-id"] == "s-1"
            error, _ = await error_of(server.stream(iter([STREAM(request_id="bug")]), metadata=sent))
            assert type(error) is ReIDError and error.facts["correlation"] in caplog.text and "secret" not in str(error)
            waits = server.stream(iter([STREAM(request_id="wait")]), metadata=sent, timeout=0.2)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                [answer async for answer in waits]
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(body())


def test_streams_have_no_default_deadline(tmp_path):
    async def body():
        running = Running(tmp_path)
        running.stages = (report_errors, Deadlines(Settings(bundle=tmp_path, data=tmp_path, deadline_s=0.1)))
        async with running as server:
            call = server.stream()
            for number in range(3):
                await call.write(STREAM(request_id=str(number)))
                assert (await call.read()).request_id.startswith(str(number))
                await asyncio.sleep(0.1)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    asyncio.run(body())


def test_a_rate_limited_call_has_a_retry_delay(tmp_path):
    async def body():
        async with Running(tmp_path, rate=(0.5, 2)) as server:
            secret, _ = server.file.create("anna", Role.READER)
            other, _ = server.file.create("bob", Role.READER)
            for _ in range(2):
                await server.info(INFO, metadata=bearer(secret))
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await server.info(INFO, metadata=bearer(secret))
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            status = rpc_status.from_call(SyncError(failed.value))
            kinds = {packed.TypeName() for packed in status.details}
            assert {"google.rpc.RetryInfo", "google.rpc.QuotaFailure", "google.rpc.ErrorInfo"} <= kinds
            error, quota = from_status(status), details.QuotaFailure()
            assert type(error) is RateLimitedError and 0 < error.retry_after_s <= 2
            assert any(packed.Unpack(quota) for packed in status.details) and quota.violations[0].subject == "anna"
            assert type((await error_of(server.stream(iter([]), metadata=bearer(secret))))[0]) is RateLimitedError
            await server.info(INFO, metadata=bearer(other))
            for _ in range(5):
                await server.health.Check(health_pb2.HealthCheckRequest())

    asyncio.run(body())


@pytest.mark.parametrize(
    "given, kept",
    [("abc-1.2_3", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("", False), ("a=1;b", False)],
)
def test_every_call_has_an_id_in_its_log_lines_and_trailers(tmp_path, given, kept):
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    async def body():
        async with Running(tmp_path) as server:
            call = server.info(INFO, metadata=(("x-request-id", given),))
            reply = await call
            reported = dict(await call.trailing_metadata())["x-request-id"]
            assert reply.server_version.endswith(f" {reported}") and (reported == given) is kept and reported
            return reported

    handler = Collect()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(logging.Formatter("%(name)s request=%(request_id)s"))
    logger = logging.getLogger("servicer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert asyncio.run(body()) in [line.rpartition("=")[2] for line in lines]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert request_id() == "-"


def test_a_rejected_call_has_a_request_id_too(tmp_path):
    async def body():
        async with Running(tmp_path, always=True) as server:
            error, trailers = await error_of(server.info(INFO, metadata=(("x-request-id", "r-7"),)))
            assert type(error) is UnauthenticatedError and trailers["x-request-id"] == "r-7"

    asyncio.run(body())


def test_the_client_sends_its_token_on_every_kind_of_call(tmp_path):
    def ask(address: str, secret: str) -> None:
        with open_channel(address, [], None, secret) as channel:
            admin_pb2_grpc.AdminServiceStub(channel).GetServerInfo(INFO, timeout=5)
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            answers = [one.request_id for one in stub.StreamEmbed(iter([STREAM(request_id="a")]), timeout=5)]
            assert answers[0].startswith("a anna ")

    async def body():
        async with Running(tmp_path, always=True) as server:
            secret, _ = server.file.create("anna", Role.READER)
            await asyncio.to_thread(ask, server.address, secret)

    asyncio.run(body())


@pytest.mark.parametrize(
    "address", ["10.0.0.1:50051", "gallery.example:50051", "dns:///gallery:50051", "[2001:db8::1]:1"]
)
def test_a_client_sends_no_token_unencrypted_to_another_machine(address):
    with pytest.raises(InputError, match="in plaintext"):
        open_channel(address, [], None, "rst_x")
    open_channel(address, [], None, None).close()


@pytest.mark.parametrize("token", ["", "a b", "ä", "a\nb"])
def test_a_token_invalid_as_header_is_refused(token):
    with pytest.raises(InputError, match="without spaces"):
        open_channel("127.0.0.1:1", [], None, token)


def test_the_repr_of_a_channel_hides_its_token():
    assert "rst_secret" not in repr(Bearer("rst_secret"))
