"""revokeCert: by the account that ordered a certificate, or by whoever has its key."""

from dataclasses import dataclass
from typing import Any, Final

from kms.certificates.acme.account import Account
from kms.certificates.acme.accounts import ClientAccounts
from kms.certificates.acme.encoding import from_base64url
from kms.certificates.acme.jose import PublicKey
from kms.certificates.acme.ports import Accounts, Orders, Revoke
from kms.certificates.acme.problems import AcmeError, ProblemType, not_found
from kms.certificates.acme.renewal import Renewal, identifier_of
from kms.certificates.certificate import RevocationReason
from kms.certificates.issuing import Issuing
from kms.certificates.x509.certificates import parse_certificate
from kms.domain.errors import KmsError

# Those that say something of the authority are not for its clients to give.
_REASONS: Final = frozenset(RevocationReason) - {RevocationReason.CA_COMPROMISE, RevocationReason.AA_COMPROMISE}


@dataclass(frozen=True, slots=True)
class ClientRevoking:
    """Revokes certificates that ACME has issued. *signer* is the account that asks, or the key of the certificate."""

    accounts: Accounts
    clients: ClientAccounts
    orders: Orders
    issuing: Issuing
    renewal: Renewal
    revoke: Revoke

    async def __call__(self, authority: str, signer: Account | PublicKey, wish: dict[str, Any], peer: str) -> None:
        """Revoke the certificate in *wish*. Raises unauthorized, alreadyRevoked, badRevocationReason and other problems."""
        der = from_base64url(wish.get("certificate"), field="certificate")
        reason = _parse_reason(wish.get("reason", 0))
        try:
            identifier, key = identifier_of(der), parse_certificate(der).public_key
        except KmsError as error:
            raise AcmeError(ProblemType.MALFORMED, error.message) from None
        certificate_id = (await self.renewal.require(authority, identifier)).certificate_id
        orders = await self.orders.of_certificate(certificate_id)
        account = await self.accounts.find(orders[0].account_id) if orders else None
        if account is None:
            raise not_found()
        call = await self.clients.caller(account, peer)
        certificate = (await self.issuing.find(call.user, certificate_id)).certificate
        if certificate.der != der or orders[0].certificate_id != certificate_id:
            raise not_found()
        is_allowed = signer.spki == key if isinstance(signer, PublicKey) else signer.account_id == account.account_id
        if not is_allowed:
            raise AcmeError(ProblemType.UNAUTHORIZED, "expected the account that ordered the certificate, or its key")
        if certificate.revocation is not None:
            raise AcmeError(ProblemType.ALREADY_REVOKED, "the certificate is revoked already")
        await self.revoke(call, certificate_id, reason)


def _parse_reason(found: object) -> RevocationReason:
    if type(found) is int and found in _REASONS:
        return RevocationReason(found)
    known = ", ".join(str(int(reason)) for reason in sorted(_REASONS))
    raise AcmeError(ProblemType.BAD_REVOCATION_REASON, f"reason: expected one of {known}")
