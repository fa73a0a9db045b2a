"""Requests of PKCS#10: those of ordinary tools are read, and hostile ones get a refusal that names the rule."""

import random
import subprocess
import sys
from itertools import count
from math import gcd, prod
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.certificates.names import parse_names, parse_subject_text
from kms.certificates.profiles import CLIENT, SERVER, KeyUsage, Profile, PublicKeyType, Unwanted
from kms.certificates.x509.certificates import build_request
from kms.certificates.x509.public_keys import check_strong_rsa, is_roca
from kms.certificates.x509.requests import REQUEST_BYTES_MAX, parse_request
from kms.domain.errors import KmsError, Reason
from tests.certificates.softkeys import SoftKey, soft_key

SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.example")])
KEY = soft_key(PublicKeyType.P256)


def csr(*extensions: tuple[x509.ExtensionType, bool], subject: x509.Name = SUBJECT, key: Any = KEY.private) -> bytes:  # noqa: ANN401
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def dns(*names: str) -> tuple[x509.ExtensionType, bool]:
    return x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False


def refused(data: bytes, profile: Profile = SERVER) -> str:
    """Return the message with which a request is refused."""
    with pytest.raises(KmsError) as refusal:
        parse_request(data).check_extensions(profile)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    assert "Traceback" not in refusal.value.message
    return refusal.value.message


def openssl(*arguments: str | Path) -> bytes:
    return subprocess.run(["openssl", *arguments], capture_output=True, check=True).stdout


@pytest.mark.parametrize("key_type", PublicKeyType)
def test_a_request_of_ours_is_read(key_type: PublicKeyType) -> None:
    key = soft_key(key_type)
    subject, names = parse_subject_text("CN=a.example,O=Example"), parse_names(["dns:a.example", "ip:::1", "email:a@b.example"])
    der = key.sign(build_request(subject, names, key.spki))
    pem = x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)
    for data in (der, pem, b"\n" + pem):
        request = parse_request(data)
        assert (request.subject, request.names, request.public_key, request.key_type) == (subject, names, key.spki, key_type)
        request.check_extensions(SERVER)


def test_requests_of_openssl_and_certtool_are_read(tmp_path: Path) -> None:
    key, template = tmp_path / "key.pem", tmp_path / "template"
    key.write_bytes(KEY.pem)
    made = openssl(
        "req", "-new", "-key", key, "-subj", "/O=Example/CN=a.example", "-addext", "subjectAltName=DNS:a.example,IP:::1"
    )
    template.write_text(
        'cn = "a.example"\norganization = "Example"\ndns_name = "a.example"\nip_address = "::1"\ntls_www_server\n'
    )
    command: list[str | Path] = ["certtool", "--generate-request", "--load-privkey", key, "--template", template]
    for pem in (made, subprocess.run(command, capture_output=True, check=True).stdout):
        request = parse_request(pem)
        request.check_extensions(SERVER)
        assert str(request.subject) == "CN=a.example,O=Example"
        assert request.names == parse_names(["dns:a.example", "ip:::1"])


def test_a_request_without_subject_and_names_is_read() -> None:
    request = parse_request(csr(subject=x509.Name([])))
    assert (str(request.subject), request.names) == ("", ())


def test_a_point_of_a_curve_is_certified_in_full_even_if_compressed(tmp_path: Path) -> None:
    key, compressed = tmp_path / "key.pem", tmp_path / "compressed.pem"
    key.write_bytes(KEY.pem)
    openssl("ec", "-in", key, "-conv_form", "compressed", "-out", compressed)
    der = openssl("req", "-new", "-key", compressed, "-subj", "/CN=a.example", "-outform", "DER")
    assert KEY.spki not in der
    assert parse_request(der).public_key == KEY.spki


# --- hostile requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"\x30\x80", b"-----BEGIN CERTIFICATE REQUEST-----\n", b"\0" * REQUEST_BYTES_MAX],
    ids=["empty", "a letter", "no end", "no lines", "zeros"],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    assert "csr" in refused(data)


def test_a_request_of_a_mebibyte_is_refused_unread() -> None:
    assert "65536 bytes" in refused(b"0" * 2**20)


def test_two_requests_in_one_are_refused() -> None:
    pem = x509.load_der_x509_csr(csr()).public_bytes(Encoding.PEM)
    assert "one request" in refused(pem + pem)


def test_bytes_after_the_request_are_refused() -> None:
    assert "PKCS#10" in refused(csr() + b"\0")


def test_another_version_is_refused() -> None:
    der = csr()
    place = der.index(b"\x02\x01\x00")
    assert "PKCS#10" in refused(der[:place] + b"\x02\x01\x01" + der[place + 3 :])


