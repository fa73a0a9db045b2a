"""Authorities and certificates through gRPC, verified by what did not make them."""

from pathlib import Path

import pytest
from cryptography import x509

from kms.v1 import certificates_pb2 as pb
from tests.conformance.certificates import Platform, platform, verified
from tests.fixtures.server import RunningServer


@pytest.fixture(scope="module")
def shop(server: RunningServer) -> Platform:
    """A root whose issuer issues every profile."""
    return platform(server, base_url="http://pki.example.com")


def test_a_root_issues_a_server_certificate_that_openssl_accepts(shop: Platform, tmp_path: Path) -> None:
    issued = shop.issue(subject="CN=www.example.com")
    assert issued.chain == [shop.authority.certificate]
    assert verified(tmp_path, issued.certificate.certificate, (shop.authority.certificate,)) == "leaf.pem: OK"
    found = x509.load_der_x509_certificate(issued.certificate.certificate)
    assert f"{found.serial_number:x}" == issued.certificate.serial_number
    assert issued.certificate.status == pb.CERTIFICATE_STATUS_VALID
