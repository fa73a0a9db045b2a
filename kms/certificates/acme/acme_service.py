"""The servicer of AcmeService."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from kms.app.ports import Call
from kms.certificates.acme.account import Account, AccountStatus
from kms.certificates.acme.accounts import ManagingAccounts
from kms.certificates.acme.ports import AccountPlace
from kms.certificates.acme.wire import Addresses
from kms.certificates.authority import AuthorityRef, parse_authority_name
from kms.domain.errors import malformed
from kms.domain.fields import open_token, parse_optional_number, token_of
from kms.domain.ids import parse_uuid
from kms.rpc import convert, enums
from kms.v1 import acme_pb2 as pb

PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 200
ACCOUNT_STATUSES: Final[Mapping["pb.AcmeAccountStatus.ValueType", AccountStatus]] = {
    pb.ACME_ACCOUNT_STATUS_PENDING: AccountStatus.PENDING,
    pb.ACME_ACCOUNT_STATUS_VALID: AccountStatus.VALID,
    pb.ACME_ACCOUNT_STATUS_DEACTIVATED: AccountStatus.DEACTIVATED,
}


@dataclass(frozen=True, slots=True)
class AcmeServicer:
    """Decodes, calls `ManagingAccounts`, encodes. *base* is where ACME is served, `https://host[:port]`; empty: nowhere."""

    accounts: ManagingAccounts
    base: str

    async def CreateAcmeAccount(self, request: pb.CreateAcmeAccountRequest, call: Call) -> pb.CreateAcmeAccountResponse:
        """Make an account."""
        name = parse_authority_name(request.authority, field="authority")
        made = await self.accounts.create(call, AuthorityRef(name=name))
        directory = Addresses(self.base, name).of("directory") if self.base else ""
        return pb.CreateAcmeAccountResponse(account=wire_account(made.account), secret=made.secret, directory_url=directory)

    async def ListAcmeAccounts(self, request: pb.ListAcmeAccountsRequest, call: Call) -> pb.ListAcmeAccountsResponse:
        """List the accounts of the caller."""
        limit = parse_optional_number(request.page_size, field="page_size", most=PAGE_MAX) or PAGE_DEFAULT
        found = await self.accounts.page(call.user, after=_parse_place(request.page_token), limit=limit + 1)
        last = found[limit - 1] if len(found) > limit else None
        token = "" if last is None else token_of(last.created_at.isoformat(), str(last.account_id))
        return pb.ListAcmeAccountsResponse(accounts=map(wire_account, found[:limit]), next_page_token=token)

    async def DeactivateAcmeAccount(
        self, request: pb.DeactivateAcmeAccountRequest, call: Call
    ) -> pb.DeactivateAcmeAccountResponse:
        """End an account."""
        ended = await self.accounts.deactivate(call, parse_uuid(request.account_id, field="account_id"))
        return pb.DeactivateAcmeAccountResponse(account=wire_account(ended))


def wire_account(account: Account) -> pb.AcmeAccount:
    """Return an account as its user sees it."""
    return pb.AcmeAccount(
        id=str(account.account_id),
        authority=account.authority,
        status=enums.number_of(ACCOUNT_STATUSES, account.status),
        contacts=account.contacts,
        thumbprint=account.thumbprint,
        created_at=convert.stamp(account.created_at),
        bind_before=convert.stamp(account.bind_before),
    )


def _parse_place(token: str) -> AccountPlace | None:
    if not token:
        return None
    expected = malformed("page_token", "expected next_page_token of the page before")
    match open_token(token, expected=expected):
        case [str(moment), str(account_id)]:
            try:
                place = AccountPlace(datetime.fromisoformat(moment), UUID(account_id))
            except ValueError:
                raise expected from None
            if place.created_at.tzinfo is None:
                raise expected
            return place
        case _:
            raise expected
