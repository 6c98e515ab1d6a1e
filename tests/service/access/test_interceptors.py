"""Errors and deadlines as clients see them."""

import asyncio
import logging

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status

from resight.errors import DeadlineError, LimitError
from resight.service.access.interceptors import (
    Deadlines,
    InterceptorChain,
    assign_request_id,
    check_batch,
    report_errors,
)
from resight.service.settings import Settings
from resight.status import from_status
from resight.v1 import admin_pb2, admin_pb2_grpc


class Failing(admin_pb2_grpc.AdminServiceServicer):
    """Runs a function of the test."""

    def __init__(self, act):
        self.act = act

    async def GetServerInfo(self, request, context):
        return await self.act()


def failure(tmp_path, act, *, timeout_s=None, deadline_s=5.0) -> grpc.aio.AioRpcError:
    async def body():
        settings = Settings(bundle=tmp_path, data=tmp_path, deadline_s=deadline_s)
        server = grpc.aio.server(
            interceptors=[InterceptorChain((assign_request_id, report_errors, Deadlines(settings)))]
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(Failing(act), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = admin_pb2_grpc.AdminServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await stub.GetServerInfo(admin_pb2.GetServerInfoRequest(), timeout=timeout_s)
                return failed.value
        finally:
            await server.stop(0)

    return asyncio.run(body())


def test_an_unexpected_error_shows_only_a_correlation_id(tmp_path, caplog):
    async def act():
        raise RuntimeError("/secret/path of subject anna")

    with caplog.at_level(logging.ERROR):
        failed = failure(tmp_path, act)
    status = rpc_status.from_call(Sync(failed))
    info = details.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert failed.code() is grpc.StatusCode.INTERNAL and info.reason == "INTERNAL"
    assert "secret" not in str(status) and "anna" not in failed.details() and "RuntimeError" not in str(status)
    assert info.metadata["correlation"] in failed.details() and info.metadata["correlation"] in caplog.text
    assert "/secret/path" in caplog.text


def test_a_call_without_a_deadline_gets_the_default(tmp_path):
    async def act():
        await asyncio.sleep(60)

    failed = failure(tmp_path, act, deadline_s=0.1)
    error = from_status(rpc_status.from_call(Sync(failed)))
    assert type(error) is DeadlineError and "allow more time" in str(error)


def test_the_clients_deadline_cancels_the_call(tmp_path):
    ended = []

    async def act():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    assert failure(tmp_path, act, timeout_s=0.1).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended == [True]


@pytest.mark.parametrize("count", [0, 65])
def test_a_batch_outside_its_limits_is_refused(tmp_path, count):
    with pytest.raises(LimitError, match="1 to 64 items") as refused:
        check_batch(count, Settings(bundle=tmp_path, data=tmp_path), "images")
    assert refused.value.field == "images"


class Sync:
    """Adapts an aio error to the interface of a sync call, for `rpc_status.from_call`."""

    def __init__(self, failed):
        self._failed = failed

    def trailing_metadata(self):
        return [(key, value) for key, value in self._failed.trailing_metadata()]

    def code(self):
        return self._failed.code()

    def details(self):
        return self._failed.details()