def test_a_signature_by_another_key_is_refused() -> None:
    other = soft_key(PublicKeyType.P256, 1)
    honest, thief = csr(), csr(key=other.private)
    assert len(other.spki) == len(KEY.spki)
    assert "signature by the key" in refused(thief.replace(other.spki, KEY.spki))
    assert "signature by the key" in refused(honest.replace(b"a.example", b"b.example"))


@pytest.mark.parametrize("digest", ["-sha1", "-md5"])
def test_a_broken_hash_is_refused(digest: str, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(soft_key(PublicKeyType.RSA).pem)
    assert "SHA-256" in refused(openssl("req", "-new", digest, "-key", key, "-subj", "/CN=a.example"))


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP224R1()),
        ec.generate_private_key(ec.BrainpoolP256R1()),
    ],
    ids=lambda key: key.curve.name,
)
def test_another_curve_is_refused(key: ec.EllipticCurvePrivateKey) -> None:
    assert "RSA, P-256, P-384, secp256k1 or Ed25519" in refused(csr(key=key))


def test_a_curve_that_is_written_out_is_certified_by_its_name(tmp_path: Path) -> None:
    explicit = tmp_path / "key.pem"
    options = ("-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:explicit")
    openssl("genpkey", "-algorithm", "EC", *options, "-out", explicit)
    request = parse_request(openssl("req", "-new", "-key", explicit, "-subj", "/CN=a.example"))
    assert (request.key_type, len(request.public_key)) == (PublicKeyType.P256, len(KEY.spki))


def test_a_point_off_the_curve_is_refused() -> None:
    der = csr()
    point = KEY.private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert "csr" in refused(der.replace(point, point[:-1] + bytes((point[-1] ^ 1,))))


@pytest.mark.parametrize("bits", [1024, 1536])
def test_a_small_rsa_key_is_refused(bits: int) -> None:
    assert "2048 to 4096 bits" in refused(csr(key=rsa.generate_private_key(65_537, bits)))


def test_a_small_exponent_is_refused() -> None:
    assert "exponent" in refused(csr(key=rsa.generate_private_key(3, 2048)))


def _primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def _roca_key() -> rsa.RSAPrivateKey:
    """Return a key with primes of the form k·M + 65537^a mod M, as Infineon's library made them (CVE-2017-15361)."""
    m = prod(_primes(126))
    p, q = (
        k * m + pow(65_537, a, m) for k, a in ((7456706752863753, 14089154938208861744), (8746401861818661, 636889189181363272))
    )
    d = pow(65_537, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(65_537, p * q))
    return numbers.private_key()


def test_a_roca_key_is_refused() -> None:
    assert "ROCA" in refused(csr(key=_roca_key()))
    honest = soft_key(PublicKeyType.RSA).private
    assert isinstance(honest, rsa.RSAPrivateKey)
    assert not is_roca(honest.public_key().public_numbers().n)


def test_a_modulus_with_small_or_close_factors_is_refused() -> None:
    key = soft_key(PublicKeyType.RSA).private
    assert isinstance(key, rsa.RSAPrivateKey)
    prime = key.private_numbers().p
    small = prod(_primes(133))
    close = next(other for other in count(prime + 2, 2) if gcd(other, small) == 1)
    for modulus, rule in ((751 * ((1 << 2048) // 751 - 1 | 1), "small factors"), (prime * close, "close to each other")):
        with pytest.raises(KmsError, match=rule):
            check_strong_rsa(modulus, 65_537)
    for exponent in (1, 3, 65_538, 2**256 + 1):
        with pytest.raises(KmsError, match="exponent"):
            check_strong_rsa(key.public_key().public_numbers().n, exponent)


@pytest.mark.parametrize(
    "point", [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"], ids=["order 4", "order 1", "order 2"]
)
def test_an_ed25519_key_of_small_order_is_refused(point: bytes) -> None:
    """Anybody could sign for it: the signature (identity, 0) is valid for about every message."""
    key = soft_key(PublicKeyType.ED25519)
    der = key.sign(build_request(parse_subject_text("CN=a.example"), (), key.spki))
    own = key.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert "full order" in refused(der.replace(own, point))


@pytest.mark.parametrize(
    ("extension", "rule"),
    [
        ((x509.BasicConstraints(ca=True, path_length=None), True), "CA:TRUE"),
        ((x509.BasicConstraints(ca=True, path_length=None), False), "CA:TRUE"),
        ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True), "1.2.3.4"),
        ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), False), "1.2.3.4"),
        ((x509.TLSFeature([x509.TLSFeatureType.status_request]), False), "1.3.6.1.5.5.7.1.24"),
        ((x509.NameConstraints([x509.DNSName("a.example")], None), True), "2.5.29.30"),
        ((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False), "extended key usages"),
        ((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), False), "extended key usages"),
        (
            (x509.KeyUsage(True, False, False, False, False, True, False, False, False), True),
            "key usage keyCertSign",
        ),
    ],
)
def test_an_extension_beyond_the_profile_is_refused_or_dropped_as_it_says(
    extension: tuple[x509.ExtensionType, bool], rule: str
) -> None:
    data = csr(extension, dns("a.example"))
    assert rule in refused(data)
    dropping = Profile(**{**{name: getattr(SERVER, name) for name in SERVER.__slots__}, "unknown_extensions": Unwanted.DROP})
    parse_request(data).check_extensions(dropping)


