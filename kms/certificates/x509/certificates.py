"""Certificates: written for the token to sign, and read (RFC 5280)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ObjectIdentifier

from kms.certificates.constraints import NameConstraints
from kms.certificates.names import GeneralName, NameKind, Subject, certificate_invalid
from kms.certificates.profiles import KeyUsage, Profile, PublicKeyType, Validity
from kms.certificates.x509.extensions import UNREADABLE, extension_of, usages_of, x509_key_usage
from kms.certificates.x509.naming import constraints_of, raw_name, x509_constraints, x509_name, x509_names
from kms.certificates.x509.signing import PublicKey, Unsigned, load_public_key, public_key_of, spki_of, type_of, unsigned

CERTIFICATE_BYTES_MAX: Final = 65_536
SERIAL_BITS_MAX: Final = 159
"""A positive number of at most 20 bytes (RFC 5280 section 4.1.2.2)."""


@dataclass(frozen=True, slots=True)
class IssuerCertificate:
    """The certificate of an issuer, and what those above it let it do. Made by `issuer_of`.

    `chain` holds certificates in DER: the issuer's own, then those above it. `path_length` is how many authorities may stand
    below the issuer; None is no limit.
    """

    chain: tuple[bytes, ...]
    validity: Validity
    path_length: int | None
    constraints: tuple[NameConstraints, ...]
    extended_key_usage: frozenset[str] | None = None
    """What all of them let it certify for; None is no limit."""

    def check_names(self, names: Sequence[GeneralName]) -> None:
        """Raise CERTIFICATE_INVALID for a name that the issuer, or an authority above it, may not certify."""
        for constraints in self.constraints:
            constraints.check(names)


@dataclass(frozen=True, slots=True)
class ToCertify:
    """All that a certificate says. `issuer` None: the key signs its own certificate. `public_key` is an SPKI in DER.

    `path_length` None: that of the profile. The addresses are those of the issuer's CRL, OCSP responder and certificate.
    """

    serial_number: int
    subject: Subject
    names: tuple[GeneralName, ...]
    public_key: bytes
    profile: Profile
    validity: Validity
    issuer: IssuerCertificate | None = None
    crl_url: str | None = None
    ocsp_url: str | None = None
    issuer_url: str | None = None
    path_length: int | None = None
    name_constraints: NameConstraints | None = None


@dataclass(frozen=True, slots=True)
class ParsedCertificate:
    """What a certificate says. `names` are as they stand there, unchecked; those of other kinds are left out.

    `subject` and `issuer` are as RFC 4514 writes them, `subject_der` and `issuer_der` as the certificate holds them.
    """

    serial_number: int
    subject: str
    issuer: str
    subject_der: bytes
    issuer_der: bytes
    names: tuple[GeneralName, ...]
    validity: Validity
    public_key: bytes
    key_type: PublicKeyType
    key_bits: int
    is_ca: bool
    path_length: int | None
    key_usage: frozenset[KeyUsage]
    extended_key_usage: tuple[str, ...]
    subject_key_id: bytes | None
    authority_key_id: bytes | None
    crl_urls: tuple[str, ...]
    ocsp_urls: tuple[str, ...]
    issuer_urls: tuple[str, ...]
    fingerprint: bytes
    """SHA-256 of the DER."""


def build_certificate(to_certify: ToCertify, signer_public_key: bytes) -> Unsigned:
    """Return the certificate that *to_certify* describes, to be signed by the key of *signer_public_key* (SPKI in DER).

    Raises CERTIFICATE_INVALID unless it is within its profile, its issuer's validity, path length and name constraints.
    """
    key, signer = load_public_key(to_certify.public_key), load_public_key(signer_public_key)
    _check(to_certify, key, signer)
    issuer = None if to_certify.issuer is None else load_certificate(to_certify.issuer.chain[0])
    subject = x509_name(to_certify.subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(to_certify.serial_number)
        .not_valid_before(to_certify.validity.not_before)
        .not_valid_after(to_certify.validity.not_after)
    )
    for extension, is_critical in _extensions(to_certify, key, issuer):
        builder = builder.add_extension(extension, critical=is_critical)
    return unsigned(builder, signer)


def build_request(subject: Subject, names: Sequence[GeneralName], public_key: bytes) -> Unsigned:
    """Return a request of PKCS#10 for the key of *public_key* (SPKI in DER), to be signed by the key itself."""
    key = load_public_key(public_key)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509_name(subject))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(x509_names(names)), critical=not subject.attributes)
    return unsigned(builder, key)


