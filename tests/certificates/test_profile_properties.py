"""Random requests and profiles: what is certified is within its profile, and all else is refused.

The certificate is read here by pyca alone, so nothing of the service judges itself.
"""

import ipaddress
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.certificates.constraints import parse_constraints
from kms.certificates.names import Attribute, NameKind
from kms.certificates.profiles import BACKDATED, BUILT_IN, KeyUsage, Profile, PublicKeyType, Unwanted
from kms.certificates.x509.requests import parse_request
from kms.domain.errors import KmsError, Reason
from tests.certificates.making import SoftAuthority, root
from tests.certificates.softkeys import SoftKey, soft_key

GOOD_NAMES: dict[NameKind, list[x509.GeneralName]] = {
    NameKind.DNS: [x509.DNSName(host) for host in ("a.example", "b.a.example", "*.a.example", "c.example", "A.Example")],
    NameKind.IP: [x509.IPAddress(ipaddress.ip_address(text)) for text in ("10.0.0.1", "192.0.2.1", "::1")],
    NameKind.URI: [x509.UniformResourceIdentifier(uri) for uri in ("kms://test/user/1", "https://a.example/", "urn:a:b")],
    NameKind.EMAIL: [x509.RFC822Name(mailbox) for mailbox in ("jo@a.example", "jo@c.example")],
}
BAD_NAMES: list[x509.GeneralName] = [
    *(x509.DNSName(host) for host in ("bad_host", "x\0.a.example", "10.0.0.1", "", "*.*.a.example")),
    *(x509.UniformResourceIdentifier(uri) for uri in ("relative", "https://A.example")),
    *(x509.RFC822Name(mailbox) for mailbox in ("jo", "@a.example")),
    x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
]
GOOD_TEXTS = {
    Attribute.COMMON_NAME: ["a.example", "10.0.0.1", "Jo"],
    Attribute.ORGANIZATION: ["Ex,ample+", "Beispiel Ü"],
    Attribute.COUNTRY: ["DE"],
}
BAD_TEXTS = ["", " a", "a" * 65, "a\0b", "\u202ea"]
OID_OF = {
    Attribute.COMMON_NAME: NameOID.COMMON_NAME,
    Attribute.ORGANIZATION: NameOID.ORGANIZATION_NAME,
    Attribute.COUNTRY: NameOID.COUNTRY_NAME,
}
FLAGS = {
    KeyUsage.DIGITAL_SIGNATURE: "digital_signature",
    KeyUsage.CONTENT_COMMITMENT: "content_commitment",
    KeyUsage.KEY_ENCIPHERMENT: "key_encipherment",
    KeyUsage.DATA_ENCIPHERMENT: "data_encipherment",
    KeyUsage.KEY_AGREEMENT: "key_agreement",
    KeyUsage.KEY_CERT_SIGN: "key_cert_sign",
    KeyUsage.CRL_SIGN: "crl_sign",
}
AUTHORITIES = [
    root(),
    root().intermediate(
        soft_key(PublicKeyType.P256, 1),
        name_constraints=parse_constraints(["dns:a.example", "ip:10.0.0.0/8", "email:a.example"], ["dns:b.a.example"]),
    ),
]

