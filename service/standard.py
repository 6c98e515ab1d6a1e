"""The services that every gRPC tool knows: health, and reflection under both its names.

grpcurl and its kin ask for ``grpc.reflection.v1`` first; grpcio-reflection has ``v1alpha`` only. The messages
are the same but for the package, so one servicer answers both.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from resight.service.listen import is_loopback
from resight.service.settings import Settings

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
