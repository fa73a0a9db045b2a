"""The last look finds each difference between what was meant and what is written."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from kms.certificates.constraints import parse_constraints
from kms.certificates.names import EMPTY, parse_names, parse_subject_text
from kms.certificates.profiles import CLIENT, INTERMEDIATE, OCSP, SERVER, KeyUsage, Profile, PublicKeyType, Validity
from kms.certificates.x509.certificates import ToCertify, build_certificate
from kms.certificates.x509.lint import lint
from kms.domain.errors import KmsError, Reason
from tests.certificates.making import SoftAuthority, root
from tests.certificates.softkeys import soft_key

LEAF = soft_key(PublicKeyType.P256, 1)


@pytest.fixture(scope="module")
def authority() -> SoftAuthority:
    return root()


def refused(authority: SoftAuthority, meant: ToCertify, written: ToCertify) -> str:
    """Return the message with which *written* is refused where *meant* was meant."""
    with pytest.raises(KmsError) as refusal:
        lint(build_certificate(written, authority.key.spki).draft, meant)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    return refusal.value.message


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("serial number", {"serial_number": 7}),
        ("key", {"public_key": soft_key(PublicKeyType.P256, 2).spki}),
        ("subject", {"subject": parse_subject_text("CN=b.example")}),
        ("names", {"names": parse_names(["dns:b.example", "dns:a.example"])}),
        ("names", {"names": parse_names(["dns:a.example"])}),
        ("key usage", {"profile": replace(SERVER, key_usage=SERVER.key_usage | {KeyUsage.KEY_ENCIPHERMENT})}),
        ("extended key usage", {"profile": replace(SERVER, extended_key_usage=(*SERVER.extended_key_usage, "1.2.3"))}),
        ("basic constraints", {"profile": replace(SERVER, is_ca=True)}),
        ("extensions", {"profile": replace(SERVER, ocsp_no_check=True)}),
    ],
)
def test_a_difference_is_found(authority: SoftAuthority, what: str, change: dict[str, Any]) -> None:
    names = parse_names(["dns:a.example", "dns:b.example"])
    meant = authority.to_certify(SERVER, LEAF, subject=parse_subject_text("CN=a.example"), names=names)
    lint(build_certificate(meant, authority.key.spki).draft, meant)
    assert what in refused(authority, meant, replace(meant, **change))
    assert what in refused(authority, replace(meant, **change), meant)


def test_a_difference_of_authorities_is_found(authority: SoftAuthority) -> None:
    meant = authority.to_certify(INTERMEDIATE, soft_key(PublicKeyType.P256, 3), subject=parse_subject_text("CN=i"))
    assert "path length" in refused(authority, meant, replace(meant, path_length=1))
    constrained = replace(meant, name_constraints=parse_constraints(["dns:a.example"], []))
    assert "name constraints" in refused(authority, meant, constrained)
    assert "name constraints" in refused(authority, constrained, meant)


def test_another_issuer_is_found(authority: SoftAuthority) -> None:
    other = root(soft_key(PublicKeyType.P256, 4), name="CN=Other")
    namesake = root(soft_key(PublicKeyType.P256, 4))
    meant = authority.to_certify(SERVER, LEAF, names=parse_names(["dns:a.example"]))
    draft = build_certificate(meant, authority.key.spki).draft
    for issuer, what in ((other, "issuer"), (namesake, "key identifier of the issuer")):
        with pytest.raises(KmsError, match=what):
            lint(draft, replace(meant, issuer=issuer.issuer))


def test_another_validity_is_found(authority: SoftAuthority) -> None:
    meant = authority.to_certify(SERVER, LEAF, names=parse_names(["dns:a.example"]))
    later = replace(meant.validity, not_after=meant.validity.not_after + timedelta(seconds=1))
    assert "validity" in refused(authority, meant, replace(meant, validity=later))


@pytest.mark.parametrize(
    ("profile", "change"),
    [
        (CLIENT, {"names": parse_names(["ip:::1"])}),
        (SERVER, {"names": ()}),
        (SERVER, {"subject": parse_subject_text("CN=other.example")}),
        (OCSP, {"names": parse_names(["dns:a.example"]), "subject": parse_subject_text("CN=a")}),
        (SERVER, {"serial_number": 0}),
        (SERVER, {"serial_number": 1 << 159}),
        (SERVER, {"name_constraints": parse_constraints(["dns:a.example"], [])}),
    ],
)
def test_what_is_outside_its_profile_is_not_written(authority: SoftAuthority, profile: Profile, change: dict[str, Any]) -> None:
    fields = {"subject": EMPTY, "names": parse_names(["dns:a.example"]), **change}
    numbered = {name: fields.pop(name) for name in ("serial_number",) if name in fields}
    with pytest.raises(KmsError) as refusal:
        build_certificate(replace(authority.to_certify(profile, LEAF, **fields), **numbered), authority.key.spki)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID


def test_what_is_beyond_its_issuer_is_not_written(authority: SoftAuthority) -> None:
    ends_at = authority.issuer.validity.not_after
    names = parse_names(["dns:a.example"])
    meant = authority.to_certify(SERVER, LEAF, names=names)
    late = replace(meant, validity=Validity(ends_at - timedelta(days=1), ends_at + timedelta(seconds=1)))
    with pytest.raises(KmsError, match="within that of the issuer"):
        build_certificate(late, authority.key.spki)
    with pytest.raises(KmsError, match="key of the issuer's certificate"):
        build_certificate(meant, LEAF.spki)
    lower = authority.intermediate(soft_key(PublicKeyType.P256, 3), name_constraints=parse_constraints([], ["dns:a.example"]))
    with pytest.raises(KmsError, match="excluded"):
        build_certificate(lower.to_certify(SERVER, LEAF, names=names), lower.key.spki)
    with pytest.raises(KmsError, match="path_length"):
        lower.intermediate(soft_key(PublicKeyType.P256, 4))


def test_a_wrong_criticality_is_found(authority: SoftAuthority) -> None:
    """The subject is empty, so the names stand alone and must be critical (RFC 5280 section 4.2.1.6)."""
    meant = authority.to_certify(SERVER, LEAF, names=parse_names(["dns:a.example"]))
    draft = build_certificate(meant, authority.key.spki).draft
    certificate = x509.load_der_x509_certificate(draft)
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(certificate.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
    )
    for extension in certificate.extensions:
        builder = builder.add_extension(
            extension.value, critical=extension.critical and extension.oid != ExtensionOID.SUBJECT_ALTERNATIVE_NAME
        )
    written = builder.sign(soft_key(PublicKeyType.P256).private, hashes.SHA256()).public_bytes(Encoding.DER)
    lint(draft, meant)
    with pytest.raises(KmsError, match="criticality"):
        lint(written, meant)