def issuer_of(chain: Sequence[bytes]) -> IssuerCertificate:
    """Return the issuer whose certificate (DER) is the first of *chain*; the certificates above it follow.

    Raises CERTIFICATE_INVALID if one of them is no authority's, or limits names in a way that the service does not know.
    """
    return _issuer_of(tuple(chain))


@lru_cache(256)
def _issuer_of(chain: tuple[bytes, ...]) -> IssuerCertificate:
    certificates = [load_certificate(der) for der in chain]
    path_length: int | None = None
    for certificate in reversed(certificates):
        constraints = extension_of(certificate.extensions, x509.BasicConstraints)
        if constraints is None or not constraints.ca:
            raise certificate_invalid("chain", "expected certificates of authorities (CA:TRUE)")
        is_counted = certificate is not certificates[-1] and not is_self_issued(certificate)
        below = path_length - 1 if path_length is not None and is_counted else path_length
        if below is not None and below < 0:
            raise certificate_invalid("chain", "expected no authority below one whose path length is 0")
        limits = [limit for limit in (below, constraints.path_length) if limit is not None]
        path_length = min(limits, default=None)
    if certificates[0].subject.public_bytes() not in chain[0]:
        # Certificates name their issuer byte by byte, or verifiers do not find it.
        raise certificate_invalid("chain", "expected a subject in DER")
    limits_of_names = [extension_of(certificate.extensions, x509.NameConstraints) for certificate in certificates]
    return IssuerCertificate(
        chain,
        _validity(certificates[0]),
        path_length,
        tuple(constraints_of(limit) for limit in limits_of_names if limit is not None),
        _limit_of_usages(certificates),
    )


def _limit_of_usages(certificates: Sequence[x509.Certificate]) -> frozenset[str] | None:
    """Return the extended key usages that are in all certificates which name some; None: none of them does."""
    limit: frozenset[str] | None = None
    for usages in (extension_of(certificate.extensions, x509.ExtendedKeyUsage) for certificate in certificates):
        if usages is not None and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usages:
            named = frozenset(usage.dotted_string for usage in usages)
            limit = named if limit is None else limit & named
    return limit


@lru_cache(256)
def parse_certificate(der: bytes) -> ParsedCertificate:
    """Return what the certificate in *der* says. Raises CERTIFICATE_INVALID for what cannot be read; verifies nothing."""
    certificate = load_certificate(der)
    try:
        return _parsed(certificate)
    except UNREADABLE:
        raise certificate_invalid("certificate", "expected names and extensions of RFC 5280 that can be read") from None


def is_self_issued(certificate: x509.Certificate) -> bool:
    """Whether the certificate names its subject as its issuer. Path lengths do not count it (RFC 5280 section 6.1)."""
    return certificate.subject == certificate.issuer


@lru_cache(256)
def load_certificate(der: bytes) -> x509.Certificate:
    """Return the certificate in *der*. Raises CERTIFICATE_INVALID."""
    try:
        if len(der) > CERTIFICATE_BYTES_MAX:
            raise ValueError
        certificate = x509.load_der_x509_certificate(der)
        public_key_of(certificate.public_key())
        _ = (certificate.subject, certificate.issuer, certificate.extensions)  # pyca reads each when it is asked for
        if certificate.serial_number <= 0:
            raise ValueError
    except UNREADABLE:
        rule = f"expected a certificate of RFC 5280 with a positive serial number, of at most {CERTIFICATE_BYTES_MAX} bytes"
        raise certificate_invalid("certificate", rule) from None
    return certificate


