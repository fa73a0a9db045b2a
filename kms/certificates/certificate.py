"""A certificate as the service records it.

    intended ──► issued          its serial number, names and the hash of what is signed are stored before the token signs
        └──────► abandoned       no outcome was recorded in time: never handed out, and revoked
    imported                     an authority elsewhere issued it

Revocation is beside that: an issued certificate is valid or revoked. It expires by the clock.
"""

import hashlib
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Final
from uuid import UUID

from kms.certificates.record import record_bytes
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId

SERIAL_BITS: Final = 159


class Issuance(StrEnum):
    """How far a certificate has come, as `certificates.issuance_status` has it."""

    INTENDED = "intended"
    ISSUED = "issued"
    ABANDONED = "abandoned"
    IMPORTED = "imported"


class RevocationReason(IntEnum):
    """CRLReason of RFC 5280 section 5.3.1, those that are offered. The others need more than a reason."""

    UNSPECIFIED = 0
    KEY_COMPROMISE = 1
    CA_COMPROMISE = 2
    AFFILIATION_CHANGED = 3
    SUPERSEDED = 4
    CESSATION_OF_OPERATION = 5
    PRIVILEGE_WITHDRAWN = 9
    AA_COMPROMISE = 10


COMPROMISES: Final = frozenset({RevocationReason.KEY_COMPROMISE, RevocationReason.CA_COMPROMISE, RevocationReason.AA_COMPROMISE})
"""After a revocation for one of these, the key is certified no more."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """Since when a certificate is revoked, and why."""

    at: datetime
    reason: RevocationReason


@dataclass(frozen=True, slots=True)
class Certificate:
    """A row of `certificates`. `version` advances with each change.

    `key_id` None: the key is held elsewhere. `issuer_id` None: an authority elsewhere issued it. `names` are `kind:value`.
    `tbs_sha256` is of the bytes that the issuer signs, `spki_sha256` of the public key (SPKI in DER). `der` is empty until the
    certificate is issued. `requested_by` None: the service itself.
    """

    certificate_id: UUID
    owner_id: UserId
    key_id: KeyId | None
    issuer_id: UUID | None
    profile: str
    serial_number: int
    issuer: str
    subject: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    is_ca: bool
    tbs_sha256: bytes
    spki_sha256: bytes
    requested_by: UserId | None
    created_at: datetime
    replaces: UUID | None = None
    crl_shard: int = 0
    issuance: Issuance = Issuance.INTENDED
    der: bytes = field(default=b"", repr=False)
    revocation: Revocation | None = None
    superseded_at: datetime | None = None
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `der` in hex; empty until the certificate is issued."""
        return hashlib.sha256(self.der).hexdigest() if self.der else ""

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the record covers."""
        revocation = self.revocation
        return record_bytes(
            b"certificate",
            self.certificate_id,
            self.owner_id,
            self.key_id,
            self.issuer_id,
            self.profile,
            serial_text(self.serial_number),
            self.issuer,
            self.subject,
            self.names,
            self.not_before,
            self.not_after,
            int(self.is_ca),
            self.tbs_sha256,
            self.spki_sha256,
            self.requested_by,
            self.created_at,
            self.replaces,
            self.crl_shard,
            self.issuance.value,
            self.fingerprint,
            None if revocation is None else revocation.at,
            None if revocation is None else int(revocation.reason),
            self.superseded_at,
            self.version,
        )

    def issued(self, der: bytes) -> "Certificate":
        """Return the certificate once it is signed."""
        return replace(self, issuance=Issuance.ISSUED, der=der, version=self.version + 1)

    def abandoned(self, at: datetime) -> "Certificate":
        """Return the certificate whose intent has no outcome: nobody got it, and its serial number is revoked."""
        revocation = Revocation(at, RevocationReason.CESSATION_OF_OPERATION)
        return replace(self, issuance=Issuance.ABANDONED, revocation=revocation, version=self.version + 1)

    def revoked(self, revocation: Revocation) -> "Certificate":
        """Return the certificate once it is revoked."""
        return replace(self, revocation=revocation, version=self.version + 1)

    def superseded(self, at: datetime) -> "Certificate":
        """Return the certificate once another should be used instead, from *at* on."""
        return replace(self, superseded_at=at, version=self.version + 1)


@dataclass(frozen=True, slots=True)
class CertificateFilter:
    """Which of the certificates that a caller sees to list; None does not restrict."""

    issuer_id: UUID | None = None
    key_id: KeyId | None = None


@dataclass(frozen=True, slots=True)
class CertificatePlace:
    """Where a list of certificates goes on: after this one."""

    created_at: datetime
    certificate_id: UUID


def new_serial_number(random: bytes) -> int:
    """Return a serial number of 159 bits, positive, made of 20 *random* bytes: RFC 5280 allows 20 octets without a sign bit."""
    return max(int.from_bytes(random) & ((1 << SERIAL_BITS) - 1), 1)


def serial_text(serial_number: int) -> str:
    """Return a serial number as it is stored: hex in lower case without leading zeros."""
    return f"{serial_number:x}"


def certificate_not_found() -> KmsError:
    """Return the one answer for a certificate that is not there and for one that the caller does not see."""
    return KmsError(Reason.CERTIFICATE_NOT_FOUND, "you see no such certificate")
