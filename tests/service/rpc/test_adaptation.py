"""Adaptation requests: created, taken and reported by another process, and persistent over restarts."""

import signal

import grpc
import pytest
from grpc_status import rpc_status
from serving import ServerProcess
from tiny import resight_here, the_error

from resight.client import Client
from resight.errors import (
    InputError,
    LimitError,
    OperationNotFoundError,
    PermissionDeniedError,
    TrainingError,
)
from resight.service.access.auth import Role
from resight.status import from_status
from resight.v1 import admin_pb2, admin_pb2_grpc, operation_pb2, operation_pb2_grpc


def pending(client, site="") -> list[str]:
    return [one.operation_id for one in client.pending_adaptations(site)]


def test_an_adaptation_is_requested_taken_reported_and_ended(client):
    requested = client.start_adaptation("lobby")
    assert (requested.kind, requested.state, requested.result, requested.ended) == (
        "adapt",
        "pending",
        {"site": "lobby"},
        False,
    )
    yard = client.start_adaptation("yard")
    assert pending(client) == [yard.operation_id, requested.operation_id]  # newest first
    assert pending(client, "lobby") == [requested.operation_id] and pending(client, "cellar") == []
    assert client.start_adaptation("lobby").operation_id == requested.operation_id  # a pending one is reused
    taken = client.report_adaptation(requested.operation_id, "running", result={"run": "42"})
    assert (taken.state, taken.result) == ("running", {"site": "lobby", "run": "42"})
    again = client.start_adaptation("lobby")  # a running one does not include later crops
    assert pending(client, "lobby") == [again.operation_id] != [requested.operation_id]
    reported = client.report_adaptation(requested.operation_id, "running", result={"stage": "adapt", "site": "another"})
    assert reported.result == {"site": "lobby", "run": "42", "stage": "adapt"}
    done = client.report_adaptation(requested.operation_id, "succeeded", result={"outcome": "promoted"})
    assert done.state == "succeeded" and done.ended and done.result["outcome"] == "promoted"
    assert client.report_adaptation(requested.operation_id, "failed", error="late").state == "succeeded"
    failed = client.report_adaptation(again.operation_id, "failed", error="no cluster was found")
    assert isinstance(failed.error, TrainingError) and str(failed.error) == "no cluster was found"
    assert [one.operation_id for one in client.operations(kind="adapt", state="succeeded")] == [requested.operation_id]
    assert client.cancel_operation(yard.operation_id).state == "cancelled" and pending(client) == []


def test_a_reporter_sees_that_its_adaptation_was_cancelled(client):
    requested = client.start_adaptation("lobby")
    client.report_adaptation(requested.operation_id, "running")
    assert client.cancel_operation(requested.operation_id).state == "cancelled"
    assert client.report_adaptation(requested.operation_id, "running", result={"stage": "judge"}).state == "cancelled"
    assert client.report_adaptation(requested.operation_id, "succeeded").state == "cancelled"
    assert client.operation(requested.operation_id).result == {"site": "lobby"}


