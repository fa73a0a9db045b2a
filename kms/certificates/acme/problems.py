"""What an ACME client is told when a request fails: problem documents (RFC 7807) of the types of RFC 8555 section 6.7."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kms.domain.errors import KmsError, Reason

URN: Final = "urn:ietf:params:acme:error:"


class ProblemType(StrEnum):
    """A type of problem, without its prefix."""

    ACCOUNT_DOES_NOT_EXIST = "accountDoesNotExist"
    ALREADY_REPLACED = "alreadyReplaced"
    ALREADY_REVOKED = "alreadyRevoked"
    BAD_CSR = "badCSR"
    BAD_NONCE = "badNonce"
    BAD_PUBLIC_KEY = "badPublicKey"
    BAD_REVOCATION_REASON = "badRevocationReason"
    BAD_SIGNATURE_ALGORITHM = "badSignatureAlgorithm"
    CONNECTION = "connection"
    DNS = "dns"
    EXTERNAL_ACCOUNT_REQUIRED = "externalAccountRequired"
    INCORRECT_RESPONSE = "incorrectResponse"
    INVALID_CONTACT = "invalidContact"
    MALFORMED = "malformed"
    ORDER_NOT_READY = "orderNotReady"
    RATE_LIMITED = "rateLimited"
    REJECTED_IDENTIFIER = "rejectedIdentifier"
    SERVER_INTERNAL = "serverInternal"
    UNAUTHORIZED = "unauthorized"
    UNSUPPORTED_CONTACT = "unsupportedContact"
    UNSUPPORTED_IDENTIFIER = "unsupportedIdentifier"


_STATUS: Final = {
    ProblemType.UNAUTHORIZED: 403,
    ProblemType.ORDER_NOT_READY: 403,
    ProblemType.ALREADY_REPLACED: 409,
    ProblemType.RATE_LIMITED: 429,
    ProblemType.SERVER_INTERNAL: 500,
    ProblemType.EXTERNAL_ACCOUNT_REQUIRED: 403,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem that is kept with an order or a challenge."""

    type: ProblemType
    detail: str


class AcmeError(Exception):
    """A request failed. `status` is that of HTTP; `location` names what was found instead."""

    def __init__(self, kind: ProblemType, detail: str, *, status: int = 0, location: str = "") -> None:
        super().__init__(detail)
        self.problem = Problem(kind, detail)
        self.status = status or _STATUS.get(kind, 400)
        self.location = location


def malformed(detail: str) -> AcmeError:
    """Return the error for a request that is not as RFC 8555 writes it."""
    return AcmeError(ProblemType.MALFORMED, detail)


def not_found() -> AcmeError:
    """Return the one answer for what is not there and for what is another account's."""
    return AcmeError(ProblemType.MALFORMED, "there is no such resource", status=404)


_TYPES: Final = {
    Reason.PERMISSION_DENIED: ProblemType.UNAUTHORIZED,
    Reason.CREDENTIALS_INVALID: ProblemType.UNAUTHORIZED,
    Reason.AUTHORITY_INACTIVE: ProblemType.UNAUTHORIZED,
    Reason.CERTIFICATE_INVALID: ProblemType.BAD_CSR,
    Reason.MALFORMED: ProblemType.MALFORMED,
    Reason.RATE_LIMITED: ProblemType.RATE_LIMITED,
}


def error_of(error: KmsError) -> AcmeError:
    """Return a refusal of the service as an ACME client understands it. What a client cannot help is 503: it tries again."""
    if error.reason is Reason.AUTHORITY_NOT_FOUND:
        return not_found()
    kind = _TYPES.get(error.reason)
    if kind is None:
        return AcmeError(ProblemType.SERVER_INTERNAL, "not available now: try again later", status=503)
    return AcmeError(kind, error.message)
