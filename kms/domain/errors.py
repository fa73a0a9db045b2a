"""The one family of expected failures. Everything else that is raised is a bug.

A `KmsError` is told to the caller as it is: its message is written for the caller and holds no secret,
no SQL and no label of the token. Its reason is stable: clients, logs and metrics match on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final
from uuid import UUID

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
    KEK_IN_USE = "KEK_IN_USE"
    ENVELOPE_INVALID = "ENVELOPE_INVALID"
    RECORD_INVALID = "RECORD_INVALID"
    KEY_NOT_FOUND = "KEY_NOT_FOUND"
    ROTATION_NOT_FOUND = "ROTATION_NOT_FOUND"
    CERTIFICATE_INVALID = "CERTIFICATE_INVALID"
    CERTIFICATE_NOT_FOUND = "CERTIFICATE_NOT_FOUND"
    CERTIFICATE_REVOKED = "CERTIFICATE_REVOKED"
    AUTHORITY_NOT_FOUND = "AUTHORITY_NOT_FOUND"
    ACME_ACCOUNT_NOT_FOUND = "ACME_ACCOUNT_NOT_FOUND"
    AUTHORITY_INACTIVE = "AUTHORITY_INACTIVE"
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

    `metadata` names the field, state or mechanism at fault; like the message it is shown to the caller. `key_id` is the caller's
    key that the refusal is about, for the trail. None: no key was found.
    """

    def __init__(self, reason: Reason, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.key_id: UUID | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.reason, self.message, self.metadata, self.key_id)


def _restored(reason: Reason, message: str, metadata: dict[str, str], key_id: UUID | None) -> KmsError:
    error = KmsError(reason, message, **metadata)
    error.key_id = key_id
    return error


# Refusals that say nothing of the key which was found: another key is meant, or none was looked for.
_OF_NO_KEY: Final = frozenset({Reason.KEY_NOT_FOUND, Reason.ROTATION_NOT_FOUND, Reason.RATE_LIMITED})


@contextmanager
def about_key(key_id: UUID) -> Iterator[None]:
    """Give each error of the block the caller's key *key_id*, unless it names a key already. A bug gets it too."""
    try:
        yield
    except Exception as error:
        is_of_no_key = isinstance(error, KmsError) and error.reason in _OF_NO_KEY
        if key_of(error) is None and not is_of_no_key:
            error.key_id = key_id  # type: ignore[attr-defined]  # an exception takes any attribute
        raise


def key_of(error: Exception) -> UUID | None:
    """Return the caller's key that *error* is about, if it is known."""
    return getattr(error, "key_id", None)


def malformed(field: str, expected: str) -> KmsError:
    """Return the error for a bad request field, saying what was expected of it."""
    return KmsError(Reason.MALFORMED, f"{field}: {expected}", field=field)
