"""Calls that fail, and the details of their status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status


def rich(call: Callable[[], Any]) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Run a call that fails: its code and its details by short name."""
    with pytest.raises(grpc.RpcError) as failure:
        call()
    found = {}
    for packed in rpc_status.from_call(failure.value).details:
        name = packed.TypeName().rpartition(".")[2]
        message = getattr(details, name)()
        packed.Unpack(message)
        found[name] = message
    return failure.value.code(), found
