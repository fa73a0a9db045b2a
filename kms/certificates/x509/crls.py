"""CRLs (RFC 5280 section 5): written by pyca, signed by the token, and read again with their signature verified."""

from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509 import ReasonFlags

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.crl import Crl
from kms.certificates.x509.signing import Unsigned, is_signed, public_key_of, signature_algorithm_of, unsigned
from kms.domain.errors import KmsError, Reason

_FLAGS: Final = {
    RevocationReason.KEY_COMPROMISE: ReasonFlags.key_compromise,
    RevocationReason.CA_COMPROMISE: ReasonFlags.ca_compromise,
    RevocationReason.AFFILIATION_CHANGED: ReasonFlags.affiliation_changed,
    RevocationReason.SUPERSEDED: ReasonFlags.superseded,
    RevocationReason.CESSATION_OF_OPERATION: ReasonFlags.cessation_of_operation,
    RevocationReason.PRIVILEGE_WITHDRAWN: ReasonFlags.privilege_withdrawn,
    RevocationReason.AA_COMPROMISE: ReasonFlags.aa_compromise,
}
_REASONS: Final = {flag: reason for reason, flag in _FLAGS.items()}


def build_crl(crl: Crl, issuer_der: bytes) -> Unsigned:
    """Return *crl*, to be signed with the key of the issuer's certificate.

    One with a distribution point lists the certificates that name this point, and no others.
    """
    issuer = x509.load_der_x509_certificate(issuer_der)
    key_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), False),
        (x509.CRLNumber(crl.number), False),
    ]
    if crl.distribution_point:
        extensions.append((_distribution_point(crl.distribution_point), True))
    builder = (
        x509.CertificateRevocationListBuilder(
            extensions=[x509.Extension(value.oid, critical, value) for value, critical in extensions],
            # In the order of their numbers, and all at once: pyca copies the list with each one that is added.
            revoked_certificates=[_revoked(serial_number, crl.entries[serial_number]) for serial_number in sorted(crl.entries)],
        )
        .issuer_name(issuer.subject)
        .last_update(crl.this_update)
        .next_update(crl.next_update)
    )
    return unsigned(builder, public_key_of(issuer.public_key()))


def parse_crl(der: bytes, issuer_der: bytes) -> Crl:
    """Return what a CRL says. Raises CERTIFICATE_INVALID unless the issuer signed it and it is one of ours."""
    issuer = x509.load_der_x509_certificate(issuer_der)
    signer = public_key_of(issuer.public_key())
    try:
        crl = x509.load_der_x509_crl(der)
        is_ours = is_signed(signer, signature_algorithm_of(signer), crl.signature, crl.tbs_certlist_bytes)
        if not is_ours or crl.issuer != issuer.subject or crl.next_update_utc is None:
            raise _not_a_crl()
        return Crl(
            number=crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number,
            this_update=crl.last_update_utc,
            next_update=crl.next_update_utc,
            distribution_point=_point_of(crl),
            entries={each.serial_number: _entry(each) for each in crl},
        )
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise _not_a_crl() from None


def reason_flag(reason: RevocationReason) -> ReasonFlags | None:
    """Return *reason* as pyca has it. None: it is not written at all (RFC 5280 section 5.3.1)."""
    return _FLAGS.get(reason)


def reason_of(flag: ReasonFlags | None) -> RevocationReason:
    """Return the reason that pyca read; none is UNSPECIFIED."""
    return RevocationReason.UNSPECIFIED if flag is None else _REASONS.get(flag, RevocationReason.UNSPECIFIED)


def _revoked(serial_number: int, entry: Revocation) -> x509.RevokedCertificate:
    builder = x509.RevokedCertificateBuilder().serial_number(serial_number).revocation_date(entry.at)
    if (flag := reason_flag(entry.reason)) is not None:
        builder = builder.add_extension(x509.CRLReason(flag), critical=False)
    return builder.build()


def _entry(revoked: x509.RevokedCertificate) -> Revocation:
    # To read the extensions of an entry costs more than all else of it.
    extensions = revoked.extensions
    flag = extensions.get_extension_for_class(x509.CRLReason).value.reason if len(extensions) else None
    return Revocation(revoked.revocation_date_utc, reason_of(flag))


def _distribution_point(url: str) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=[x509.UniformResourceIdentifier(url)],
        relative_name=None,
        only_contains_user_certs=False,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )


def _point_of(crl: x509.CertificateRevocationList) -> str:
    try:
        names = crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value.full_name or []
    except x509.ExtensionNotFound:
        return ""
    return str(names[0].value)


def _not_a_crl() -> KmsError:
    return KmsError(Reason.CERTIFICATE_INVALID, "expected a CRL of this authority")
