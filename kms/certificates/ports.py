"""What the certificate authority needs of the outside."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kms.app.ports import Call, Repeat, User
from kms.certificates.authority import Authority, AuthorityRef
from kms.certificates.certificate import Certificate, CertificateFilter, CertificatePlace
from kms.domain.ids import KeyId, UserId


class Authorities(Protocol):
    """Stored authorities. Each that is returned is proven by its MAC, and the journal knows no later version of it.

    Every method raises RECORD_INVALID for a record that is not as the service left it, HSM_UNAVAILABLE and STORE_UNAVAILABLE.
    """

    async def now(self) -> datetime:
        """Return the moment by the database's clock. Raises STORE_UNAVAILABLE where the host's differs by over a minute."""
        ...

    async def find(self, ref: AuthorityRef) -> Authority | None:
        """Return the authority, or None. A name alone is that of its active generation, else of the newest."""
        ...

    async def generations(self, name: str) -> Sequence[Authority]:
        """Return all generations of a name, the newest first."""
        ...

    async def page(self, *, after: str, limit: int) -> Sequence[Authority]:
        """Return the generations of at most *limit* names after the name *after*, in the order of the names."""
        ...

    async def add(self, call: Call, authority: Authority) -> None:
        """Store a new authority of the caller. Raises NAME_TAKEN, CREDENTIALS_INVALID."""
        ...

    async def change(self, call: Call, authority: Authority, event: str, details: Mapping[str, object]) -> None:
        """Store the next version of an authority. Raises STALE if it changed meanwhile, CREDENTIALS_INVALID.

        The journal has the version before this returns; OUTCOME_UNKNOWN if it cannot be written.
        """
        ...

    async def roll_over(self, call: Call, successor: Authority, predecessor: Authority) -> None:
        """Store the next versions of two generations of a name at once: one becomes active, the other superseded.

        Raises what `change` raises.
        """
        ...


class Certificates(Protocol):
    """Stored certificates. Each that is returned is proven by its MAC, and the journal does not know better of it.

    Every method raises RECORD_INVALID for a record that is not as the service left it, HSM_UNAVAILABLE and STORE_UNAVAILABLE.
    """

    async def now(self) -> datetime:
        """Return the moment by the database's clock. Raises STORE_UNAVAILABLE where the host's differs by over a minute."""
        ...

    async def find(self, caller: User, certificate_id: UUID) -> Certificate | None:
        """Return a certificate that *caller* sees, or None: of their own, or of an authority that they manage or issue from."""
        ...

    async def find_any(self, certificate_id: UUID) -> Certificate | None:
        """Return a certificate for the service itself, or None."""
        ...

    async def find_by_serial(self, issuer_id: UUID, serial_number: int) -> Certificate | None:
        """Return a certificate of an authority for the service itself, or None."""
        ...

    async def is_revoked(self, issuer_id: UUID, serial_number: int) -> bool:
        """Whether a certificate of an authority is revoked: its record says so, or the journal, or there is no record."""
        ...

    async def is_compromised(self, spki_sha256: bytes) -> bool:
        """Whether a certificate of a key was revoked since the key is compromised: a record says so, or the journal."""
        ...

    async def count_living(self, issuer_id: UUID, *, owner_id: UserId | None, shard: int | None) -> int:
        """Return how many certificates of an authority a CRL may list: all but those that ended over two days ago.

        Of an owner, and of a shard, where given. It counts no further than 10,000. The database alone says so.
        """
        ...

    async def of_key(self, owner_id: UserId, key_id: KeyId) -> Sequence[Certificate]:
        """Return the certificates of a key for the service itself, the newest first, at most 100."""
        ...

    async def page(
        self, caller: User, which: CertificateFilter, *, after: CertificatePlace | None, limit: int
    ) -> Sequence[Certificate]:
        """Return at most *limit* certificates that *caller* sees, after the place *after*, the newest first."""
        ...

    async def add(self, call: Call | None, certificate: Certificate, issuer: Authority | None) -> None:
        """Store a certificate that is about to be signed, or one that was imported. None as *call*: the service itself.

        Raises AUTHORITY_INACTIVE or STALE if *issuer* changed meanwhile, CREDENTIALS_INVALID.
        """
        ...

    async def complete(self, call: Call | None, certificate: Certificate, repeat: Repeat | None = None) -> None:
        """Store a certificate that was signed, and *repeat* with it.

        Raises STALE if it was abandoned meanwhile: it is revoked then, and the journal has that.
        """
        ...

    async def without_outcome(self, seconds: float, limit: int) -> Sequence[UUID]:
        """Return at most *limit* certificates whose intent is older than *seconds* and has no outcome."""
        ...

    async def abandon(self, certificate: Certificate) -> bool:
        """Store that a certificate was never handed out and is revoked. Return False if it has an outcome meanwhile.

        The journal has it before anybody reads it so. Raises OUTCOME_UNKNOWN if the journal cannot be written.
        """
        ...

    async def revoke(self, call: Call | None, certificate: Certificate) -> bool:
        """Store that a certificate is revoked, which `certificate.revocation` says. None as *call*: the service itself.

        The journal has it before this returns. Return False if the certificate changed meanwhile. Raises CREDENTIALS_INVALID,
        OUTCOME_UNKNOWN if the journal cannot be written.
        """
        ...

    async def note_revoked(self, certificate: Certificate) -> None:
        """Have the journal know that a certificate of an authority is revoked, unless it does.

        A process may have been killed before it wrote the line. Raises OUTCOME_UNKNOWN if the journal cannot be written.
        """
        ...

    async def supersede(self, call: Call | None, certificate: Certificate) -> bool:
        """Store from when on another certificate should be used instead. Return False if it changed meanwhile."""
        ...


class ServiceUsers(Protocol):
    """The users of the service itself, who own its keys."""

    async def find_or_create_service(self, name: str) -> UserId:
        """Return the user of that name, made if need be."""
        ...

    async def find(self, user_id: UserId, *, recent: bool = False) -> User | None:
        """See `kms.app.ports.Users.find`."""
        ...
