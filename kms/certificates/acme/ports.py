"""What ACME needs of the outside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kms.app.ports import Call
from kms.certificates.acme.account import Account
from kms.certificates.acme.order import Order
from kms.certificates.certificate import Certificate, RevocationReason
from kms.certificates.names import GeneralName
from kms.domain.ids import UserId


@dataclass(frozen=True, slots=True)
class AccountPlace:
    """Where a list of accounts goes on: after this one."""

    created_at: datetime
    account_id: UUID


class Accounts(Protocol):
    """Stored accounts. Each that is returned is proven by its MAC, and the journal knows no later version of it.

    Every method raises RECORD_INVALID for a record that is not as the service left it, HSM_UNAVAILABLE and STORE_UNAVAILABLE.
    """

    async def find(self, account_id: UUID) -> Account | None:
        """Return an account, or None."""
        ...

    async def find_by_key(self, authority: str, thumbprint: str) -> Account | None:
        """Return the account of an authority whose client has a key, or None."""
        ...

    async def page(self, user_id: UserId, *, after: AccountPlace | None, limit: int) -> Sequence[Account]:
        """Return at most *limit* accounts of a user, after the place *after*, the newest first."""
        ...

    async def add(self, call: Call, account: Account) -> None:
        """Store a new account of the caller. Raises CREDENTIALS_INVALID."""
        ...

    async def change(self, call: Call | None, account: Account, event: str, peer: str) -> None:
        """Store the next version of an account. None as *call*: its client asks. The journal has it before this returns.

        Raises STALE if it changed meanwhile, NAME_TAKEN if another account of the authority has the key, CREDENTIALS_INVALID,
        OUTCOME_UNKNOWN if the journal cannot be written.
        """
        ...


class Orders(Protocol):
    """Stored orders. Each that is returned is proven by its MAC.

    Every method raises RECORD_INVALID for a record that is not as the service left it, HSM_UNAVAILABLE and STORE_UNAVAILABLE.
    """

    async def find(self, order_id: UUID) -> Order | None:
        """Return an order, or None."""
        ...

    async def of_certificate(self, certificate_id: UUID) -> Sequence[Order]:
        """Return the orders that a certificate was issued for: one."""
        ...

    async def page(self, account_id: UUID, *, limit: int) -> Sequence[Order]:
        """Return at most *limit* orders of an account, the newest first."""
        ...

    async def add(self, order: Order, details: Mapping[str, object], peer: str) -> None:
        """Store a new order. Raises RATE_LIMITED for an account that makes too many."""
        ...

    async def change(self, order: Order, event: str | None, details: Mapping[str, object], peer: str) -> bool:
        """Store the next version of an order. Return False if it changed meanwhile."""
        ...


class Probes(Protocol):
    """Asks a host or the DNS for what a client put there. Each raises an AcmeError that says what was found instead."""

    async def ask_http(self, name: GeneralName, token: str, key_authorization: str) -> None:
        """Look for *key_authorization* on port 80 of a host (RFC 8555 section 8.3)."""
        ...

    async def ask_dns(self, name: GeneralName, digest: str) -> None:
        """Look for *digest* in the TXT records of a domain (RFC 8555 section 8.4)."""
        ...


class Revoke(Protocol):
    """Revokes a certificate for a user: `Revoking.revoke`."""

    async def __call__(self, call: Call, certificate_id: UUID, reason: RevocationReason, /) -> Certificate:
        """Return the certificate once it is revoked."""
        ...
