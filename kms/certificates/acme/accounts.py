"""Accounts: made by users, taken and changed by clients."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from kms.app.access import Access
from kms.app.ports import Call, User
from kms.certificates.acme.account import BIND_WITHIN, Account, AccountStatus, Mac, binding_secret, thumbprint_of
from kms.certificates.acme.jose import PublicKey, parse_key, parse_signed
from kms.certificates.acme.ports import AccountPlace, Accounts
from kms.certificates.acme.problems import AcmeError, ProblemType, malformed
from kms.certificates.authority import Authority, AuthorityRef
from kms.certificates.issuing import Issuing
from kms.certificates.profiles import SERVER
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import parse_uuid
from kms.domain.permissions import Permission, permission_denied

CONTACTS_MAX: Final = 10
_CONTACT: Final = re.compile(r"mailto:[!-~]{1,254}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class NewAccount:
    """An account that was made, and the secret that binds a client's key to it. Nobody can read the secret again."""

    account: Account
    secret: bytes


@dataclass(frozen=True, slots=True)
class ManagingAccounts:
    """CreateAcmeAccount, ListAcmeAccounts and DeactivateAcmeAccount: what users do."""

    accounts: Accounts
    issuing: Issuing
    mac: Mac

    async def create(self, call: Call, ref: AuthorityRef) -> NewAccount:
        """Make an account of an authority for the caller, who must be one of its issuers of the profile `server`.

        Raises AUTHORITY_NOT_FOUND, PERMISSION_DENIED, CREDENTIALS_INVALID.
        """
        authority = await self.issuing.require(ref)
        check_may_issue(call.user, authority)
        now = await self.issuing.now()
        account = Account(
            account_id=UUID(bytes=await self.issuing.issuer.random(16), version=4),
            authority=authority.name,
            user_id=call.user.user_id,
            created_at=now,
            bind_before=now + BIND_WITHIN,
        )
        secret = await binding_secret(self.mac, account)
        await self.accounts.add(call, account)
        return NewAccount(account, secret)

    async def page(self, caller: User, *, after: AccountPlace | None, limit: int) -> Sequence[Account]:
        """Return at most *limit* accounts of the caller, the newest first."""
        return await self.accounts.page(caller.user_id, after=after, limit=limit)

    async def deactivate(self, call: Call, account_id: UUID) -> Account:
        """End an account of the caller for good. Its certificates stay valid. Raises ACME_ACCOUNT_NOT_FOUND, STALE."""
        account = await self.accounts.find(account_id)
        if account is None or account.user_id != call.user.user_id:
            raise KmsError(Reason.ACME_ACCOUNT_NOT_FOUND, "you have no such account")
        if account.status is AccountStatus.DEACTIVATED:
            return account
        ended = account.deactivated()
        await self.accounts.change(call, ended, "acme.account_deactivated", call.peer)
        return ended


