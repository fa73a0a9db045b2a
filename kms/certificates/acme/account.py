"""An account of an ACME client.

pending ──► valid ──► deactivated
   │          the client's key changes with keyChange
   made by a user, for a client that knows the secret
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final
from uuid import UUID

from kms.certificates.acme.encoding import base64url
from kms.certificates.record import record_bytes
from kms.domain.ids import UserId

BIND_WITHIN: Final = timedelta(days=7)
"""How long a client may take a new account. Its secret is of no use afterwards."""

Mac = Callable[[bytes], Awaitable[bytes]]


class AccountStatus(StrEnum):
    """Where an account is in its life, as `acme_accounts.status` has it."""

    PENDING = "pending"
    VALID = "valid"
    DEACTIVATED = "deactivated"


@dataclass(frozen=True, slots=True)
class Account:
    """A row of `acme_accounts`. `jwk` is the client's public key as RFC 7638 spells it; empty while pending."""

    account_id: UUID
    authority: str
    user_id: UserId
    created_at: datetime
    bind_before: datetime
    status: AccountStatus = AccountStatus.PENDING
    jwk: str = ""
    contacts: tuple[str, ...] = ()
    version: int = 1

    @property
    def thumbprint(self) -> str:
        """The thumbprint of the client's key (RFC 7638), of which key authorizations are made. Empty while pending."""
        return thumbprint_of(self.jwk) if self.jwk else ""

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the record covers."""
        return record_bytes(
            b"ACME account",
            self.account_id,
            self.authority,
            self.user_id,
            self.created_at,
            self.bind_before,
            self.status.value,
            self.jwk,
            self.contacts,
            self.version,
        )

    def bound(self, jwk: str, contacts: tuple[str, ...]) -> "Account":
        """Return the account once a client has taken it."""
        return self._changed(status=AccountStatus.VALID, jwk=jwk, contacts=contacts)

    def with_contacts(self, contacts: tuple[str, ...]) -> "Account":
        """Return the account with other contacts."""
        return self._changed(contacts=contacts)

    def with_key(self, jwk: str) -> "Account":
        """Return the account with another key of the client."""
        return self._changed(jwk=jwk)

    def deactivated(self) -> "Account":
        """Return the account once it may do nothing more."""
        return self._changed(status=AccountStatus.DEACTIVATED)

    def _changed(self, **changes: object) -> "Account":
        return replace(self, version=self.version + 1, **changes)  # type: ignore[arg-type]


async def binding_secret(mac: Mac, account: Account) -> bytes:
    """Return the secret with which a client binds its key to *account*: 32 bytes, stored nowhere. Raises HSM_UNAVAILABLE.

    *mac* is of a key that never leaves the token.
    """
    return await mac(record_bytes(b"ACME binding secret", account.account_id, account.authority, account.user_id))


def thumbprint_of(jwk: str) -> str:
    """Return the thumbprint of a public key in the one spelling of RFC 7638."""
    return base64url(hashlib.sha256(jwk.encode()).digest())
