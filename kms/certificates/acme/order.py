"""An order of certificates, with its authorizations: one for each name, which the client proves to hold by a challenge.

    pending ──► ready ──► processing ──► valid        each ──► invalid: a name was not proven, or it expired
       all names are proven   finalize: the request   the certificate is issued

The status follows from the rest, so that no two fields can disagree. An authorization belongs to one order, and proves nothing
for another.
"""

import json
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from kms.certificates.acme.encoding import base64url, from_base64url
from kms.certificates.acme.problems import Problem, ProblemType
from kms.certificates.names import WILDCARD, GeneralName, NameKind
from kms.certificates.record import record_bytes

ORDER_LASTS: Final = timedelta(hours=24)
RETRY_AFTER: Final = timedelta(seconds=60)
"""How long one worker has for a challenge or a certificate, before another takes it up."""


class Status(StrEnum):
    """The status of an order, an authorization or a challenge."""

    PENDING = "pending"
    READY = "ready"
    PROCESSING = "processing"
    VALID = "valid"
    INVALID = "invalid"
    DEACTIVATED = "deactivated"
    EXPIRED = "expired"


class ChallengeType(StrEnum):
    """How a client proves that it holds a name."""

    HTTP = "http-01"
    DNS = "dns-01"


@dataclass(frozen=True, slots=True)
class Authorization:
    """Whether a client has proven a name. `challenge` is the one that it chose; `changed_at`: when, or when that ended."""

    name: GeneralName
    token: str
    status: Status = Status.PENDING
    challenge: ChallengeType | None = None
    changed_at: datetime | None = None
    error: Problem | None = None

    @property
    def identifier(self) -> str:
        """The value of the identifier: without the wildcard, which is said beside it."""
        return self.name.value.removeprefix(WILDCARD)

    @property
    def challenges(self) -> tuple[ChallengeType, ...]:
        """The challenges that prove the name: DNS alone for a wildcard, and HTTP alone for an address (RFC 8738)."""
        if self.challenge is not None:
            return (self.challenge,)
        if self.name.kind is NameKind.IP:
            return (ChallengeType.HTTP,)
        return (ChallengeType.DNS,) if self.name.is_wildcard else (ChallengeType.HTTP, ChallengeType.DNS)

    def is_waiting(self, challenge: ChallengeType, now: datetime) -> bool:
        """Whether *challenge* should be asked now: it is new, or the worker that asked has not come back."""
        if self.status is Status.PENDING:
            return challenge in self.challenges
        is_left = self.changed_at is not None and now - self.changed_at >= RETRY_AFTER
        return self.status is Status.PROCESSING and self.challenge is challenge and is_left


@dataclass(frozen=True, slots=True)
class Order:
    """A row of `acme_orders`. `csr` is DER, from finalize on; `taken_at` is when a worker began to issue."""

    order_id: UUID
    account_id: UUID
    authorizations: tuple[Authorization, ...]
    created_at: datetime
    expires_at: datetime
    csr: bytes = b""
    taken_at: datetime | None = None
    certificate_id: UUID | None = None
    error: Problem | None = None
    replaces: str = ""
    version: int = 1

    @property
    def names(self) -> tuple[GeneralName, ...]:
        """The names that the certificate is to have."""
        return tuple(authorization.name for authorization in self.authorizations)

    def status(self, now: datetime) -> Status:
        """Return the status at *now*."""
        if self.certificate_id is not None:
            return Status.VALID
        statuses = {self.authorization_status(index, now) for index in range(len(self.authorizations))}
        if self.error is not None or self.expires_at <= now or not statuses <= _HOPEFUL:
            return Status.INVALID
        if self.csr:
            return Status.PROCESSING
        return Status.READY if statuses == {Status.VALID} else Status.PENDING

    def authorization_status(self, index: int, now: datetime) -> Status:
        """Return the status of an authorization at *now*. That a challenge is being asked is for the challenge to say."""
        status = self.authorizations[index].status
        if self.expires_at <= now and self.certificate_id is None and status in _HOPEFUL:
            return Status.EXPIRED
        return Status.PENDING if status is Status.PROCESSING else status

    def is_left(self, now: datetime) -> bool:
        """Whether a certificate should be issued, and the worker that began has not come back."""
        taken_at = self.taken_at
        return self.status(now) is Status.PROCESSING and (taken_at is None or now - taken_at >= RETRY_AFTER)

    def with_authorization(self, index: int, authorization: Authorization) -> "Order":
        """Return the order with one of its authorizations changed."""
        changed = (*self.authorizations[:index], authorization, *self.authorizations[index + 1 :])
        return self.changed(authorizations=changed)

    def changed(self, **changes: object) -> "Order":
        """Return the order after a change: the next version."""
        return replace(self, version=self.version + 1, **changes)  # type: ignore[arg-type]

    def content(self) -> str:
        """Return what the row has as JSON: all that no column has."""
        return json.dumps(
            {
                "authorizations": [_wire(authorization) for authorization in self.authorizations],
                "csr": base64url(self.csr),
                "taken_at": _text(self.taken_at),
                "error": _problem(self.error),
                "replaces": self.replaces,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the record covers."""
        return record_bytes(
            b"ACME order",
            self.order_id,
            self.account_id,
            self.content(),
            self.certificate_id,
            self.created_at,
            self.expires_at,
            self.version,
        )


_HOPEFUL: Final = frozenset({Status.PENDING, Status.PROCESSING, Status.VALID})


def contents(text: str) -> dict[str, Any]:
    """Return the fields of an order in what `Order.content` made. Raises ValueError, KeyError or TypeError for anything else."""
    found = json.loads(text)
    return {
        "authorizations": tuple(_authorization(each) for each in found["authorizations"]),
        "csr": from_base64url(found["csr"], field="csr"),
        "taken_at": _moment(found["taken_at"]),
        "error": _parsed_problem(found["error"]),
        "replaces": str(found["replaces"]),
    }


def _wire(authorization: Authorization) -> dict[str, object]:
    return {
        "kind": authorization.name.kind.value,
        "name": authorization.name.value,
        "token": authorization.token,
        "status": authorization.status.value,
        "challenge": authorization.challenge,
        "changed_at": _text(authorization.changed_at),
        "error": _problem(authorization.error),
    }


def _authorization(found: dict[str, Any]) -> Authorization:
    return Authorization(
        GeneralName(NameKind(found["kind"]), str(found["name"])),
        str(found["token"]),
        Status(found["status"]),
        None if found["challenge"] is None else ChallengeType(found["challenge"]),
        _moment(found["changed_at"]),
        _parsed_problem(found["error"]),
    )


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _problem(problem: Problem | None) -> dict[str, str] | None:
    return None if problem is None else {"type": problem.type.value, "detail": problem.detail}


def _parsed_problem(found: dict[str, str] | None) -> Problem | None:
    return None if found is None else Problem(ProblemType(found["type"]), found["detail"])