@dataclass(frozen=True, slots=True)
class ClientAccounts:
    """newAccount, an account's own address, and keyChange: what clients do. *peer* is the address of the client."""

    accounts: Accounts
    access: Access
    issuing: Issuing
    mac: Mac

    async def find(self, authority: str, account_id: str) -> Account:
        """Return a valid account of an authority. Raises accountDoesNotExist, unauthorized."""
        account = await self.accounts.find(parse_uuid(account_id, field="kid")) if _UUID.fullmatch(account_id) else None
        return _valid(authority, account)

    async def find_by_key(self, authority: str, key: PublicKey) -> Account | None:
        """Return the account of an authority whose client has *key*, or None. Raises unauthorized for one that has ended."""
        account = await self.accounts.find_by_key(authority, thumbprint_of(key.text))
        return None if account is None else _valid(authority, account)

    async def caller(self, account: Account, peer: str) -> Call:
        """Return the call in which an account acts as its user. Raises CREDENTIALS_INVALID for one who may not call any more."""
        return Call(await self.access.admit(account.user_id), "", peer)

    async def bind(self, authority: str, key: PublicKey, wish: dict[str, Any], url: str, peer: str) -> Account:
        """Have a client take the account that its external account binding names. Raises a problem, CREDENTIALS_INVALID."""
        contacts = parse_contacts(wish.get("contact", []))
        if "externalAccountBinding" not in wish:
            problem = "externalAccountBinding: expected one, with the key id and the secret of `kms acme create`"
            raise AcmeError(ProblemType.EXTERNAL_ACCOUNT_REQUIRED, problem)
        binding = parse_signed(wish["externalAccountBinding"])
        header = binding.header
        if header.get("url") != url or "nonce" in header or parse_key(binding.object()).text != key.text:
            raise malformed("externalAccountBinding: expected the url of newAccount, no nonce, and the account's own key")
        key_id = header.get("kid")
        account = None
        if isinstance(key_id, str) and _UUID.fullmatch(key_id):
            account = await self.accounts.find(parse_uuid(key_id, field="kid"))
        if account is None or account.authority != authority:
            raise AcmeError(ProblemType.UNAUTHORIZED, "externalAccountBinding: there is no such key id")
        binding.verify_mac(await binding_secret(self.mac, account))
        if account.status is not AccountStatus.PENDING or account.bind_before <= await self.issuing.now():
            raise AcmeError(ProblemType.UNAUTHORIZED, "externalAccountBinding: this key id was used, or is too old")
        await self.caller(account, peer)
        bound = account.bound(key.text, contacts)
        await self._change(bound, "acme.account_bound", peer)
        return bound

    async def update(self, account: Account, wish: dict[str, Any], peer: str) -> Account:
        """Change the contacts of an account, or end it, as its client asks. Raises a problem."""
        status = wish.get("status")
        if status == AccountStatus.DEACTIVATED:
            changed, event = account.deactivated(), "acme.account_deactivated"
        elif status not in (None, AccountStatus.VALID):
            raise malformed("status: expected deactivated")
        elif "contact" not in wish or (contacts := parse_contacts(wish["contact"])) == account.contacts:
            return account
        else:
            changed, event = account.with_contacts(contacts), "acme.account_changed"
        await self._change(changed, event, peer)
        return changed

    async def change_key(self, account: Account, payload: object, account_url: str, url: str, peer: str) -> Account:
        """Give an account the key that has signed *payload* (RFC 8555 section 7.3.5). Raises a problem."""
        inner = parse_signed(payload)
        key = parse_key(inner.header.get("jwk"))
        inner.verify(key)
        wish = inner.object()
        if inner.header.get("url") != url or "nonce" in inner.header or wish.get("account") != account_url:
            raise malformed("payload: expected the url of keyChange, no nonce, and the account that asks")
        if parse_key(wish.get("oldKey")).text != account.jwk:
            raise malformed("oldKey: expected the key that the account has now")
        changed = account.with_key(key.text)
        await self._change(changed, "acme.account_key_changed", peer)
        return changed

    async def _change(self, account: Account, event: str, peer: str) -> None:
        try:
            await self.accounts.change(None, account, event, peer)
        except KmsError as error:
            if error.reason is Reason.NAME_TAKEN:
                raise AcmeError(ProblemType.MALFORMED, "another account has this key", status=409) from None
            raise


def check_may_issue(user: User, authority: Authority) -> None:
    """Raise PERMISSION_DENIED unless *user* may issue server certificates from *authority*."""
    if Permission.CERTS_ISSUE not in user.permissions:
        raise permission_denied(Permission.CERTS_ISSUE)
    if not authority.issues(user.user_id, SERVER.name):
        message = f"the manager of the authority {authority.name} has not let you issue certificates of profile {SERVER.name}"
        raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_ISSUE)


def parse_contacts(found: object) -> tuple[str, ...]:
    """Return the contacts of an account, or raise a problem."""
    if not isinstance(found, list) or len(found) > CONTACTS_MAX or not all(isinstance(each, str) for each in found):
        raise AcmeError(ProblemType.INVALID_CONTACT, f"contact: expected a list of at most {CONTACTS_MAX} addresses")
    if any(not each.startswith("mailto:") for each in found):
        raise AcmeError(ProblemType.UNSUPPORTED_CONTACT, "contact: expected addresses like mailto:admin@example.com")
    if any(not _CONTACT.fullmatch(each) or each.count("@") != 1 or "," in each or "?" in each for each in found):
        raise AcmeError(ProblemType.INVALID_CONTACT, "contact: expected one address of e-mail after each mailto:")
    return tuple(found)


def _valid(authority: str, account: Account | None) -> Account:
    if account is None or account.authority != authority or account.status is AccountStatus.PENDING:
        raise AcmeError(ProblemType.ACCOUNT_DOES_NOT_EXIST, "there is no such account")
    if account.status is not AccountStatus.VALID:
        raise AcmeError(ProblemType.UNAUTHORIZED, "the account is deactivated")
    return account
