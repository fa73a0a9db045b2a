"""The last look at a certificate before it is signed: what is written is read again and held against what was meant.

It sees what the token would sign, so it finds what the writer got wrong, whoever asked for the certificate.
"""

from collections.abc import Iterator
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtensionOID, ObjectIdentifier

from kms.certificates.names import certificate_invalid
from kms.certificates.x509.certificates import (
    ParsedCertificate,
    ToCertify,
    load_certificate,
    parse_certificate,
    path_length_of,
)
from kms.certificates.x509.extensions import extension_of
from kms.certificates.x509.naming import constraints_of, subject_of

# Extensions that are critical, and those that are not (RFC 5280 section 4.2). The alternative names are where they stand alone.
_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.NAME_CONSTRAINTS})
_ALWAYS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    }
)
Rules = Iterator[tuple[bool, str]]


def lint(der: bytes, to_certify: ToCertify) -> None:
    """Raise CERTIFICATE_INVALID unless *der*, a draft or a certificate, says what *to_certify* does and keeps to its profile."""
    certificate, parsed, profile = load_certificate(der), parse_certificate(der), to_certify.profile
    for is_kept, what in (*_identity(certificate, parsed, to_certify), *_extensions(certificate, parsed, to_certify)):
        if not is_kept:
            raise certificate_invalid("certificate", f"expected the {what} that was to be certified")
    profile.check_key(parsed.key_type, parsed.key_bits)
    profile.check_subject(to_certify.subject, to_certify.names)
    profile.check_validity(parsed.validity)
    if to_certify.issuer is not None:
        to_certify.issuer.check_names(to_certify.names)


def _identity(certificate: x509.Certificate, parsed: ParsedCertificate, to_certify: ToCertify) -> Rules:
    issuer = parsed if to_certify.issuer is None else parse_certificate(to_certify.issuer.chain[0])
    yield certificate.version is x509.Version.v3, "version"
    yield parsed.serial_number == to_certify.serial_number, "serial number"
    yield parsed.public_key == to_certify.public_key, "key"
    yield subject_of(certificate.subject, field="certificate") == to_certify.subject, "subject"
    yield parsed.names == to_certify.names, "names"
    yield parsed.validity == to_certify.validity, "validity"
    yield parsed.issuer_der == issuer.subject_der, "issuer"
    yield issuer.subject_key_id in {None, parsed.authority_key_id}, "key identifier of the issuer"


def _extensions(certificate: x509.Certificate, parsed: ParsedCertificate, to_certify: ToCertify) -> Rules:
    profile, constraints = to_certify.profile, extension_of(certificate.extensions, x509.NameConstraints)
    yield parsed.is_ca is profile.is_ca, "basic constraints"
    yield parsed.path_length == (path_length_of(to_certify) if profile.is_ca else None), "path length"
    yield parsed.key_usage == profile.key_usage, "key usage"
    yield parsed.extended_key_usage == profile.extended_key_usage, "extended key usage"
    yield (None if constraints is None else constraints_of(constraints)) == to_certify.name_constraints, "name constraints"
    found = {extension.oid: extension.critical for extension in certificate.extensions}
    expected = _ALWAYS | frozenset(_of_this(parsed, to_certify))
    yield found.keys() == expected, "extensions"
    critical = _CRITICAL if to_certify.subject.attributes else _CRITICAL | {ExtensionOID.SUBJECT_ALTERNATIVE_NAME}
    yield all(is_critical is (oid in critical) for oid, is_critical in found.items()), "criticality of extensions"


def _of_this(parsed: ParsedCertificate, to_certify: ToCertify) -> Iterator[ObjectIdentifier]:
    """Yield the extensions that this certificate has beside those that all have."""
    profile = to_certify.profile
    if profile.extended_key_usage:
        yield ExtensionOID.EXTENDED_KEY_USAGE
    if to_certify.names:
        yield ExtensionOID.SUBJECT_ALTERNATIVE_NAME
    if to_certify.name_constraints is not None:
        yield ExtensionOID.NAME_CONSTRAINTS
    if profile.ocsp_no_check:
        yield ExtensionOID.OCSP_NO_CHECK
    if parsed.crl_urls:
        yield ExtensionOID.CRL_DISTRIBUTION_POINTS
    if parsed.ocsp_urls or parsed.issuer_urls:
        yield ExtensionOID.AUTHORITY_INFORMATION_ACCESS