def certificates_in(data: bytes) -> tuple[bytes, ...]:
    """Return the certificates (DER) that *data* holds: one in DER, or one or more in PEM. Raises CERTIFICATE_INVALID."""
    try:
        if data.lstrip().startswith(b"-----BEGIN "):
            found = x509.load_pem_x509_certificates(data)
        else:
            found = [x509.load_der_x509_certificate(data)]
    except UNREADABLE:
        raise certificate_invalid("certificate", "expected certificates in PEM, or one in DER") from None
    return tuple(each.public_bytes(Encoding.DER) for each in found)


def _check(to_certify: ToCertify, key: PublicKey, signer: PublicKey) -> None:
    profile, issuer = to_certify.profile, to_certify.issuer
    profile.check_key(*type_of(key))
    profile.check_subject(to_certify.subject, to_certify.names)
    profile.check_validity(to_certify.validity)
    if not 0 < to_certify.serial_number < 1 << SERIAL_BITS_MAX:
        raise certificate_invalid("serial_number", f"expected a positive number of at most {SERIAL_BITS_MAX} bits")
    if to_certify.name_constraints is not None and not profile.is_ca:
        raise certificate_invalid("name_constraints", f"expected none in profile {profile.name}, which is not of authorities")
    if issuer is None:
        if key != signer:
            raise certificate_invalid("issuer", "expected the key to sign its own certificate")
        return
    if public_key_of(load_certificate(issuer.chain[0]).public_key()) != signer:
        raise certificate_invalid("issuer", "expected the key of the issuer's certificate to sign")
    if (
        not issuer.validity.not_before
        <= to_certify.validity.not_before
        < to_certify.validity.not_after
        <= issuer.validity.not_after
    ):
        raise certificate_invalid("validity", "expected a validity within that of the issuer")
    issuer.check_names(to_certify.names)
    if issuer.extended_key_usage is not None and not issuer.extended_key_usage.issuperset(profile.extended_key_usage):
        raise certificate_invalid("profile", "expected extended key usages that the issuer may certify")
    if profile.is_ca and issuer.path_length is not None:
        asked = path_length_of(to_certify)
        if issuer.path_length < 1 or asked is None or asked >= issuer.path_length:
            raise certificate_invalid("path_length", f"expected less than the {issuer.path_length} of the issuer")


def path_length_of(to_certify: ToCertify) -> int | None:
    """Return how many authorities may stand below the one that is certified; None is no limit."""
    return to_certify.profile.path_length if to_certify.path_length is None else to_certify.path_length


def _extensions(
    to_certify: ToCertify, key: PublicKey, issuer: x509.Certificate | None
) -> Sequence[tuple[x509.ExtensionType, bool]]:
    """Return the extensions and whether each is critical, as RFC 5280 section 4.2 wants it."""
    profile = to_certify.profile
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=profile.is_ca, path_length=path_length_of(to_certify) if profile.is_ca else None), True),
        (x509_key_usage(profile.key_usage), True),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (_authority_key_id(key, issuer), False),
    ]
    if profile.extended_key_usage:
        purposes = [ObjectIdentifier(each) for each in profile.extended_key_usage]
        extensions.append((x509.ExtendedKeyUsage(purposes), False))
    if to_certify.names:
        extensions.append((x509.SubjectAlternativeName(x509_names(to_certify.names)), not to_certify.subject.attributes))
    if to_certify.name_constraints is not None:
        extensions.append((x509_constraints(to_certify.name_constraints), True))
    if profile.ocsp_no_check:
        extensions.append((x509.OCSPNoCheck(), False))
    return [*extensions, *_addresses(to_certify)]