def test_requested_adaptations_survive_restarts_of_the_server(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data")
    with Client(server.wait_ready()) as client:
        taken = client.start_adaptation("lobby")
        client.report_adaptation(taken.operation_id, "running", result={"run": "7"})
        waiting = client.start_adaptation("lobby")
    server.end(signal.SIGKILL)
    server = ServerProcess(bundle_path, tmp_path / "data")
    try:
        with Client(server.wait_ready()) as client:
            assert pending(client) == [waiting.operation_id]
            assert client.operation(taken.operation_id).state == "running"
            done = client.report_adaptation(taken.operation_id, "succeeded")
            assert (done.state, done.result["run"]) == ("succeeded", "7")
    finally:
        assert server.end() == 0


def call(channel, method, request):
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    try:
        return getattr(stub, method)(request)
    except grpc.RpcError as failure:
        raise from_status(rpc_status.from_call(failure)) from None


def test_a_retry_returns_the_first_operation(client, channel):
    request = admin_pb2.StartAdaptationRequest(job_spec_id="lobby", request_id="r-adapt")
    first = call(channel, "StartAdaptation", request).operation
    client.report_adaptation(first.operation_id, "succeeded")
    again = call(channel, "StartAdaptation", request).operation
    assert again.operation_id == first.operation_id and pending(client) == []


@pytest.mark.parametrize("site", ["", " ", "../lobby", "/etc/passwd", "a b", "-x", "x" * 64, "lobby; rm -rf /", "ü"])
def test_a_site_is_a_name_and_never_a_path_or_a_command(client, site):
    with pytest.raises(InputError, match="a site's name is") as refused:
        client.start_adaptation(site)
    assert refused.value.field == "job_spec_id" and pending(client) == []


RUNNING, FAILED = operation_pb2.OPERATION_STATE_RUNNING, operation_pb2.OPERATION_STATE_FAILED


@pytest.mark.parametrize(
    "wrong, error, field",
    [
        ({"state": 0}, InputError, "state"),
        ({"state": 99}, InputError, "state"),
        ({"state": operation_pb2.OPERATION_STATE_PENDING}, InputError, "state"),
        ({"state": operation_pb2.OPERATION_STATE_CANCELLED}, InputError, "state"),
        ({"state": FAILED}, InputError, "error"),
        ({"state": RUNNING, "error": "but why"}, InputError, "error"),
        ({"state": FAILED, "error": "x" * 1025}, LimitError, "error"),
        ({"state": RUNNING, "result": {str(n): "" for n in range(33)}}, LimitError, "result"),
        ({"state": RUNNING, "result": {"": "x"}}, LimitError, "result"),
        ({"state": RUNNING, "result": {"n": "x" * 1025}}, LimitError, "result"),
        ({"state": RUNNING, "operation_id": "unknown"}, OperationNotFoundError, "operation_id"),
    ],
)
def test_a_wrong_report_changes_nothing(client, channel, wrong, error, field):
    requested = client.start_adaptation("hostile")
    with pytest.raises(error) as refused:
        call(
            channel,
            "ReportAdaptation",
            admin_pb2.ReportAdaptationRequest(**{"operation_id": requested.operation_id} | wrong),
        )
    assert refused.value.field == field
    assert client.operation(requested.operation_id) == requested
    client.cancel_operation(requested.operation_id)


def test_only_adaptations_can_be_reported_and_unknown_states_are_refused(client, channel):
    snapshot = client.wait(client.create_snapshot())
    with pytest.raises(OperationNotFoundError, match="only adaptations"):
        client.report_adaptation(snapshot.operation_id, "succeeded")
    with pytest.raises(grpc.RpcError) as refused:
        operation_pb2_grpc.OperationServiceStub(channel).ListOperations(operation_pb2.ListOperationsRequest(state=99))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert all(one.kind == "snapshot" for one in client.operations(kind="snapshot"))
    assert list(client.operations(kind="nonsense")) == []


def test_roles_and_tenants(guarded):
    with guarded.client(Role.OPERATOR) as operator, guarded.client(Role.OPERATOR, "north") as north:
        requested = operator.start_adaptation("lobby")
        with guarded.client(Role.ENROLLER) as enroller:
            for refused in (
                lambda: enroller.start_adaptation("lobby"),
                lambda: enroller.report_adaptation(requested.operation_id, "running"),
                lambda: pending(enroller),
            ):
                with pytest.raises(PermissionDeniedError, match="operator"):
                    refused()
        assert pending(north) == []
        for foreign in (
            lambda: north.report_adaptation(requested.operation_id, "running"),
            lambda: north.cancel_operation(requested.operation_id),
        ):
            with pytest.raises(OperationNotFoundError):
                foreign()
        assert pending(operator) == [requested.operation_id]
        assert operator.cancel_operation(requested.operation_id).state == "cancelled"


def test_the_command_line_requests_an_adaptation(client, address, monkeypatch):
    monkeypatch.setenv("RESIGHT_SERVER", address)
    done = resight_here("models", "adapt", "by-hand")
    (requested,) = client.pending_adaptations("by-hand")
    assert done.returncode == 0 and requested.operation_id in done.stdout
    client.cancel_operation(requested.operation_id)
    assert "a site's name is" in the_error(resight_here("models", "adapt", "../x"))
