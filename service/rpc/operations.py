"""OperationService: long-running operations."""

from __future__ import annotations

from resight.errors import InputError
from resight.service.access.auth import current
from resight.service.access.interceptors import Context
from resight.service.rpc.convert import key_of_token, page_size, page_token, timestamp
from resight.service.storage.operations import Operation, OperationState
from resight.service.tenants import Tenants
from resight.status import to_status
from resight.v1 import operation_pb2, operation_pb2_grpc

OPERATION_STATES = {
    OperationState.PENDING: operation_pb2.OPERATION_STATE_PENDING,
    OperationState.RUNNING: operation_pb2.OPERATION_STATE_RUNNING,
    OperationState.SUCCEEDED: operation_pb2.OPERATION_STATE_SUCCEEDED,
    OperationState.FAILED: operation_pb2.OPERATION_STATE_FAILED,
    OperationState.CANCELLED: operation_pb2.OPERATION_STATE_CANCELLED,
    OperationState.INTERRUPTED: operation_pb2.OPERATION_STATE_INTERRUPTED,
}


def state_of(number: int) -> OperationState | None:
    """The state of a protobuf enum value; None = unspecified or unknown."""
    return next((state for state, value in OPERATION_STATES.items() if value == number), None)


def operation_message(operation: Operation) -> operation_pb2.Operation:
    """Convert an operation."""
    message = operation_pb2.Operation(
        operation_id=operation.operation_id,
        kind=operation.kind,
        state=OPERATION_STATES[operation.state],
        total=operation.total,
        succeeded=operation.succeeded,
        failed=operation.failed,
        skipped=operation.skipped,
        error=None if operation.error is None else to_status(operation.error),
        start_time=timestamp(operation.start_us),
        result=operation.result,
    )
    if operation.end_us is not None:
        message.end_time.CopyFrom(timestamp(operation.end_us))
    return message


class OperationServicer(operation_pb2_grpc.OperationServiceServicer):
    """See operation.proto; the operations are those of the caller's tenant."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def GetOperation(
        self, request: operation_pb2.GetOperationRequest, context: Context
    ) -> operation_pb2.GetOperationResponse:
        """State of an operation."""
        tenant = await self._tenants.tenant(current().tenant)
        found = await tenant.operations.get(request.operation_id)
        return operation_pb2.GetOperationResponse(operation=operation_message(found))

    async def ListOperations(
        self, request: operation_pb2.ListOperationsRequest, context: Context
    ) -> operation_pb2.ListOperationsResponse:
        """Operations, newest first, paginated."""
        limit = page_size(request.page_size)
        before = key_of_token(request.page_token) or None
        state = state_of(request.state)
        if request.state and state is None:
            raise InputError(f"unknown state {request.state}: see OperationState", field="state")
        tenant = await self._tenants.tenant(current().tenant)
        found = await tenant.operations.list_operations(before=before, limit=limit + 1, kind=request.kind, state=state)
        return operation_pb2.ListOperationsResponse(
            operations=[operation_message(one) for one in found[:limit]],
            next_page_token=page_token(found[limit - 1].key) if len(found) > limit else "",
        )

    async def CancelOperation(
        self, request: operation_pb2.CancelOperationRequest, context: Context
    ) -> operation_pb2.CancelOperationResponse:
        """Request cancellation; the operation ends at its next step."""
        tenant = await self._tenants.tenant(current().tenant)
        found = await tenant.operations.cancel(request.operation_id)
        return operation_pb2.CancelOperationResponse(operation=operation_message(found))
