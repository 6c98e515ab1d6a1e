"""Who calls and what they may: roles, principals, and the least role of every method.

`resight.service.gate` sets the principal of a call; servicers ask `current` for it,
before they hand work to another task or thread that serves several callers.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

DEFAULT_TENANT = "default"


class Role(enum.IntEnum):
    """What a principal may do; each role may do all that the ones below it may."""

    READER = 1
    ENROLLER = 2
    OPERATOR = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """The name as it stands in files, flags and messages."""
        return self.name.lower()


@dataclass(frozen=True)
class Principal:
    """Who calls.

    Attributes:
        name: of the credential, for the audit log and the limits on rate.
        tenant: whose galleries they see; never taken from a request.
        role: what they may do.
    """

    name: str
    tenant: str
    role: Role


NOBODY_ASKED = Principal("anonymous", DEFAULT_TENANT, Role.ADMIN)  # authentication is off
_principal: ContextVar[Principal] = ContextVar("resight_principal", default=NOBODY_ASKED)


def current() -> Principal:
    """Who makes the call that this code serves; ``anonymous``, an admin, where authentication is off."""
    return _principal.get()


@contextlib.contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Make a principal the `current` one within the block."""
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def _methods(service: str, role: Role | None, *names: str) -> dict[str, Role | None]:
    return {f"/{service}/{name}": role for name in names}


# None = anybody: a balancer's health check carries no credential.
LEAST_ROLE = MappingProxyType(
    _methods("resight.v1.EmbeddingService", Role.READER, "Embed", "BatchEmbed", "StreamEmbed")
    | _methods("resight.v1.SearchService", Role.READER, "Search", "BatchSearch", "StreamSearch", "Verify")
    | _methods("resight.v1.GalleryService", Role.READER, "GetCollection", "ListCollections")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "EnrollEntry", "BatchEnrollEntries", "GetEntry")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "ListEntries", "UpdateEntry", "DeleteEntry", "DeleteEntries")
    | _methods("resight.v1.GalleryService", Role.OPERATOR, "CreateCollection", "UpdateCollection", "DeleteCollection")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "AddFeedback", "ListFeedback", "RemoveFeedback")
    | _methods("resight.v1.GalleryService", Role.OPERATOR, "EraseSubject", "StreamCrops")
    | _methods("resight.v1.OperationService", Role.OPERATOR, "GetOperation", "ListOperations", "CancelOperation")
    | _methods("resight.v1.ModelService", Role.ADMIN, "ListModels", "GetModel", "LoadModel", "UnloadModel")
    | _methods("resight.v1.ModelService", Role.ADMIN, "ActivateModel", "MigrateCollection", "ActivateSpace")
    | _methods("resight.v1.ModelService", Role.ADMIN, "StartShadow", "GetShadow", "StopShadow")
    | _methods("resight.v1.AdminService", Role.READER, "GetServerInfo")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "GetCollectionStats", "ListAuditEvents")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "GetSearchFigures")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "StartAdaptation", "ReportAdaptation")
    | _methods("resight.v1.AdminService", Role.ADMIN, "RebuildIndex", "CreateSnapshot")
    | _methods("grpc.health.v1.Health", None, "Check", "Watch", "List")
    | _methods("grpc.reflection.v1.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
    | _methods("grpc.reflection.v1alpha.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
)


def least_role(method: str) -> Role | None:
    """The least role for a method, by its full name (``/resight.v1.SearchService/Search``).

    A method that the table does not know is for admins: nothing opens by being forgotten.
    """
    return LEAST_ROLE.get(method, Role.ADMIN)
