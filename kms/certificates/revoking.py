"""RevokeCertificate: who may, and what follows.

the record and the line of the journal ──► the answer does not leave before
                                       ──► the next CRL (where it fails, a job makes it)
"""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog

from kms.app.ports import Call, User
from kms.certificates.authority import Authority, AuthorityRef
from kms.certificates.certificate import Certificate, Issuance, Revocation, RevocationReason, certificate_not_found
from kms.certificates.crls import CrlPublishing, SignedCrl
from kms.certificates.ports import Authorities, Certificates
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.permissions import Permission

_ATTEMPTS: Final = 3
_LOG = structlog.get_logger("kms.certificates")


@dataclass(frozen=True, slots=True)
class Revoking:
    """Revokes certificates of the service's own authorities."""

    authorities: Authorities
    certificates: Certificates
    publishing: CrlPublishing

    async def revoke(self, call: Call, certificate_id: UUID, reason: RevocationReason) -> Certificate:
        """Revoke a certificate and publish the next CRL. One that is revoked already stays as it is.

        The owner of the certificate may, whoever issues that profile from its authority, and the manager of the authority.
        Raises CERTIFICATE_NOT_FOUND, PERMISSION_DENIED, MALFORMED for a certificate of an authority elsewhere,
        CREDENTIALS_INVALID, STALE, OUTCOME_UNKNOWN if the journal cannot be written.
        """
        for _ in range(_ATTEMPTS):
            certificate = await self.certificates.find(call.user, certificate_id)
            if certificate is None:
                raise certificate_not_found()
            authority = await self._issuer_of(certificate)
            _check_may_revoke(call.user, certificate, authority)
            if certificate.revocation is not None:
                await self.certificates.note_revoked(certificate)
                return certificate
            revoked = certificate.revoked(Revocation(await self.certificates.now(), reason))
            if await self.certificates.revoke(call, revoked):
                await self._publish(authority, revoked)
                return revoked
        raise KmsError(Reason.STALE, "the certificate is changed all the time: nothing was changed")

    async def newest_crl(self, authority: Authority, shard: int) -> SignedCrl:
        """Return the newest CRL of a shard; the first is made now. Raises what `CrlPublishing.publish` raises."""
        return await self.publishing.current(authority, shard) or await self.publishing.publish(authority, shard)

    async def publish(self, authority: Authority, shard: int) -> SignedCrl:
        """Make a new CRL of a shard. Raises what `CrlPublishing.publish` raises."""
        return await self.publishing.publish(authority, shard, even_unchanged=True)

    async def _issuer_of(self, certificate: Certificate) -> Authority:
        if certificate.issuer_id is None or certificate.issuance is not Issuance.ISSUED:
            raise malformed("certificate_id", "expected a certificate that an authority of this service has issued")
        authority = await self.authorities.find(AuthorityRef(authority_id=certificate.issuer_id))
        if authority is None:
            raise certificate_not_found()
        return authority

    async def _publish(self, authority: Authority, certificate: Certificate) -> None:
        """Publish the next CRL. The certificate is revoked whether that succeeds or not."""
        try:
            await self.publishing.publish(authority, certificate.crl_shard)
        except KmsError as error:
            authority_id = str(authority.authority_id)
            _LOG.warning("CRL not published yet", authority=authority_id, reason=error.reason, message=error.message)


def _check_may_revoke(caller: User, certificate: Certificate, authority: Authority) -> None:
    """Raise PERMISSION_DENIED unless *caller* owns the certificate, issues its profile or manages its authority."""
    issues = authority.issues(caller.user_id, certificate.profile) and Permission.CERTS_ISSUE in caller.permissions
    manages = authority.manager_id == caller.user_id and Permission.CERTS_MANAGE in caller.permissions
    if certificate.owner_id != caller.user_id and not issues and not manages:
        raise KmsError(
            Reason.PERMISSION_DENIED,
            f"expected its owner, an issuer of profile {certificate.profile} or the manager of the authority",
            permission=Permission.CERTS_ISSUE,
        )
