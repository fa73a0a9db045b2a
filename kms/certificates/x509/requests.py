"""Requests for certificates: PKCS#10 (RFC 2986), read from whoever sends one.

All that a request says is checked before any of it is believed. What breaks a rule is refused with CERTIFICATE_INVALID.
"""

from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtensionOID

from kms.certificates.names import GeneralName, Subject, certificate_invalid
from kms.certificates.profiles import KeyUsage, Profile, PublicKeyType, Unwanted
from kms.certificates.x509.extensions import UNREADABLE, extension_of, usages_of
from kms.certificates.x509.naming import names_of, subject_of
from kms.certificates.x509.public_keys import check_strong
from kms.certificates.x509.signing import ALGORITHMS, ALGORITHMS_RULE, public_key_of, spki_of, type_of

REQUEST_BYTES_MAX: Final = 65_536

_PEM: Final = b"-----BEGIN "
# The service makes its own key identifier whatever the request says.
_KNOWN_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    }
)


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """What a request asks for. Its signature was verified, so the sender has the private key of `public_key` (SPKI in DER)."""

    public_key: bytes
    key_type: PublicKeyType
    key_bits: int
    subject: Subject
    names: tuple[GeneralName, ...]
    is_ca: bool
    key_usage: frozenset[KeyUsage]
    extended_key_usage: frozenset[str]
    unknown_extensions: tuple[str, ...]

    def check_extensions(self, profile: Profile) -> None:
        """Raise CERTIFICATE_INVALID for an extension that *profile* neither gives nor drops."""
        profile.check_usages(self.key_usage, self.extended_key_usage, is_ca=self.is_ca)
        if self.unknown_extensions and profile.unknown_extensions is Unwanted.REFUSE:
            unknown = ", ".join(self.unknown_extensions)
            raise certificate_invalid("csr", f"expected no extension {unknown} in profile {profile.name}")


def parse_request(data: bytes) -> CertificateRequest:
    """Return the request that *data* holds, in PEM or DER. Raises CERTIFICATE_INVALID for all that breaks a rule.

    It must be signed by its own key, with a hash of SHA-2. Its key must be strong, its subject and names well formed.
    """
    if not 0 < len(data) <= REQUEST_BYTES_MAX:
        raise certificate_invalid("csr", f"expected 1 to {REQUEST_BYTES_MAX} bytes")
    try:
        return _parsed(_loaded(data))
    except UNREADABLE:
        raise certificate_invalid("csr", "expected one request of PKCS#10, in PEM or DER") from None


def _loaded(data: bytes) -> x509.CertificateSigningRequest:
    if _PEM not in data:  # some tools write a text for people before it
        return x509.load_der_x509_csr(data)
    if data.count(_PEM) != 1:
        raise certificate_invalid("csr", "expected one request")
    return x509.load_pem_x509_csr(data)


def _parsed(csr: x509.CertificateSigningRequest) -> CertificateRequest:
    key = public_key_of(csr.public_key())
    check_strong(key)
    key_type, key_bits = type_of(key)
    if csr.signature_algorithm_oid not in ALGORITHMS:
        raise certificate_invalid("csr", ALGORITHMS_RULE)
    if not csr.is_signature_valid:
        raise certificate_invalid("csr", "expected a signature by the key that is to be certified")
    extensions = csr.extensions
    names = extension_of(extensions, x509.SubjectAlternativeName)
    constraints = extension_of(extensions, x509.BasicConstraints)
    purposes = extension_of(extensions, x509.ExtendedKeyUsage)
    return CertificateRequest(
        spki_of(key),
        key_type,
        key_bits,
        subject_of(csr.subject, field="csr"),
        names_of(names or (), field="csr"),
        constraints is not None and constraints.ca,
        usages_of(extension_of(extensions, x509.KeyUsage)),
        frozenset(purpose.dotted_string for purpose in purposes or ()),
        tuple(each.oid.dotted_string for each in extensions if each.oid not in _KNOWN_EXTENSIONS),
    )
