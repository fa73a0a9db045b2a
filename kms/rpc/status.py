"""Errors on the wire: the one map from a reason to a gRPC status, and the only call of `abort`."""

from collections.abc import Mapping
from typing import Final, NoReturn, assert_never

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kms.domain.errors import INTERNAL, KmsError, Reason

ERROR_DOMAIN = "kms"
_RETRY_SECONDS = 1


def code_of(reason: Reason) -> code_pb2.Code.ValueType:  # noqa: C901 - one flat table; the checker proves it complete
    """Return the `google.rpc.Code` for *reason*."""
    match reason:
        case (
            Reason.MALFORMED
            | Reason.DIGEST_LENGTH
            | Reason.CIPHERTEXT_INVALID
            | Reason.INCORRECT_KEY
            | Reason.CERTIFICATE_INVALID
        ):
            return code_pb2.INVALID_ARGUMENT
        case (
            Reason.WRONG_PURPOSE
            | Reason.KEY_PRE_ACTIVE
            | Reason.KEY_ACTIVE
            | Reason.KEY_INACTIVE
            | Reason.KEY_EXPIRED
            | Reason.KEY_COMPROMISED
            | Reason.KEY_REVOKED
            | Reason.KEY_PENDING_DESTRUCTION
            | Reason.KEY_DESTROYED
            | Reason.USAGE_LIMIT_REACHED
            | Reason.CUSTODY_UNAVAILABLE
            | Reason.KEK_IN_USE
            | Reason.CERTIFICATE_REVOKED
            | Reason.AUTHORITY_INACTIVE
        ):
            return code_pb2.FAILED_PRECONDITION
        case Reason.ENVELOPE_INVALID | Reason.RECORD_INVALID:
            return code_pb2.DATA_LOSS
        case (
            Reason.KEY_NOT_FOUND
            | Reason.ROTATION_NOT_FOUND
            | Reason.CERTIFICATE_NOT_FOUND
            | Reason.AUTHORITY_NOT_FOUND
            | Reason.ACME_ACCOUNT_NOT_FOUND
        ):
            return code_pb2.NOT_FOUND
        case Reason.PERMISSION_DENIED:
            return code_pb2.PERMISSION_DENIED
        case Reason.CREDENTIALS_INVALID:
            return code_pb2.UNAUTHENTICATED
        case Reason.NAME_TAKEN | Reason.REQUEST_ID_REUSED:
            return code_pb2.ALREADY_EXISTS
        case Reason.STALE:
            return code_pb2.ABORTED
        case Reason.RATE_LIMITED:
            return code_pb2.RESOURCE_EXHAUSTED
        case Reason.HSM_MECHANISM_UNSUPPORTED:
            return code_pb2.UNIMPLEMENTED
        case Reason.HSM_UNAVAILABLE | Reason.HSM_KEK_MISSING | Reason.STORE_UNAVAILABLE:
            return code_pb2.UNAVAILABLE
        case Reason.OUTCOME_UNKNOWN:
            return code_pb2.UNKNOWN
        case Reason.DEADLINE_EXCEEDED:
            return code_pb2.DEADLINE_EXCEEDED
        case _:
            assert_never(reason)


CODE_NAMES: Final[Mapping[str, str]] = {
    "OK": "OK",
    "CANCELLED": "CANCELLED",
    INTERNAL: "INTERNAL",
    **{reason: code_pb2.Code.Name(code_of(reason)) for reason in Reason},
}
"""The name of the gRPC code with which each outcome of a call ends."""


def status_of(error: KmsError) -> status_pb2.Status:
    """Return *error* as the caller sees it: code, message and `google.rpc.ErrorInfo`."""
    status = _status(code_of(error.reason), error.message, error.reason, error.metadata)
    if error.reason is Reason.RATE_LIMITED:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=_RETRY_SECONDS)))
    return status


def internal_status(request_id: str) -> status_pb2.Status:
    """Return what a caller learns of a bug: the id under which it is in the log, and nothing else."""
    return _status(code_pb2.INTERNAL, "internal error", INTERNAL, {"request_id": request_id})


async def abort(context: "grpc.aio.ServicerContext[bytes, object]", status: status_pb2.Status) -> NoReturn:
    """End the call with *status*. An `abort` that is not awaited would send OK *and* the response: this is the only one."""
    found = rpc_status.to_status(status)
    await context.abort(found.code, found.details, found.trailing_metadata)


def _status(code: int, message: str, reason: str, metadata: dict[str, str]) -> status_pb2.Status:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=metadata))
    return status_pb2.Status(code=code, message=message, details=[detail])
