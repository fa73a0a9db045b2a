"""Whether an authority may issue: it is active, and neither its certificate nor that of an authority above it is revoked."""

from datetime import datetime

from kms.certificates.authority import Authority, AuthorityRef, authority_inactive, check_active
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.x509.certificates import parse_certificate
from kms.domain.key_row import record_invalid


async def check_may_issue(authorities: Authorities, certificates: Certificates, authority: Authority) -> datetime:
    """Raise AUTHORITY_INACTIVE unless *authority* may issue certificates now. Return the moment."""
    check_active(authority, now := await certificates.now())
    above = authority
    while not await is_revoked(certificates, above):
        if above.parent_id is None:
            return now
        found = await authorities.find(AuthorityRef(authority_id=above.parent_id))
        if found is None:
            raise record_invalid()
        above = found
    raise authority_inactive(authority, "revoked")


async def is_revoked(certificates: Certificates, authority: Authority) -> bool:
    """Whether the certificate of *authority* is revoked. Of one that was issued elsewhere nobody here knows."""
    if authority.certificate is None or (authority.parent_id is None and authority.chain):
        return False
    serial_number = parse_certificate(authority.certificate).serial_number
    return await certificates.is_revoked(authority.parent_id or authority.authority_id, serial_number)
