import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from resight import errors
from resight.errors import ReIDError
from resight.status import STATUS_BY_ERROR, from_status, to_status

# Raised by training, export and start-up, not by a running server.
NEVER_SERVED = {
    "SiteError",
    "WeightsError",
    "FootageError",
    "DetectorError",
    "RecipeError",
    "CheckpointError",
    "BundleError",
    "StartupError",
    "CycleError",
    "CycleBusyError",
}


def leaves(kind: type[ReIDError]) -> list[type[ReIDError]]:
    below = kind.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


def make(leaf: type[ReIDError]) -> ReIDError:
    more = {"retry_after_s": 1.5} if issubclass(leaf, errors.OverloadedError) else {}
    return leaf("what was wrong", field="image.data", limit=7, **more)


def test_every_error_has_a_code_and_its_own_reason():
    assert [leaf.__name__ for leaf in leaves(ReIDError) if leaf not in STATUS_BY_ERROR] == []
    reasons = [wire.reason for wire in STATUS_BY_ERROR.values()]
    assert len(set(reasons)) == len(reasons)
    assert all(wire.code is not grpc.StatusCode.OK and wire.reason.isupper() for wire in STATUS_BY_ERROR.values())


@pytest.mark.parametrize("leaf", [*leaves(ReIDError), errors.OverloadedError], ids=lambda leaf: leaf.__name__)
def test_an_error_round_trips_through_a_status(leaf):
    back = from_status(status_pb2.Status.FromString(to_status(make(leaf), field="requests[3]").SerializeToString()))
    assert type(back) is leaf
    assert str(back) == "what was wrong"
    assert back.field == "requests[3].image.data"
    assert back.facts == {"limit": "7"}
    if isinstance(back, errors.OverloadedError):
        assert back.retry_after_s == 1.5


def detail_names(error: ReIDError) -> set[str]:
    return {packed.TypeName() for packed in to_status(error).details}


def test_each_status_has_the_details_of_its_code():
    assert "google.rpc.BadRequest" in detail_names(errors.ImageTooSmallError("", field="image.data"))
    assert "google.rpc.BadRequest" not in detail_names(errors.ImageTooSmallError(""))
    assert "google.rpc.ResourceInfo" in detail_names(errors.EntryNotFoundError("", entry="e"))
    assert "google.rpc.ResourceInfo" in detail_names(errors.CollectionExistsError("", collection="c"))
    assert "google.rpc.PreconditionFailure" in detail_names(errors.SpaceMismatchError(""))
    assert "google.rpc.RetryInfo" in detail_names(errors.OverloadedError("", retry_after_s=1))
    assert "google.rpc.RetryInfo" in detail_names(errors.UnavailableError(""))
    assert {"google.rpc.RetryInfo", "google.rpc.QuotaFailure"} <= detail_names(make(errors.RateLimitedError))
    assert all("google.rpc.ErrorInfo" in detail_names(make(leaf)) for leaf in leaves(ReIDError))


def test_the_missing_resource_is_named():
    status = to_status(errors.EntryNotFoundError("gone", entry="e-1", collection="c"))
    found = details.ResourceInfo()
    assert any(packed.Unpack(found) for packed in status.details)
    assert (found.resource_type, found.resource_name) == ("entry", "e-1")


def test_an_unmapped_class_uses_its_nearest_ancestor():
    assert to_status(errors.FormatError("odd")).code == grpc.StatusCode.INTERNAL.value[0]
    assert to_status(errors.ImageError("odd")).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_a_long_message_is_cut_below_grpcs_limit_on_trailers():
    assert to_status(errors.EntryNotFoundError("x" * 100_000)).ByteSize() < 8 * 1024


@pytest.mark.parametrize(
    ("code", "leaf"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError),
        (grpc.StatusCode.UNKNOWN, ReIDError),
    ],
)
def test_a_foreign_status_is_converted_by_its_code(code, leaf):
    assert type(from_status(status_pb2.Status(code=code.value[0], message="m"))) is leaf


def test_a_reason_of_another_domain_is_ignored():
    packed = any_pb2.Any()
    packed.Pack(details.ErrorInfo(reason="IMAGE_TOO_SMALL", domain="example.com"))
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], details=[packed])
    assert type(from_status(status)) is errors.UnavailableError


def test_the_documented_reasons_match_the_table():
    api = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    documented = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", api, re.MULTILINE))
    real = {wire.reason: wire.code.name for wire in STATUS_BY_ERROR.values()}
    assert documented.items() <= real.items()
    by_server = [leaf for leaf in leaves(ReIDError) if leaf.__name__ not in NEVER_SERVED]
    assert [leaf.__name__ for leaf in by_server if STATUS_BY_ERROR[leaf].reason not in documented] == []
