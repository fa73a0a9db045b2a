"""What a call was refused with, as a client reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

TIMEOUT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The code, and `google.rpc.ErrorInfo`."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]


def refusal(call: Callable[..., Any], request: Message) -> Refusal:
    """Return what *request* is refused with; fail if it is not."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT_SECONDS)
    return refusal_of(caught.value)


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Return what *error* says. An error without ErrorInfo, which is not one of ours, has an empty reason."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    info = _info(status) if status is not None else error_details_pb2.ErrorInfo()
    return Refusal(error.code(), info.reason, error.details() or "", dict(info.metadata))


def item_reason(status: status_pb2.Status) -> str:
    """Return the reason with which an item of a batch was refused."""
    return _info(status).reason


def _info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            assert info.domain == "kms"
            break
    return info
