"""Who sent a request: its signature, its nonce, its address and its account, in the order that costs strangers most.

read ──► the nonce is ours ──► the signature verifies ──► the nonce is used up ──► only now anything else
"""

import json
from dataclasses import dataclass
from typing import Any

from kms.certificates.acme.account import Account
from kms.certificates.acme.accounts import ClientAccounts
from kms.certificates.acme.encoding import parse_object
from kms.certificates.acme.jose import PublicKey, Signed, parse_key, parse_signed
from kms.certificates.acme.nonces import Nonces
from kms.certificates.acme.problems import AcmeError, ProblemType, malformed


@dataclass(frozen=True, slots=True)
class Authentic:
    """A request that its sender has signed. `account` None: the sender has shown a key and no account."""

    signed: Signed
    key: PublicKey
    account: Account | None

    @property
    def is_look(self) -> bool:
        """Whether it is a POST-as-GET (RFC 8555 section 6.3)."""
        return not self.signed.payload

    def object(self) -> dict[str, Any]:
        """Return the payload as a JSON object, or raise a problem."""
        return self.signed.object()

    def check_look(self) -> None:
        """Raise a problem unless it is a POST-as-GET."""
        if not self.is_look:
            raise malformed("payload: expected an empty one here")

    def require_account(self) -> Account:
        """Return the account, or raise a problem: the request must name it with kid."""
        if self.account is None:
            raise malformed("protected: expected kid, the address of the account")
        return self.account


@dataclass(frozen=True, slots=True)
class Authenticating:
    """Believes requests. *accounts* finds the keys of accounts."""

    accounts: ClientAccounts
    nonces: Nonces

    async def __call__(self, body: bytes, url: str, authority: str, accounts_url: str) -> Authentic:
        """Return the request in *body*, which was sent to *url*. An account's address is *accounts_url* and its id.

        Raises a problem.
        """
        signed = parse_signed(parse_object(body, field="body"))
        header = signed.header
        if header.get("url") != url:
            raise AcmeError(ProblemType.UNAUTHORIZED, "protected: expected as url the address of this request")
        nonce = self.nonces.check(header.get("nonce"))
        if ("jwk" in header) == ("kid" in header):
            raise malformed("protected: expected either jwk or kid")
        account = None
        if "kid" in header:
            account = await self.accounts.find(authority, _id_in(header["kid"], accounts_url))
            key = parse_key(json.loads(account.jwk))
        else:
            key = parse_key(header["jwk"])
        signed.verify(key)
        await self.nonces.spend(nonce)
        return Authentic(signed, key, account)


def _id_in(kid: object, accounts_url: str) -> str:
    if not isinstance(kid, str) or not kid.startswith(accounts_url):
        raise AcmeError(ProblemType.ACCOUNT_DOES_NOT_EXIST, "protected: expected as kid the address of an account here")
    return kid.removeprefix(accounts_url)