def test_an_extension_within_the_profile_is_accepted() -> None:
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    request = parse_request(
        csr(
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage, True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        )
    )
    request.check_extensions(CLIENT)
    assert request.key_usage == {KeyUsage.DIGITAL_SIGNATURE}


@pytest.mark.parametrize(
    "names",
    [
        ("a.example\0.evil.example",),
        ("a.example", "a.example"),
        ("a.example", "A.EXAMPLE"),
        ("a" * 64 + ".example",),
        (".".join(["abcdefgh"] * 30),),
        ("a_b.example",),
        ("192.0.2.1",),
        ("*.*.example",),
        ("",),
        (" a.example",),
    ],
)
def test_a_hostile_name_is_refused(names: tuple[str, ...]) -> None:
    assert "csr: expected" in refused(csr(dns(*names)))


def test_more_names_than_any_profile_has_are_refused_before_they_are_read() -> None:
    assert "at most 100 names, not 101" in refused(csr(dns(*(f"a{number}.example" for number in range(100)), "bad_name")))
    assert len(parse_request(csr(dns(*(f"a{number}.example" for number in range(100))))).names) == 100


@pytest.mark.parametrize(
    "name",
    [
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        x509.DirectoryName(SUBJECT),
        x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x01a"),
    ],
)
def test_a_name_of_another_kind_is_refused(name: x509.GeneralName) -> None:
    assert "kinds dns, ip, uri, email" in refused(csr((x509.SubjectAlternativeName([name]), False)))


def test_an_overlong_name_writes_nothing_to_standard_error() -> None:
    """Python prints a warning there that nobody filters, and each length is another one."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a" * 99, _validate=False)])
    script = "import sys; from kms.certificates.x509.requests import parse_request; parse_request(sys.stdin.buffer.read())"
    result = subprocess.run([sys.executable, "-c", script], input=csr(subject=name), capture_output=True, check=False)
    assert b"expected 1 to 64 characters as CN" in result.stderr  # the refusal, which this script does not catch
    assert b"Warning" not in result.stderr


@pytest.mark.parametrize(
    "attributes",
    [
        [(NameOID.COMMON_NAME, "a" * 65)],
        [(NameOID.COMMON_NAME, "a\0b")],
        [(NameOID.COMMON_NAME, "a"), (NameOID.COMMON_NAME, "b")],
        [(NameOID.EMAIL_ADDRESS, "a@example.com")],
        [(NameOID.DOMAIN_COMPONENT, "example")],
        [(NameOID.COUNTRY_NAME, "xx")],
    ],
)
def test_a_hostile_subject_is_refused(attributes: list[tuple[x509.ObjectIdentifier, str]]) -> None:
    name = x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in attributes])
    assert "csr: expected" in refused(csr(subject=name))


def test_a_subject_with_two_attributes_in_one_part_is_refused() -> None:
    part = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.COMMON_NAME, "a"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "b")]
    )
    assert "one attribute" in refused(csr(subject=x509.Name([part])))


TO_DAMAGE = csr(dns("a.example", "b.example"), (x509.BasicConstraints(ca=False, path_length=None), True))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_request_is_refused_and_never_a_fault(data: st.DataObject) -> None:
    der = bytearray(TO_DAMAGE)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(der) - 1))
        der[place] ^= data.draw(st.integers(1, 255))
    try:
        parse_request(bytes(der))
    except KmsError as refusal:
        assert refusal.reason is Reason.CERTIFICATE_INVALID


def test_each_request_of_pycas_vectors_is_read_or_refused() -> None:
    outcomes = []
    for file in sorted((Path(cryptography_vectors.__file__).parent / "x509" / "requests").iterdir()):
        try:
            outcomes.append(parse_request(file.read_bytes()) is not None)
        except KmsError as refusal:
            assert refusal.reason is Reason.CERTIFICATE_INVALID
            outcomes.append(False)
    assert {True, False} == set(outcomes)


def test_a_key_that_cannot_sign_is_no_key_to_certify() -> None:
    spki = x25519.X25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(KmsError, match="key"):
        SoftKey(KEY.private).sign(build_request(parse_subject_text("CN=a"), (), spki))


def test_random_moduli_are_not_taken_for_roca() -> None:
    source = random.Random(7)
    assert not any(is_roca(source.getrandbits(2048) | 1) for _ in range(2000))
