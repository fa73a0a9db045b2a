"""The development identity authority: what it issues satisfies other programs, and its key is closed to others."""

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from kms.domain.errors import KmsError
from kms.pki.authority import issue_client, issue_crl, issue_server, load_authority, make_authority

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
URI = "kms://test/user/00000000-0000-4000-8000-000000000001"


def openssl(*arguments: str | Path, at: datetime = NOW) -> subprocess.CompletedProcess[str]:
    command = ["openssl", arguments[0], "-attime", str(int(at.timestamp())), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_second_call_finds_the_same_authority(tmp_path: Path) -> None:
    first = make_authority(tmp_path / "authority", now=NOW)
    again = make_authority(tmp_path / "authority", now=NOW + timedelta(days=1))
    assert again.certificate == first.certificate


def test_private_keys_are_closed_to_others_and_not_shown(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, now=NOW)
    issued = issue_client(authority, URI, now=NOW)
    issued.write(tmp_path / "c.crt", tmp_path / "c.key")
    for name in ("authority.key", "c.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o400
    assert "PRIVATE" not in repr(issued)
    assert "key" not in repr(authority)


@pytest.mark.parametrize("purpose", ["sslclient", "sslserver"])
def test_openssl_accepts_a_certificate_for_its_own_purpose_only(tmp_path: Path, purpose: str) -> None:
    authority = make_authority(tmp_path, now=NOW)
    issue_client(authority, URI, now=NOW).write(tmp_path / "sslclient.crt", tmp_path / "1.key")
    issue_server(authority, ["kms.example"], now=NOW).write(tmp_path / "sslserver.crt", tmp_path / "2.key")
    for name in ("sslclient", "sslserver"):
        options = ("-x509_strict", "-CAfile", tmp_path / "authority.crt", "-purpose", purpose)
        result = openssl("verify", *options, tmp_path / f"{name}.crt")
        assert (result.returncode == 0) is (name == purpose), result.stderr


def test_a_server_certificate_names_hosts_and_addresses(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, now=NOW)
    certificate = x509.load_pem_x509_certificate(
        issue_server(authority, ["kms.example", "127.0.0.1", "::1"], now=NOW).certificate
    )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["kms.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_python_serves_tls_with_an_issued_certificate(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, now=NOW)
    issue_server(authority, ["kms.example"], now=NOW).write(tmp_path / "s.crt", tmp_path / "s.key")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "s.crt", tmp_path / "s.key")


def test_openssl_finds_a_revoked_certificate_in_the_list(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, now=NOW)
    kept, lost = (issue_client(authority, URI, now=NOW) for _ in range(2))
    (tmp_path / "crl.pem").write_bytes(
        issue_crl(authority, [x509.load_pem_x509_certificate(lost.certificate).serial_number], now=NOW)
    )
    for issued, name in ((kept, "kept"), (lost, "lost")):
        issued.write(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
    options = ("-crl_check", "-CAfile", tmp_path / "authority.crt", "-CRLfile", tmp_path / "crl.pem")
    assert openssl("verify", *options, tmp_path / "kept.crt").returncode == 0
    assert "certificate revoked" in openssl("verify", *options, tmp_path / "lost.crt").stderr


def test_a_key_of_another_authority_is_refused_by_name(tmp_path: Path) -> None:
    make_authority(tmp_path / "one", now=NOW)
    make_authority(tmp_path / "two", now=NOW)
    with pytest.raises(KmsError, match=r"two/authority\.key"):
        load_authority(tmp_path / "one/authority.crt", tmp_path / "two/authority.key")
    with pytest.raises(KmsError, match="expected PEM"):
        load_authority(tmp_path / "one/authority.key", tmp_path / "one/authority.key")
