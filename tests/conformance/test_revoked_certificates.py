"""Revocation end to end: through gRPC and HTTP, believed by openssl, in mTLS between two of its processes."""

import itertools
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from socket import create_connection, socket
from typing import Final

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID

from kms.v1 import certificates_pb2 as pb
from tests.certificates.linting import crl_findings, ocsp_findings
from tests.conformance.certificates import Platform, csr, pem, platform
from tests.fixtures.server import RunningServer

_SECONDS: Final = 90.0
_numbers: Final = itertools.count(1)


@pytest.fixture(scope="module")
def shop(server: RunningServer) -> Platform:
    """A root that publishes where the server does."""
    return platform(server, base_url=server.publishing_url)


def _openssl(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - an address of the test's own server
        content: bytes = answer.read()
    return content


def _point(certificate: bytes) -> str:
    """Return where a certificate says that its CRL is."""
    found = x509.load_der_x509_certificate(certificate)
    points = found.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    return str((points[0].full_name or [])[0].value)


def _listed(url: str) -> set[int]:
    return {each.serial_number for each in x509.load_der_x509_crl(_fetched(url))}


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _revoke(shop: Platform, certificate: pb.Certificate, reason: int = 1) -> pb.Certificate:
    request = pb.RevokeCertificateRequest(certificate_id=certificate.id, reason=reason)  # type: ignore[arg-type]
    return shop.issuer.certificates.RevokeCertificate(request).certificate


def _asked(directory: Path, shop: Platform, certificate: bytes, *options: str) -> str:
    """Return what `openssl ocsp` says of a certificate, asked at the address that the certificate names."""
    (directory / "ca.pem").write_bytes(pem(shop.authority.certificate))
    (directory / "leaf.pem").write_bytes(pem(certificate))
    access = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    url = next(each for each in access.value if each.access_method == AuthorityInformationAccessOID.OCSP)
    arguments = ["-issuer", "ca.pem", "-CAfile", "ca.pem", *options, "-cert", "leaf.pem", "-url", url.access_location.value]
    return _openssl(directory, "ocsp", *arguments)


def test_a_revoked_certificate_is_refused_by_openssl(shop: Platform, tmp_path: Path) -> None:
    one, other = shop.issue(), shop.issue()
    revoked = _revoke(shop, one.certificate)
    assert (revoked.status, revoked.revocation_reason) == (pb.CERTIFICATE_STATUS_REVOKED, 1)
    crl = _fetched(_point(one.certificate.certificate))
    assert crl_findings(crl) == []
    (tmp_path / "ca.pem").write_bytes(pem(shop.authority.certificate))
    (tmp_path / "crl.pem").write_bytes(x509.load_der_x509_crl(crl).public_bytes(serialization.Encoding.PEM))
    for issued, word in ((one, "certificate revoked"), (other, "OK")):
        (tmp_path / "leaf.pem").write_bytes(pem(issued.certificate.certificate))
        said = _openssl(tmp_path, "verify", "-x509_strict", "-crl_check", "-CAfile", "ca.pem", "-CRLfile", "crl.pem", "leaf.pem")
        assert word in said


def test_the_certificate_of_the_authority_is_where_others_say_it_is(shop: Platform) -> None:
    issued = shop.issue().certificate.certificate
    access = x509.load_der_x509_certificate(issued).extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    url = next(each for each in access.value if each.access_method == AuthorityInformationAccessOID.CA_ISSUERS)
    assert _fetched(url.access_location.value) == shop.authority.certificate


def test_ocsp_says_good_and_then_revoked_with_and_without_a_nonce(shop: Platform, tmp_path: Path) -> None:
    issued = shop.issue()
    certificate = issued.certificate.certificate
    for options in ((), ("-no_nonce",), ("-sha256", "-no_nonce"), ("-respout", "answer.der")):
        said = _asked(tmp_path, shop, certificate, *options)
        assert "Response verify OK" in said, said
        assert "leaf.pem: good" in said
        assert "WARNING: no nonce" not in said
    assert ocsp_findings((tmp_path / "answer.der").read_bytes()) == []
    _revoke(shop, issued.certificate)
    for options in ((), ("-no_nonce",), ("-sha256", "-no_nonce")):
        said = _asked(tmp_path, shop, certificate, *options)
        assert "Response verify OK" in said
        assert "leaf.pem: revoked" in said
        assert "Reason: keyCompromise" in said


def test_ocsp_knows_nothing_of_what_was_never_issued(shop: Platform, tmp_path: Path) -> None:
    certificate = shop.issue().certificate.certificate
    said = _asked(tmp_path, shop, certificate, "-serial", "0x1234")
    assert "unauthorized" in said


def test_the_manager_publishes_a_list_at_once(shop: Platform) -> None:
    authority = pb.GetCrlRequest(authority=shop.name)
    before = shop.issuer.certificates.GetCrl(authority).crl
    made = shop.manager.certificates.PublishCrl(pb.PublishCrlRequest(authority=shop.name)).crl
    assert made.number > before.number
    assert shop.issuer.certificates.GetCrl(authority).crl == made
    with pytest.raises(grpc.RpcError) as refused:
        shop.issuer.certificates.PublishCrl(pb.PublishCrlRequest(authority=shop.name))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_list_of_each_shard_is_published(server: RunningServer) -> None:
    shop = platform(server, base_url=server.publishing_url, crl_shards=2)
    issued = [shop.issue() for _ in range(4)]
    for each in issued:
        _revoke(shop, each.certificate)
        url = _point(each.certificate.certificate)
        assert int(each.certificate.serial_number, 16) in _listed(url)
    asked = [pb.PublishCrlRequest(authority=shop.name, shard=shard) for shard in range(3)]
    crls = [shop.manager.certificates.PublishCrl(each).crl for each in asked]
    assert [each.shard for each in crls] == [0, 1, 2]
    assert sum(len(list(x509.load_der_x509_crl(each.crl))) for each in crls) == len(issued)
    with pytest.raises(urllib.error.HTTPError):
        _fetched(f"{server.publishing_url}/crl/{shop.name}/1/3.crl")


def test_metrics_say_when_a_list_ends(shop: Platform, server: RunningServer) -> None:
    shop.manager.certificates.PublishCrl(pb.PublishCrlRequest(authority=shop.name))
    labels = frozenset({("authority", f"{shop.name}/1")})
    _until(lambda: ("kms_crl_left_seconds", labels) in server.metrics())
    metrics = server.metrics()
    assert metrics["kms_crl_left_seconds", labels] > 6 * 86_400
    assert metrics["kms_crl_age_seconds", labels] < 3600


def test_an_authority_over_mtls_shuts_a_revoked_client_out(shop: Platform, tmp_path: Path) -> None:
    """A server of openssl's, with the CRL of the authority, takes one client and refuses the other."""
    (tmp_path / "ca.pem").write_bytes(pem(shop.authority.certificate))
    names = {"server": ("dns:localhost",), "client": ("uri:kms://test/user/1",), "revoked": ("uri:kms://test/user/2",)}
    certificates = dict[str, pb.Certificate]()
    for name, given in names.items():
        key = ec.generate_private_key(ec.SECP256R1())
        pkcs8 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / f"{name}.key").write_bytes(pkcs8)
        profile = "server" if name == "server" else "client"
        issued = shop.issue(profile=profile, names=given, csr=csr(key=key))
        certificates[name] = issued.certificate
        (tmp_path / f"{name}.pem").write_bytes(pem(issued.certificate.certificate))
    _revoke(shop, certificates["revoked"])
    crl = x509.load_der_x509_crl(_fetched(_point(certificates["revoked"].certificate)))
    (tmp_path / "crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    with _tls_server(tmp_path) as port:
        assert "Verification: OK" in _tls_client(tmp_path, port, "client")
        said = _tls_client(tmp_path, port, "revoked")
    assert "alert certificate revoked" in said


@contextmanager
def _tls_server(directory: Path) -> Iterator[int]:
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", "server.pem", "-key", "server.key"]
    command += ["-CAfile", "ca.pem", "-CRL", "crl.pem", "-crl_check", "-Verify", "1", "-verify_return_error", "-quiet"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _until(lambda: _answers(port))
            yield port
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _tls_client(directory: Path, port: int, name: str) -> str:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", "ca.pem", "-verify_return_error"]
    command += ["-cert", f"{name}.pem", "-key", f"{name}.key", "-verify_hostname", "localhost", "-tls1_2"]
    done = subprocess.run(command, cwd=directory, input=b"Q\n", capture_output=True, check=False, timeout=60)
    return (done.stdout + done.stderr).decode(errors="replace")