key_usages = st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS.values()}).map(
    lambda flags: x509.KeyUsage(**flags, encipher_only=False, decipher_only=False)
)
purposes = st.lists(
    st.sampled_from(["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2", "2.5.29.37.0"]), min_size=1, max_size=2, unique=True
)
extensions = st.one_of(
    st.booleans().map(lambda ca: x509.BasicConstraints(ca=ca, path_length=None)),
    key_usages,
    purposes.map(lambda oids: x509.ExtendedKeyUsage([x509.ObjectIdentifier(oid) for oid in oids])),
    st.just(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")),
)
profiles = st.builds(
    replace,
    st.sampled_from(list(BUILT_IN.values())),
    key_types=st.frozensets(st.sampled_from(PublicKeyType), min_size=1),
    name_kinds=st.frozensets(st.sampled_from(NameKind)),
    names_min=st.integers(0, 1),
    names_max=st.integers(1, 3),
    allow_wildcards=st.booleans(),
    subject_allowed=st.frozensets(st.sampled_from(list(OID_OF))),
    subject_required=st.just(frozenset()),
    common_name_is_a_name=st.booleans(),
    validity_default=st.just(timedelta(days=2)),
    validity_max=st.integers(2, 2000).map(lambda days: timedelta(days=days)),
    rsa_bits_min=st.just(2048),
    unknown_extensions=st.sampled_from(Unwanted),
)


@dataclass(frozen=True)
class Case:
    """A request, good or bad, and what it is asked for with."""

    authority: SoftAuthority
    profile: Profile
    data: bytes
    key: SoftKey
    span: timedelta | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a request that keeps to its profile, but for one thing in most cases."""
    profile = draw(profiles)
    flaw = draw(st.sampled_from(["", "", "subject", "name", "extension", "key", "names"]))
    attributes = list(
        draw(
            st.frozensets(st.sampled_from(sorted(OID_OF if flaw == "subject" else profile.subject_allowed)))
            if profile.subject_allowed or flaw == "subject"
            else st.just(frozenset())
        )
    )
    texts = [draw(st.sampled_from([*GOOD_TEXTS[each], *(BAD_TEXTS if flaw == "subject" else [])])) for each in attributes]
    kinds = NameKind if flaw == "names" else sorted(profile.name_kinds)
    usable = [name for kind in kinds for name in GOOD_NAMES[kind]] + (BAD_NAMES if flaw == "name" else [])
    sizes = {"min_size": 0, "max_size": 5} if flaw == "names" else {"min_size": profile.names_min, "max_size": profile.names_max}
    names = draw(st.lists(st.sampled_from(usable), **sizes, unique=flaw != "names")) if usable else []
    key = soft_key(draw(st.sampled_from(sorted(PublicKeyType if flaw == "key" else profile.key_types))), 2)
    parts = [
        x509.NameAttribute(OID_OF[each], text, _ASN1Type.UTF8String, _validate=False)
        for each, text in zip(attributes, texts, strict=True)
    ]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(parts))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=draw(st.booleans()))
    if flaw == "extension":
        builder = builder.add_extension(draw(extensions), critical=draw(st.booleans()))
    hash_ = None if isinstance(key.private, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    data = builder.sign(key.private, hash_).public_bytes(Encoding.DER)
    span = draw(st.none() | st.integers(0, 2100).map(lambda days: timedelta(days=days)))
    return Case(draw(st.sampled_from(AUTHORITIES)), profile, data, key, span)


def certified(case: Case) -> bytes:
    """Do what the service does with a request."""
    request = parse_request(case.data)
    request.check_extensions(case.profile)
    to_certify = case.authority.to_certify(
        case.profile, case.key, subject=request.subject, names=request.names, validity=case.span
    )
    return case.authority.issue(to_certify)


def judge(case: Case) -> bool:
    """Certify, and hold what comes against the profile. Return whether a certificate came."""
    authority, profile = case.authority, case.profile
    try:
        der = certified(case)
    except KmsError as refusal:
        assert refusal.reason is Reason.CERTIFICATE_INVALID
        return False
    certificate = x509.load_der_x509_certificate(der)
    issuer = x509.load_der_x509_certificate(authority.chain[0])
    certificate.verify_directly_issued_by(issuer)
    assert certificate.public_key() == case.key.private.public_key()
    assert issuer.not_valid_before_utc <= certificate.not_valid_before_utc
    assert certificate.not_valid_after_utc <= issuer.not_valid_after_utc
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= profile.validity_max + BACKDATED
    check_extensions(certificate, profile)
    check_names(certificate, profile, is_constrained=authority is AUTHORITIES[1])
    return True


def check_extensions(certificate: x509.Certificate, profile: Profile) -> None:
    found = {each.oid: each for each in certificate.extensions}
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, profile.is_ca)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert {each for each, flag in FLAGS.items() if getattr(usage.value, flag)} == profile.key_usage
    purposes = found[x509.ExtendedKeyUsage.oid].value if x509.ExtendedKeyUsage.oid in found else []
    assert [each.dotted_string for each in purposes] == list(profile.extended_key_usage)
    assert "1.2.3.4" not in {oid.dotted_string for oid in found}
    assert (x509.OCSPNoCheck.oid in found) is profile.ocsp_no_check


def check_names(certificate: x509.Certificate, profile: Profile, *, is_constrained: bool) -> None:
    attributes = {each.oid for each in certificate.subject}
    allowed = {OID_OF[each] for each in profile.subject_allowed}
    assert {OID_OF[each] for each in profile.subject_required} <= attributes <= allowed
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        assert profile.names_min == 0
        assert attributes
        return
    assert extension.critical is not bool(attributes)
    assert profile.names_min <= len(extension.value) <= profile.names_max
    hosts = extension.value.get_values_for_type(x509.DNSName)
    addresses = [str(each) for each in extension.value.get_values_for_type(x509.IPAddress)]
    for kind, held in (
        (NameKind.DNS, hosts),
        (NameKind.IP, addresses),
        (NameKind.URI, extension.value.get_values_for_type(x509.UniformResourceIdentifier)),
        (NameKind.EMAIL, extension.value.get_values_for_type(x509.RFC822Name)),
    ):
        assert not held or kind in profile.name_kinds
    assert all(host in {"a.example", "b.a.example", "*.a.example", "c.example"} for host in hosts)
    assert profile.allow_wildcards or "*.a.example" not in hosts
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert not profile.common_name_is_a_name or all(each.value in {*hosts, *addresses} for each in common)
    if is_constrained:
        assert set(hosts) <= {"a.example"}
        assert set(addresses) <= {"10.0.0.1"}


@settings(max_examples=50, deadline=None)
@given(cases())
def test_no_certificate_is_outside_its_profile(case: Case) -> None:
    judge(case)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_certificate_of_many_is_outside_its_profile() -> None:
    outcomes = []

    @settings(max_examples=2000, deadline=None, database=None)
    @given(cases())
    def run(case: Case) -> None:
        outcomes.append(judge(case))

    run()
    assert sum(outcomes) > len(outcomes) // 10  # a property that is never put to the test shows nothing
