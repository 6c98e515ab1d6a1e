"""The role table compared with the API, and fields that no request may have."""

import re

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from resight.service.access.auth import (
    ANONYMOUS_ADMIN,
    REQUIRED_ROLES,
    Principal,
    Role,
    acting_as,
    current,
    required_role,
)
from resight.v1 import admin_pb2, common_pb2, embedding_pb2, gallery_pb2, model_pb2, operation_pb2, search_pb2

FILES = [
    module.DESCRIPTOR
    for module in (admin_pb2, common_pb2, embedding_pb2, gallery_pb2, model_pb2, operation_pb2, search_pb2)
]
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]


def test_every_method_of_the_api_has_a_role_and_no_other_does():
    assert len(METHODS) > 30
    ours = {name for name in REQUIRED_ROLES if name.startswith("/resight.")}
    assert ours == set(METHODS)
    assert all(REQUIRED_ROLES[name] is not None for name in ours)


def test_only_health_needs_no_role():
    assert {name.split("/")[1] for name, role in REQUIRED_ROLES.items() if role is None} == {"grpc.health.v1.Health"}


def test_methods_missing_in_the_table_require_an_admin():
    assert required_role("/resight.v1.AdminService/FormatDisk") is Role.ADMIN


@pytest.mark.parametrize(
    "method, role",
    [
        ("SearchService/Search", Role.READER),
        ("SearchService/StreamSearch", Role.READER),
        ("GalleryService/EnrollEntry", Role.ENROLLER),
        ("GalleryService/GetEntry", Role.ENROLLER),
        ("GalleryService/EraseSubject", Role.OPERATOR),
        ("GalleryService/DeleteCollection", Role.OPERATOR),
        ("OperationService/CancelOperation", Role.OPERATOR),
        ("AdminService/ListAuditEvents", Role.OPERATOR),
        ("AdminService/CreateSnapshot", Role.ADMIN),
        ("ModelService/ActivateModel", Role.ADMIN),
    ],
)
def test_the_roles_are_those_of_the_design(method, role):
    assert required_role(f"/resight.v1.{method}") is role


def test_roles_are_ordered():
    assert Role.READER < Role.ENROLLER < Role.OPERATOR < Role.ADMIN


def test_the_principal_is_set_within_its_block_only():
    anna = Principal("anna", "north", Role.READER)
    assert current() is ANONYMOUS_ADMIN
    with acting_as(anna):
        assert current() is anna
    assert current() is ANONYMOUS_ADMIN


def requests() -> list[Descriptor]:
    """Every message that a caller can send, whole."""
    found: dict[str, Descriptor] = {}

    def visit(message: Descriptor) -> None:
        if message.full_name not in found:
            found[message.full_name] = message
            for field in message.fields:
                if field.message_type is not None:
                    visit(field.message_type)

    for file in FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                visit(method.input_type)
    return list(found.values())


def test_no_request_has_a_url_or_path():
    words = re.compile(r"(^|_)(url|uri|path|paths|file|filename|dir|directory|folder|host|address|command)(_|$)")
    fields = [field.full_name for message in requests() for field in message.fields]
    assert len(fields) > 60
    allowed = {"google.protobuf.FieldMask.paths"}  # names of fields, checked against a closed list
    assert {name for name in fields if words.search(name.rpartition(".")[2])} <= allowed


def test_no_request_has_a_tenant_field():
    assert [m.full_name for m in requests() if any("tenant" in field.name for field in m.fields)] == []


def test_the_pool_holds_the_same_services():
    pool = descriptor_pool.Default()
    assert {pool.FindServiceByName(name.split("/")[1]).full_name for name in METHODS} == {
        name.split("/")[1] for name in METHODS
    }
