"""Conversion between errors and gRPC statuses, by one table that server and client share.

Every status has the details ``ErrorInfo{reason, domain, metadata}`` (AIP-193), ``BadRequest`` with the invalid field of
the request, and one more if gRPC's conventions define it: ``ResourceInfo`` for missing or existing resources,
``PreconditionFailure``, ``QuotaFailure``, ``RetryInfo``.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from resight import errors
from resight.errors import OverloadedError, ReIDError, UnavailableError

DOMAIN = "resight.v1"
MAX_MESSAGE = 1024  # characters; gRPC rejects trailers over 8 KiB, and the details repeat the message


class StatusMapping(NamedTuple):
    """The gRPC code and the reason of an error class."""

    code: grpc.StatusCode
    reason: str


STATUS_BY_ERROR: dict[type[ReIDError], StatusMapping] = {
    errors.ReIDError: StatusMapping(grpc.StatusCode.INTERNAL, "INTERNAL"),
    errors.InputError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    errors.ImageUndecodableError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_UNDECODABLE"),
    errors.ImageTooLargeError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_TOO_LARGE"),
    errors.ImageTooSmallError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_TOO_SMALL"),
    errors.QualityTooLowError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "QUALITY_TOO_LOW"),
    errors.SiteError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "SITE_UNUSABLE"),
    errors.WeightsError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "WEIGHTS_UNUSABLE"),
    errors.FootageError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "FOOTAGE_UNUSABLE"),
    errors.DetectorError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "DETECTOR_UNUSABLE"),
    errors.RecipeError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "RECIPE_INVALID"),
    errors.LimitError: StatusMapping(grpc.StatusCode.INVALID_ARGUMENT, "LIMIT_EXCEEDED"),
    errors.CheckpointError: StatusMapping(grpc.StatusCode.DATA_LOSS, "CHECKPOINT_DAMAGED"),
    errors.BundleError: StatusMapping(grpc.StatusCode.DATA_LOSS, "BUNDLE_DAMAGED"),
    errors.StoreError: StatusMapping(grpc.StatusCode.DATA_LOSS, "STORE_DAMAGED"),
    errors.TrainingError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_FAILED"),
    errors.ModelError: StatusMapping(grpc.StatusCode.INTERNAL, "MODEL_FAILED"),
    errors.ModelInUseError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE"),
    errors.CropsMissingError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "CROPS_MISSING"),
    errors.MigrationError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "MIGRATION_GATE"),
    errors.SpaceMismatchError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "EMBEDDING_SPACE_MISMATCH"),
    errors.NotCancellableError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "NOT_CANCELLABLE"),
    errors.UncalibratedError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "SPACE_UNCALIBRATED"),
    errors.NotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.CollectionNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "COLLECTION_NOT_FOUND"),
    errors.EntryNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "ENTRY_NOT_FOUND"),
    errors.FeedbackNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "FEEDBACK_NOT_FOUND"),
    errors.ModelNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    errors.OperationNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND"),
    errors.ShadowNotFoundError: StatusMapping(grpc.StatusCode.NOT_FOUND, "SHADOW_NOT_FOUND"),
    errors.AlreadyExistsError: StatusMapping(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.CollectionExistsError: StatusMapping(grpc.StatusCode.ALREADY_EXISTS, "COLLECTION_EXISTS"),
    errors.EntryExistsError: StatusMapping(grpc.StatusCode.ALREADY_EXISTS, "ENTRY_EXISTS"),
    errors.ConflictError: StatusMapping(grpc.StatusCode.ABORTED, "CONCURRENT_UPDATE"),
    errors.CollectionNotEmptyError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "COLLECTION_NOT_EMPTY"),
    errors.CollectionFullError: StatusMapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "COLLECTION_FULL"),
    errors.FeedbackConflictError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "FEEDBACK_CONFLICT"),
    errors.DeleteCapError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "DELETE_CAP_EXCEEDED"),
    errors.OverloadedError: StatusMapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.RateLimitedError: StatusMapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
    errors.UnauthenticatedError: StatusMapping(grpc.StatusCode.UNAUTHENTICATED, "NO_CREDENTIAL"),
    errors.PermissionDeniedError: StatusMapping(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED"),
    errors.DeadlineError: StatusMapping(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    errors.ExpiredInQueueError: StatusMapping(grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED_IN_QUEUE"),
    errors.RevisionNotSearchableError: StatusMapping(grpc.StatusCode.DEADLINE_EXCEEDED, "REVISION_NOT_SEARCHABLE"),
    errors.UnavailableError: StatusMapping(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    errors.DrainingError: StatusMapping(grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.ModelNotReadyError: StatusMapping(grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY"),
    errors.StorageFullError: StatusMapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
    errors.DiskWatermarkError: StatusMapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_WATERMARK"),
    errors.StartupError: StatusMapping(grpc.StatusCode.UNAVAILABLE, "STARTUP_FAILED"),
    errors.CycleError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "CYCLE_FAILED"),
    errors.CycleBusyError: StatusMapping(grpc.StatusCode.FAILED_PRECONDITION, "CYCLE_BUSY"),
}
_ERROR_BY_REASON = {wire.reason: leaf for leaf, wire in STATUS_BY_ERROR.items()}
_ERROR_BY_CODE: dict[int, type[ReIDError]] = {
    grpc.StatusCode.UNAVAILABLE.value[0]: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED.value[0]: errors.DeadlineError,
    # Without our details this is gRPC's own limit on concurrent calls.
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]: errors.OverloadedError,
    grpc.StatusCode.INVALID_ARGUMENT.value[0]: errors.InputError,
    grpc.StatusCode.UNAUTHENTICATED.value[0]: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED.value[0]: errors.PermissionDeniedError,
}


def reason_of(error: ReIDError) -> str:
    """The reason of an error in its status, such as ``OVERLOADED``."""
    return _mapping_of(error).reason


def _mapping_of(error: ReIDError) -> StatusMapping:
    return next(STATUS_BY_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_BY_ERROR)


def to_status(error: ReIDError, *, field: str = "") -> status_pb2.Status:
    """Convert an error to a status.

    Args:
        error: any error of the tree.
        field: the item's path in the request (``requests[3]``), to which the error's own field is appended.
    """
    code, reason = _mapping_of(error)
    message = str(error)[:MAX_MESSAGE]
    at = ".".join(part for part in (field, error.field) if part)
    parts: list[Message] = [details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=error.facts)]
    if at:
        violation = details.BadRequest.FieldViolation(field=at, description=message)
        parts.append(details.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.NotFoundError | errors.AlreadyExistsError):
        kind, _, _ = reason.lower().partition("_")
        name = error.facts.get(kind, "")
        parts.append(details.ResourceInfo(resource_type=kind, resource_name=name, description=message))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = details.PreconditionFailure.Violation(type=reason, subject=at, description=message)
        parts.append(details.PreconditionFailure(violations=[failure]))
    if isinstance(error, errors.RateLimitedError | errors.CollectionFullError | errors.StorageFullError):
        subject = error.facts.get("principal") or error.facts.get("collection", "")
        quota = details.QuotaFailure.Violation(subject=subject, description=message)
        parts.append(details.QuotaFailure(violations=[quota]))
    retry_after_s = _retry_after_s(error)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        parts.append(details.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=message)
    for part in parts:
        packed = any_pb2.Any()
        packed.Pack(part)
        status.details.append(packed)
    return status


def _retry_after_s(error: ReIDError) -> float | None:
    if isinstance(error, OverloadedError):
        return error.retry_after_s
    return 1.0 if isinstance(error, UnavailableError) else None  # a drain or a warm-up takes seconds


def from_status(status: status_pb2.Status) -> ReIDError:
    """Convert a status back to the error it was made from, with message, field, facts and retry delay.

    A status without our ``ErrorInfo`` (gRPC's own, or a proxy's) is converted by its code.
    """
    info, field, retry_after_s = details.ErrorInfo(), "", 1.0
    for packed in status.details:
        bad, retry = details.BadRequest(), details.RetryInfo()
        if packed.Is(details.ErrorInfo.DESCRIPTOR):
            packed.Unpack(info)
        elif packed.Unpack(bad):
            field = bad.field_violations[0].field if bad.field_violations else ""
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    known = _ERROR_BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    leaf = known or _ERROR_BY_CODE.get(status.code, ReIDError)
    facts = dict(info.metadata)
    error = (
        leaf(status.message, retry_after_s=retry_after_s, field=field)
        if issubclass(leaf, OverloadedError)
        else leaf(status.message, field=field)
    )
    error.facts = facts
    return error
