"""OCSP requests and answers. The keys are in memory."""

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from hypothesis import given
from hypothesis import strategies as st

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.x509.ocsp import (
    CertId,
    CertStatus,
    OcspError,
    build_answer,
    error_answer,
    issuer_hashes,
    parse_answer,
    parse_ocsp_request,
)
from kms.domain.errors import KmsError, Reason
from tests.certificates.linting import ocsp_findings
from tests.certificates.memory_authority import NOW, MemoryAuthority, authority

_REVOKED = Revocation(NOW - timedelta(hours=1), RevocationReason.KEY_COMPROMISE)
_DAY = timedelta(days=1)


def _cert_id(issuer: MemoryAuthority, serial_number: int, hash_name: str = "sha1") -> CertId:
    return CertId(hash_name, *issuer_hashes(issuer.der, hash_name), serial_number)


def _answer(responder: MemoryAuthority, *statuses: CertStatus, nonce: bytes | None = None) -> bytes:
    return responder.sign(build_answer(statuses, responder.der, NOW, NOW + _DAY, nonce))


def _openssl(directory: Path, *arguments: str) -> str:
    command = ["openssl", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _asked(directory: Path, issuer: MemoryAuthority, *leaves: MemoryAuthority, options: tuple[str, ...] = ()) -> bytes:
    """Return the request that openssl makes about *leaves*."""
    (directory / "ca.pem").write_bytes(issuer.pem)
    certificates = list[str]()
    for leaf in leaves:
        (directory / f"{leaf.certificate.serial_number}.pem").write_bytes(leaf.pem)
        certificates += ["-cert", f"{leaf.certificate.serial_number}.pem"]
    _openssl(directory, "ocsp", "-issuer", "ca.pem", *options, *certificates, "-reqout", "request.der")
    return (directory / "request.der").read_bytes()


def _believed(directory: Path, answer: bytes, *leaves: MemoryAuthority) -> str:
    """Return what openssl says of *answer* to the request that it made."""
    (directory / "answer.der").write_bytes(answer)
    certificates = [word for leaf in leaves for word in ("-cert", f"{leaf.certificate.serial_number}.pem")]
    moment = str(int(NOW.timestamp()) + 60)
    options = ["-respin", "answer.der", "-CAfile", "ca.pem", "-attime", moment, "-validity_period", "999999999"]
    return _openssl(directory, "ocsp", "-issuer", "ca.pem", *certificates, "-no_nonce", "-reqin", "request.der", *options)


@pytest.mark.parametrize("kind", ["p256", "rsa", "ed25519"])
def test_openssl_believes_the_answers_of_a_delegated_signer(kind: str, tmp_path: Path) -> None:
    issuer = authority(kind)
    responder, good, revoked = issuer.issue(2, for_ocsp=True), issuer.issue(1001), issuer.issue(1002)
    for leaf, revocation, word in ((good, None, "good"), (revoked, _REVOKED, "revoked")):
        request = parse_ocsp_request(_asked(tmp_path, issuer, leaf))
        answer = _answer(responder, CertStatus(request.cert_ids[0], revocation), nonce=request.nonce)
        said = _believed(tmp_path, answer, leaf)
        assert "Response verify OK" in said, said
        assert f"{leaf.certificate.serial_number}.pem: {word}" in said
        assert "WARNING: no nonce" not in said


def test_a_request_for_several_certificates_has_one_answer(tmp_path: Path) -> None:
    issuer = authority()
    responder, leaves = issuer.issue(2, for_ocsp=True), [issuer.issue(number) for number in (1001, 1002, 1003)]
    request = parse_ocsp_request(_asked(tmp_path, issuer, *leaves))
    assert [cert_id.serial_number for cert_id in request.cert_ids] == [1001, 1002, 1003]
    statuses = [CertStatus(each, _REVOKED if each.serial_number == 1002 else None) for each in request.cert_ids]
    answer = _answer(responder, *statuses, nonce=request.nonce)
    said = _believed(tmp_path, answer, *leaves)
    assert "Response verify OK" in said
    assert [line.split(": ")[1] for line in said.splitlines() if ".pem: " in line] == ["good", "revoked", "good"]
    assert ocsp_findings(answer) == []


@pytest.mark.parametrize("hash_name", ["sha1", "sha256"])
def test_a_request_names_its_certificate_by_either_hash(hash_name: str, tmp_path: Path) -> None:
    issuer, leaf = authority(), authority().issue(1001)
    request = parse_ocsp_request(_asked(tmp_path, issuer, leaf, options=(f"-{hash_name}",)))
    assert request.cert_ids == (_cert_id(issuer, 1001, hash_name),)


@pytest.mark.parametrize("revocation", [None, _REVOKED, Revocation(NOW, RevocationReason.UNSPECIFIED)])
@pytest.mark.parametrize("nonce", [None, b"n" * 32])
def test_a_linter_finds_nothing_in_an_answer(revocation: Revocation | None, nonce: bytes | None) -> None:
    issuer = authority()
    responder = issuer.issue(2, for_ocsp=True)
    answer = _answer(responder, CertStatus(_cert_id(issuer, 1001), revocation), nonce=nonce)
    assert ocsp_findings(answer) == []


@pytest.mark.parametrize("revocation", [None, _REVOKED])
def test_an_answer_is_read_as_it_was_written(revocation: Revocation | None) -> None:
    issuer = authority()
    responder, status = issuer.issue(2, for_ocsp=True), CertStatus(_cert_id(issuer, 1001, "sha256"), revocation)
    parsed = parse_answer(_answer(responder, status), responder.der)
    assert (parsed.status, parsed.this_update, parsed.next_update) == (status, NOW, NOW + _DAY)


def test_an_answer_of_another_signer_is_refused() -> None:
    issuer = authority()
    ours, other = issuer.issue(2, for_ocsp=True), issuer.issue(3, for_ocsp=True)
    planted = _answer(other, CertStatus(_cert_id(issuer, 1001), None))
    with pytest.raises(KmsError) as caught:
        parse_answer(planted, ours.der)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_signature_of_something_else_never_leaves() -> None:
    issuer = authority()
    responder = issuer.issue(2, for_ocsp=True)
    one, other = (
        build_answer([CertStatus(_cert_id(issuer, number), None)], responder.der, NOW, NOW + _DAY, None) for number in (1, 2)
    )
    taken = responder.sign(one)
    signature = ocsp.load_der_ocsp_response(taken).signature
    with pytest.raises(KmsError) as caught:
        other.signed(signature)
    assert caught.value.reason is Reason.RECORD_INVALID


@pytest.mark.parametrize("size", [1, 16, 32, 128])
def test_a_nonce_of_1_to_128_octets_is_taken(size: int) -> None:
    assert parse_ocsp_request(_request(b"n" * size)).nonce == b"n" * size


@pytest.mark.parametrize("size", [0, 129, 2000])
def test_a_nonce_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(KmsError):
        parse_ocsp_request(_request(b"n" * size))


def test_a_request_of_more_than_4_kib_is_refused() -> None:
    with pytest.raises(KmsError):
        parse_ocsp_request(_request(b"n" * 5000))


def test_a_critical_extension_that_is_not_known_is_refused() -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    cert_id = _cert_id(authority(), 5)
    builder = _request_about(cert_id)
    noted = builder.add_extension(unknown, critical=False).build().public_bytes(Encoding.DER)
    assert parse_ocsp_request(noted).nonce is None
    with pytest.raises(KmsError):
        parse_ocsp_request(builder.add_extension(unknown, critical=True).build().public_bytes(Encoding.DER))


@given(st.binary(max_size=300))
def test_what_is_no_request_is_refused(data: bytes) -> None:
    _parsed_or_refused(data)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_a_damaged_request_is_read_or_refused(place: int, damage: bytes) -> None:
    data = _request(b"n" * 32)
    place %= len(data)
    _parsed_or_refused(data[:place] + damage + data[place + len(damage) :])


def test_errors_are_answers_that_nobody_signs() -> None:
    for error in OcspError:
        assert ocsp.load_der_ocsp_response(error_answer(error)).response_status.name == error.name


def _request(nonce: bytes) -> bytes:
    builder = _request_about(_cert_id(authority(), 1001))
    return builder.add_extension(x509.OCSPNonce(nonce), critical=False).build().public_bytes(Encoding.DER)


def _request_about(cert_id: CertId) -> ocsp.OCSPRequestBuilder:
    sha1 = hashes.SHA1()  # noqa: S303 - it names an issuer
    return ocsp.OCSPRequestBuilder().add_certificate_by_hash(
        cert_id.issuer_name_hash, cert_id.issuer_key_hash, cert_id.serial_number, sha1
    )


def _parsed_or_refused(data: bytes) -> None:
    try:
        request = parse_ocsp_request(data)
    except KmsError as error:
        assert error.reason is Reason.CERTIFICATE_INVALID
    else:
        assert request.cert_ids
