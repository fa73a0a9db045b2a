"""The one family of expected failures. Everything else that is raised is a bug.

A `KmsError` is told to the caller as it is: its message is written for the caller and holds no secret,
no SQL and no label of the token. Its reason is stable: clients, logs and metrics match on it.
"""

from enum import StrEnum
from typing import Final

INTERNAL: Final = "INTERNAL"
"""What stands for the reason where a call ends with a bug."""


class Reason(StrEnum):
    """Why a request was refused: `google.rpc.ErrorInfo.reason`. A value is never reused."""

    MALFORMED = "MALFORMED"
    DIGEST_LENGTH = "DIGEST_LENGTH"
    CIPHERTEXT_INVALID = "CIPHERTEXT_INVALID"
    INCORRECT_KEY = "INCORRECT_KEY"
    WRONG_PURPOSE = "WRONG_PURPOSE"
    KEY_PRE_ACTIVE = "KEY_PRE_ACTIVE"
    KEY_ACTIVE = "KEY_ACTIVE"
    KEY_INACTIVE = "KEY_INACTIVE"
    KEY_EXPIRED = "KEY_EXPIRED"
    KEY_COMPROMISED = "KEY_COMPROMISED"
    KEY_REVOKED = "KEY_REVOKED"
    KEY_PENDING_DESTRUCTION = "KEY_PENDING_DESTRUCTION"
    KEY_DESTROYED = "KEY_DESTROYED"
    USAGE_LIMIT_REACHED = "USAGE_LIMIT_REACHED"
    CUSTODY_UNAVAILABLE = "CUSTODY_UNAVAILABLE"
    ENVELOPE_INVALID = "ENVELOPE_INVALID"
    RECORD_INVALID = "RECORD_INVALID"
    KEY_NOT_FOUND = "KEY_NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CREDENTIALS_INVALID = "CREDENTIALS_INVALID"
    NAME_TAKEN = "NAME_TAKEN"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    STALE = "STALE"
    RATE_LIMITED = "RATE_LIMITED"
    HSM_MECHANISM_UNSUPPORTED = "HSM_MECHANISM_UNSUPPORTED"
    HSM_UNAVAILABLE = "HSM_UNAVAILABLE"
    HSM_KEK_MISSING = "HSM_KEK_MISSING"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"


class KmsError(Exception):
    """A request was refused or could not be served, for a stated reason.

    `metadata` names the field, state or mechanism at fault; like the message it is shown to the caller.
    """

    def __init__(self, reason: Reason, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.reason, self.message, self.metadata)


def _restored(reason: Reason, message: str, metadata: dict[str, str]) -> KmsError:
    return KmsError(reason, message, **metadata)


def malformed(field: str, expected: str) -> KmsError:
    """Return the error for a bad request field, saying what was expected of it."""
    return KmsError(Reason.MALFORMED, f"{field}: {expected}", field=field)