def _authority_key_id(key: PublicKey, issuer: x509.Certificate | None) -> x509.AuthorityKeyIdentifier:
    if issuer is None:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    identifier = extension_of(issuer.extensions, x509.SubjectKeyIdentifier)
    if identifier is None:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key_of(issuer.public_key()))
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _addresses(to_certify: ToCertify) -> Sequence[tuple[x509.ExtensionType, bool]]:
    """Return where to learn whether the certificate is revoked, and where its issuer's certificate is.

    Of a certificate that signs its own there is nothing to learn. That of an OCSP signer is trusted until it ends.
    """
    if to_certify.issuer is None:
        return []
    extensions: list[tuple[x509.ExtensionType, bool]] = []
    is_checked = not to_certify.profile.ocsp_no_check
    if to_certify.crl_url is not None and is_checked:
        point = x509.DistributionPoint([x509.UniformResourceIdentifier(to_certify.crl_url)], None, None, None)
        extensions.append((x509.CRLDistributionPoints([point]), False))
    accesses = [
        (AuthorityInformationAccessOID.OCSP, to_certify.ocsp_url if is_checked else None),
        (AuthorityInformationAccessOID.CA_ISSUERS, to_certify.issuer_url),
    ]
    described = [x509.AccessDescription(oid, x509.UniformResourceIdentifier(url)) for oid, url in accesses if url is not None]
    if described:
        extensions.append((x509.AuthorityInformationAccess(described), False))
    return extensions


def _validity(certificate: x509.Certificate) -> Validity:
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def _parsed(certificate: x509.Certificate) -> ParsedCertificate:
    extensions, key = certificate.extensions, public_key_of(certificate.public_key())
    key_type, key_bits = type_of(key)
    constraints = extension_of(extensions, x509.BasicConstraints)
    subject_key_id = extension_of(extensions, x509.SubjectKeyIdentifier)
    authority_key_id = extension_of(extensions, x509.AuthorityKeyIdentifier)
    return ParsedCertificate(
        serial_number=certificate.serial_number,
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        subject_der=certificate.subject.public_bytes(),
        issuer_der=certificate.issuer.public_bytes(),
        names=_names(extension_of(extensions, x509.SubjectAlternativeName) or ()),
        validity=_validity(certificate),
        public_key=spki_of(key),
        key_type=key_type,
        key_bits=key_bits,
        is_ca=constraints is not None and constraints.ca,
        path_length=None if constraints is None else constraints.path_length,
        key_usage=usages_of(extension_of(extensions, x509.KeyUsage)),
        extended_key_usage=tuple(each.dotted_string for each in extension_of(extensions, x509.ExtendedKeyUsage) or ()),
        subject_key_id=None if subject_key_id is None else subject_key_id.digest,
        authority_key_id=None if authority_key_id is None else authority_key_id.key_identifier,
        crl_urls=_crl_urls(extensions),
        ocsp_urls=_access_urls(extensions, AuthorityInformationAccessOID.OCSP),
        issuer_urls=_access_urls(extensions, AuthorityInformationAccessOID.CA_ISSUERS),
        fingerprint=sha256(certificate.public_bytes(Encoding.DER)).digest(),
    )


def _names(names: Sequence[x509.GeneralName] | x509.SubjectAlternativeName) -> tuple[GeneralName, ...]:
    return tuple(GeneralName(*raw) for raw in map(raw_name, names) if raw is not None)


def _crl_urls(extensions: x509.Extensions) -> tuple[str, ...]:
    points = extension_of(extensions, x509.CRLDistributionPoints) or ()
    return tuple(url for point in points for url in _urls(point.full_name or ()))


def _access_urls(extensions: x509.Extensions, method: ObjectIdentifier) -> tuple[str, ...]:
    accesses = extension_of(extensions, x509.AuthorityInformationAccess) or ()
    return tuple(url for access in accesses if access.access_method == method for url in _urls((access.access_location,)))


def _urls(names: Sequence[x509.GeneralName]) -> tuple[str, ...]:
    return tuple(raw[1] for raw in map(raw_name, names) if raw is not None and raw[0] is NameKind.URI)
