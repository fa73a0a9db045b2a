"""Whether certificates of others hold together: path validation of RFC 5280 section 6.1, for what is imported.

Whoever imports a chain vouches for its last certificate, as for a trust anchor. What the service does not understand is refused,
also where a verifier might accept it: constraints of policies, and name constraints of other kinds than ours. Revocation is not
looked at.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtensionOID, NameOID

from kms.certificates.names import GeneralName, NameKind, certificate_invalid
from kms.certificates.profiles import KeyUsage
from kms.certificates.x509.certificates import ParsedCertificate, is_self_issued, issuer_of, load_certificate, parse_certificate
from kms.certificates.x509.extensions import UNREADABLE
from kms.certificates.x509.public_keys import check_strong
from kms.certificates.x509.signing import ALGORITHMS, ALGORITHMS_RULE, public_key_of

CHAIN_LENGTH_MAX: Final = 8

# Critical extensions that are obeyed. Policies bind nobody who asks for none (RFC 5280 section 6.1.1).
_OBEYED: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)


def verify_chain(chain: Sequence[bytes], *, at: datetime) -> None:
    """Raise CERTIFICATE_INVALID, naming the rule, unless each certificate (DER) of *chain* is issued by the next one.

    The last one signs its own, and all are valid at the moment *at*. The first may be of an authority or of anybody.
    """
    if not 0 < len(chain) <= CHAIN_LENGTH_MAX:
        raise certificate_invalid("chain", f"expected 1 to {CHAIN_LENGTH_MAX} certificates")
    certificates = [load_certificate(der) for der in chain]
    parsed = [parse_certificate(der) for der in chain]
    for number, (certificate, values) in enumerate(zip(certificates, parsed, strict=True), 1):
        _check_alone(certificate, values, at, f"certificate {number}")
    for number, certificate in enumerate(certificates):
        issuer = min(number + 1, len(chain) - 1)
        _check_issued(certificate, certificates[issuer])
        if parsed[number].authority_key_id not in {None, parsed[issuer].subject_key_id} and parsed[issuer].subject_key_id:
            raise certificate_invalid("chain", "expected as the key identifier of the issuer that of the next certificate")
    _check_paths(chain, certificates, parsed)


def _check_alone(certificate: x509.Certificate, values: ParsedCertificate, at: datetime, which: str) -> None:
    if certificate.version is not x509.Version.v3:
        raise certificate_invalid("chain", "expected certificates of X.509 version 3")
    if certificate.signature_algorithm_oid not in ALGORITHMS:
        raise certificate_invalid("chain", ALGORITHMS_RULE)
    if not values.validity.not_before <= at <= values.validity.not_after:
        raise certificate_invalid("chain", f"expected certificates that are valid now, unlike {which}")
    if unknown := [each.oid.dotted_string for each in certificate.extensions if each.critical and each.oid not in _OBEYED]:
        raise certificate_invalid("chain", f"expected no critical extension {', '.join(unknown)}")
    check_strong(public_key_of(certificate.public_key()))


def _check_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        raise certificate_invalid("chain", "expected each certificate to be issued by the next, and the last by itself") from None


def _check_paths(chain: Sequence[bytes], certificates: Sequence[x509.Certificate], parsed: Sequence[ParsedCertificate]) -> None:
    if parsed[0].is_ca:
        issuer_of(chain)  # an authority that could issue nothing is of no use
    for number in range(1, len(chain)):
        issuer = issuer_of(chain[number:])
        if KeyUsage.KEY_CERT_SIGN not in parsed[number].key_usage:
            raise certificate_invalid("chain", "expected the key usage keyCertSign of authorities")
        below = parsed[number - 1]
        if number == 1 or not is_self_issued(certificates[number - 1]):
            issuer.check_names([*map(_comparable, below.names), *_mailboxes(certificates[number - 1])])


def _comparable(name: GeneralName) -> GeneralName:
    """Return *name* with its host in lower case, as constraints are. Raises CERTIFICATE_INVALID for a URI that is none."""
    try:
        _ = name.host
    except ValueError:
        raise certificate_invalid("chain", "expected URIs of RFC 3986") from None
    match name.kind:
        case NameKind.DNS:
            return GeneralName(name.kind, name.value.lower())
        case NameKind.EMAIL:
            local, at, domain = name.value.rpartition("@")
            return GeneralName(name.kind, f"{local}{at}{domain.lower()}")
        case NameKind.IP | NameKind.URI:
            return name


def _mailboxes(certificate: x509.Certificate) -> list[GeneralName]:
    """Return the mailboxes in the subject, which old certificates have there (RFC 5280 section 4.2.1.10)."""
    found = certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)
    return [_comparable(GeneralName(NameKind.EMAIL, str(each.value))) for each in found]
