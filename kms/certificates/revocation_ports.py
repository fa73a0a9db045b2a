"""What revocations, CRLs and OCSP answers need of the outside, beside the authorities and certificates of `ports`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kms.app.ports import Call
from kms.certificates.authority import Authority
from kms.certificates.certificate import Certificate, Revocation
from kms.certificates.crl import Crl
from kms.certificates.x509.signing import Unsigned
from kms.domain.ids import KeyId, UserId


@dataclass(frozen=True, slots=True)
class StoredCrl:
    """A row of `crls`, which proves nothing: whoever owns the database can write any. `number` is that of the column."""

    number: int
    crl: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JournaledRevocation:
    """A revocation as the journal has it, outside the database."""

    serial_number: int
    revocation: Revocation
    expires_at: datetime


class Crls(Protocol):
    """Stored CRLs, and which certificates belong on the next. Every method raises STORE_UNAVAILABLE."""

    async def find(self, issuer_id: UUID, shard: int) -> StoredCrl | None:
        """Return the last CRL of a shard, or None."""
        ...

    async def revoked(self, issuer_id: UUID, shard: int, since: datetime | None) -> Mapping[int, UUID]:
        """Return the certificates of a shard that the database calls revoked, by serial number.

        Without those that had expired at *since*. Nothing of it is proven.
        """
        ...

    async def proven(self, certificate_ids: Sequence[UUID]) -> Sequence[Certificate]:
        """Return those of the certificates whose record proves that they are revoked. The log names those that were edited.

        The journal knows of them before this returns. Raises HSM_UNAVAILABLE, OUTCOME_UNKNOWN.
        """
        ...

    async def store(self, issuer_id: UUID, shard: int, previous: int, crl: Crl, der: bytes) -> bool:
        """Store the CRL that follows the row with the number *previous*, 0: no row. Return False where the row is another."""
        ...

    async def to_look_at(self, limit: int) -> Sequence[tuple[UUID, int]]:
        """Return the shards, by authority and number, whose CRL is missing, old or may lack a certificate."""
        ...


class Answers(Protocol):
    """Stored OCSP answers. Every method raises STORE_UNAVAILABLE."""

    async def find(self, issuer_id: UUID, serial_number: int, hash_name: str) -> bytes | None:
        """Return the last answer about a certificate to requests with that hash, or None. It proves nothing."""
        ...

    async def store(self, issuer_id: UUID, serial_number: int, answer: "NewAnswer") -> None:
        """Store an answer."""
        ...

    async def missing(self, issuer_id: UUID, good_until: datetime, limit: int) -> Sequence[UUID]:
        """Return certificates of an authority without an answer that is good until then and says what their row says."""
        ...

    async def forget(self) -> None:
        """Remove answers that are no longer good."""
        ...

    async def issuer_ids(self) -> Sequence[UUID]:
        """Return the authorities that have a certificate which has not ended."""
        ...

    async def responder_ids(self, issuer_id: UUID) -> Sequence[UUID]:
        """Return the certificates of the profile `ocsp` of an authority that have not ended, the one that ends last first."""
        ...


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """An answer that was signed, to be stored."""

    hash_name: str
    answer: bytes = field(repr=False)
    is_revoked: bool
    this_update: datetime
    next_update: datetime


class Signer(Protocol):
    """Signs with the keys of the service itself, charged and recorded as any use.

    Each method raises the reason of the key's state, HSM_UNAVAILABLE, STORE_UNAVAILABLE and OUTCOME_UNKNOWN.
    """

    async def sign_for(self, call: Call | None, authority: Authority, unsigned: Unsigned, details: Mapping[str, str]) -> bytes:
        """Return *unsigned* signed by *authority*, as DER. None as *call*: the service does it by itself."""
        ...

    async def sign(
        self, call: Call | None, owner: UserId, key_id: KeyId, bound_to: str, unsigned: Unsigned, details: Mapping[str, str]
    ) -> bytes:
        """Return *unsigned* signed by a key of the service that is bound to *bound_to*, as DER."""
        ...


class JournaledRevocations(Protocol):
    """What the journal knows of certificates that were revoked. Strangers have it asked: each question costs what is new.

    Each method raises STORE_UNAVAILABLE if the journal cannot be read.
    """

    def find(self, issuer_id: UUID, serial_number: int) -> JournaledRevocation | None:
        """Return the revocation of a certificate, or None if the journal knows of none."""
        ...

    def of_shard(self, issuer_id: UUID, shard: int, *, after: int) -> Sequence[JournaledRevocation]:
        """Return the revocations of a shard without the first *after* of them. Their order never changes."""
        ...
