"""Renewal information (RFC 9773): when a client should renew a certificate.

The window is the same for each look, and lies in the last third of the certificate's life. Of a certificate that is revoked, or
that another has superseded, it is over: the client renews at once.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kms.certificates.acme.encoding import base64url, from_base64url
from kms.certificates.acme.problems import not_found
from kms.certificates.certificate import Certificate
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.x509.certificates import parse_certificate

LOOK_AGAIN: Final = timedelta(hours=6)
_SERIAL_BYTES_MAX: Final = 20
_WINDOW_PARTS: Final = 24  # of a certificate's life, one is the window
_KEY_ID_BYTES: Final = 20


@dataclass(frozen=True, slots=True)
class Window:
    """Between which moments to renew."""

    begins_at: datetime
    ends_at: datetime


@dataclass(frozen=True, slots=True)
class Renewal:
    """Finds certificates by the identifiers of RFC 9773 section 4.1, and says when to renew them."""

    authorities: Authorities
    certificates: Certificates

    async def window(self, authority: str, identifier: str) -> Window:
        """Return when to renew a certificate of *authority*. Anybody may ask. Raises a problem with status 404."""
        return window_of(await self.require(authority, identifier))

    async def require(self, authority: str, identifier: object) -> Certificate:
        """Return a certificate of *authority*, or raise a problem with status 404."""
        key_id, separator, serial = identifier.partition(".") if isinstance(identifier, str) else ("", "", "")
        issuer_key, number = from_base64url(key_id, field="certificate"), from_base64url(serial, field="certificate")
        if not separator or len(issuer_key) != _KEY_ID_BYTES or not 0 < len(number) <= _SERIAL_BYTES_MAX:
            raise not_found()
        for each in await self.authorities.generations(authority):
            if each.certificate is None or parse_certificate(each.certificate).subject_key_id != issuer_key:
                continue
            found = await self.certificates.find_by_serial(each.authority_id, int.from_bytes(number))
            if found is not None and found.der:
                return found
        raise not_found()


def window_of(certificate: Certificate) -> Window:
    """Return when to renew *certificate*."""
    life = certificate.not_after - certificate.not_before
    if certificate.revocation is not None:
        return Window(certificate.not_before, min(certificate.revocation.at, certificate.not_after))
    if certificate.superseded_at is not None:
        return Window(certificate.not_before, certificate.superseded_at)
    begins_at = certificate.not_before + life * 2 / 3
    return Window(begins_at, begins_at + life / _WINDOW_PARTS)


def identifier_of(certificate: bytes) -> str:
    """Return the identifier of a certificate (DER): the key identifier of its issuer, and its serial number."""
    parsed = parse_certificate(certificate)
    number = parsed.serial_number
    return f"{base64url(parsed.authority_key_id or b'')}.{base64url(number.to_bytes(number.bit_length() // 8 + 1))}"
