"""Reflection as grpcurl uses it: by the name of v1, message by message."""

import contextlib

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2 as messages
from serving import ServerProcess

from resight.service.access.auth import Role, TokenFile


def reflect(channel: grpc.Channel, version: str, *requests: messages.ServerReflectionRequest, **more):
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        messages.ServerReflectionRequest.SerializeToString,
        messages.ServerReflectionResponse.FromString,
    )
    return list(method(iter(requests), timeout=10, **more))


LIST = messages.ServerReflectionRequest(list_services="")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_both_reflections_describe_every_service_they_list(address, version):
    with grpc.insecure_channel(address) as channel:
        [listed] = reflect(channel, version, LIST)
        names = {service.name for service in listed.list_services_response.service}
        assert {"resight.v1.SearchService", "grpc.health.v1.Health"} <= names
        assert {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} <= names
        requests = [messages.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)]
        for name, answer in zip(sorted(names), reflect(channel, version, *requests), strict=True):
            assert not answer.HasField("error_response"), name
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in answer.file_descriptor_response.file_descriptor_proto
            ]
            package, _, service = name.rpartition(".")
            assert any(file.package == package and service in [s.name for s in file.service] for file in files)


def test_a_call_can_be_built_from_reflection_alone(address):
    """As a generic tool does it: descriptors in its own pool, messages built from them."""
    from google.protobuf import descriptor_pool, message_factory

    with grpc.insecure_channel(address) as channel:
        pool, name = descriptor_pool.DescriptorPool(), "resight.v1.AdminService"
        todo, seen = [messages.ServerReflectionRequest(file_containing_symbol=name)], {}
        while todo:
            [answer] = reflect(channel, "v1", todo.pop())
            for data in answer.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                if file.name not in seen:
                    seen[file.name] = file
                    todo += [messages.ServerReflectionRequest(file_by_filename=one) for one in file.dependency]
        added: set[str] = set()

        def add(file: descriptor_pb2.FileDescriptorProto) -> None:
            if file.name not in added:
                added.add(file.name)
                for one in file.dependency:
                    add(seen[one])
                pool.Add(file)

        for file in seen.values():
            add(file)
        method = pool.FindServiceByName(name).methods_by_name["GetServerInfo"]
        request = message_factory.GetMessageClass(method.input_type)
        reply = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(f"/{name}/GetServerInfo", request.SerializeToString, reply.FromString)
        assert call(request(), timeout=10).limits.max_batch_items == 64


def test_reflection_requires_an_operator_and_can_be_disabled(bundle_path, tmp_path):
    file = TokenFile(tmp_path / "data")
    reader, operator = (file.create(role.word, role)[0] for role in (Role.READER, Role.OPERATOR))
    server = ServerProcess(bundle_path, tmp_path / "data")
    with grpc.insecure_channel(server.wait_ready()) as channel:
        for secret, code in ((None, "UNAUTHENTICATED"), (reader, "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as failed:
                reflect(channel, "v1", LIST, metadata=bearer(secret))
            assert failed.value.code().name == code
        assert len(reflect(channel, "v1", LIST, metadata=bearer(operator))) == 1
    assert server.end() == 0
    flags = ("--behind-tls-proxy",)
    server = ServerProcess(bundle_path, tmp_path / "data", *flags, listen="0.0.0.0:0")
    port = server.wait_ready().rpartition(":")[2]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, contextlib.ExitStack() as stack:
        stack.callback(lambda: server.end())
        with pytest.raises(grpc.RpcError) as failed:
            reflect(channel, "v1", LIST, metadata=bearer(operator))
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


def bearer(secret: str | None) -> list[tuple[str, str]]:
    return [] if secret is None else [("authorization", f"Bearer {secret}")]
