"""What is read back of certificates that are stored."""

from hashlib import sha256
from typing import Final

from cryptography import x509

from kms.certificates.constraints import NameConstraints
from kms.certificates.names import GeneralName, Subject, certificate_invalid
from kms.certificates.x509.certificates import load_certificate, parse_certificate
from kms.certificates.x509.extensions import extension_of
from kms.certificates.x509.naming import constraints_of, subject_of

_SERIAL_BITS_MAX: Final = 160  # some authorities take the sign bit of RFC 5280 for the number


def tbs_sha256_of(der: bytes) -> bytes:
    """Return SHA-256 of what the issuer of a certificate signed."""
    return sha256(load_certificate(der).tbs_certificate_bytes).digest()


def named_in(der: bytes) -> tuple[Subject, tuple[GeneralName, ...]]:
    """Return the subject and the names of a certificate of ours. Raises CERTIFICATE_INVALID for attributes of others."""
    return subject_of(load_certificate(der).subject, field="certificate"), parse_certificate(der).names


def limits_in(der: bytes) -> NameConstraints | None:
    """Return the name constraints of a certificate of ours."""
    found = extension_of(load_certificate(der).extensions, x509.NameConstraints)
    return None if found is None else constraints_of(found)


def check_storable(der: bytes) -> None:
    """Raise CERTIFICATE_INVALID for a certificate that the database cannot hold: names with NUL, a serial number too long."""
    parsed = parse_certificate(der)
    if any("\0" in text for text in (parsed.subject, parsed.issuer, *(name.value for name in parsed.names))):
        raise certificate_invalid("certificate", "expected names without NUL")
    if parsed.serial_number.bit_length() > _SERIAL_BITS_MAX:
        raise certificate_invalid("certificate", "expected a serial number of at most 20 bytes")
