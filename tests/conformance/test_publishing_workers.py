"""Two workers publish on one port: one of them is killed while certificates are revoked, and then the token goes away."""

import base64
import os
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from kms.v1 import certificates_pb2 as pb
from tests.conformance.certificates import Platform, platform
from tests.conformance.test_outages import away
from tests.fixtures.server import Deployment, RunningServer

_SECONDS = 90.0
_CERTIFICATES = 6
_FETCHES = 20  # each by a connection of its own: that one of two workers has none of them happens once in 2¹⁹


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - an address of the test's own server
        content: bytes = answer.read()
    return content


def _number(crl: bytes) -> int:
    return x509.load_der_x509_crl(crl).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _revoked(shop: Platform, certificate_id: str) -> None:
    """Revoke a certificate, again until it is answered."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            request = pb.RevokeCertificateRequest(certificate_id=certificate_id, reason=pb.REVOCATION_REASON_SUPERSEDED)
            shop.issuer.certificates.RevokeCertificate(request, timeout=20)
        except grpc.RpcError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


def _warm(*urls: str) -> None:
    """Have each worker answer each of *urls*: one that was replaced serves again after a while."""
    deadline = time.monotonic() + _SECONDS
    for url in urls:
        left = _FETCHES
        while left:
            try:
                _fetched(url)
                left -= 1
            except (OSError, urllib.error.HTTPError):
                assert time.monotonic() < deadline
                time.sleep(0.2)


@pytest.mark.slow
def test_nothing_is_lost_with_a_worker_and_the_token_is_not_needed_to_publish(deployment: Deployment) -> None:
    deployment.write_config(sessions_max=64)
    with deployment.serving("--workers", "2") as server:
        url = server.publishing_url
        assert len({line["port"] for line in server.log() if line["event"] == "publishing"}) == 1
        shop = platform(server, base_url=url)
        issued = [shop.issue().certificate for _ in range(_CERTIFICATES + 1)]
        crl_url, good = f"{url}/crl/{shop.name}/1.crl", issued.pop()
        before = _number(_fetched(crl_url))
        with ThreadPoolExecutor(_CERTIFICATES) as revoking:
            done = [revoking.submit(_revoked, shop, each.id) for each in issued]
            os.kill(next(iter(server.workers())), signal.SIGKILL)
            for each in done:
                each.result()
        _until_listed(crl_url, {int(each.serial_number, 16) for each in issued})
        assert _number(_fetched(crl_url)) > before
        _check_without_token(server, shop, crl_url, good)


def _until_listed(url: str, serial_numbers: set[int]) -> None:
    """Wait until the list has all: a worker that was killed leaves the list to the job."""
    deadline = time.monotonic() + _SECONDS
    while {each.serial_number for each in x509.load_der_x509_crl(_fetched(url))} != serial_numbers:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _check_without_token(server: RunningServer, shop: Platform, crl_url: str, good: pb.Certificate) -> None:
    issuer = x509.load_der_x509_certificate(shop.authority.certificate)
    leaf = x509.load_der_x509_certificate(good.certificate)
    sha1 = hashes.SHA1()  # noqa: S303 - it names an issuer
    request = ocsp.OCSPRequestBuilder().add_certificate(leaf, issuer, sha1).build().public_bytes(Encoding.DER)
    ocsp_url = f"{server.publishing_url}/ocsp/{shop.name}/1/{_base64(request)}"
    certificate_url = f"{server.publishing_url}/ca/{shop.name}/1.crt"
    _warm(crl_url, ocsp_url, certificate_url)
    crl = _fetched(crl_url)
    with away(server.deployment):
        _until_away(server)
        for _ in range(_FETCHES):
            assert _fetched(crl_url) == crl
            answer = ocsp.load_der_ocsp_response(_fetched(ocsp_url))
            assert answer.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL
            assert answer.certificate_status is ocsp.OCSPCertStatus.GOOD
            assert _fetched(certificate_url) == shop.authority.certificate


def _until_away(server: RunningServer) -> None:
    deadline = time.monotonic() + _SECONDS
    while "the HSM does not answer" not in server.seen("/readyz")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _base64(data: bytes) -> str:
    return quote(base64.b64encode(data).decode(), safe="")
