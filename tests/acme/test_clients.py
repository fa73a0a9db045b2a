"""Unmodified ACME clients of other projects obtain, renew and revoke certificates, with their challenges asked on this host."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence, Set
from pathlib import Path

import pytest
from cryptography import x509

from kms.v1 import certificates_pb2
from tests.acme.client import b64
from tests.acme.conftest import AcmeServer, free_port

# `./run test-slow` installs the clients. A client of ours takes the same steps in every run: see test_protocol.py.
pytestmark = pytest.mark.slow
_SECONDS = 100


def _run(command: Sequence[str], acme: AcmeServer, directory: Path) -> str:
    """Run a client to its end, and return what it said."""
    trust = {
        name: str(acme.ca_file) for name in ("REQUESTS_CA_BUNDLE", "LEGO_CA_CERTIFICATES", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
    }
    environment = {**os.environ, **trust, "HOME": str(directory), "TMPDIR": str(directory), "NAMES": str(acme.names.directory)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def _needed(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def _statuses(acme: AcmeServer, name: str) -> list[int]:
    """Return the statuses of the certificates for a DNS name, the newest first."""
    request = certificates_pb2.ListCertificatesRequest(authority=acme.platform.name)
    found = acme.platform.issuer.certificates.ListCertificates(request).certificates
    return [certificate.status for certificate in found if f"dns:{name}" in certificate.names]


VALID, REVOKED = certificates_pb2.CERTIFICATE_STATUS_VALID, certificates_pb2.CERTIFICATE_STATUS_REVOKED


def test_certbot_obtains_renews_and_revokes(acme: AcmeServer, tmp_path: Path) -> None:
    account, name = acme.new_account(), "certbot.test"
    common = [_needed("certbot"), "--config-dir", "config", "--work-dir", "work", "--logs-dir", "logs", "--non-interactive"]
    server = ["--server", account.directory_url]
    obtain = [
        *common,
        "certonly",
        *server,
        *("--standalone", "--http-01-port", str(acme.http_port), "--http-01-address", "127.0.0.1"),
        *("--agree-tos", "--email", "admin@example.com", "--no-eff-email", "-d", name, "-d", f"www.{name}"),
        *("--eab-kid", account.account.id, "--eab-hmac-key", b64(account.secret)),
    ]
    _run(obtain, acme, tmp_path)
    _run([*common, "renew", "--force-renewal", "--no-random-sleep-on-renew"], acme, tmp_path)
    chain = x509.load_pem_x509_certificates((tmp_path / f"config/live/{name}/fullchain.pem").read_bytes())
    chain[0].verify_directly_issued_by(chain[1])
    assert _statuses(acme, name) == [VALID, VALID]
    revoke = [
        "revoke",
        *server,
        "--cert-path",
        f"config/live/{name}/cert.pem",
        "--reason",
        "superseded",
        "--no-delete-after-revoke",
    ]
    _run([*common, *revoke], acme, tmp_path)
    assert _statuses(acme, name) == [REVOKED, VALID]


def test_lego_obtains_renews_and_revokes(acme: AcmeServer, tmp_path: Path) -> None:
    account, name = acme.new_account(), "lego.test"
    common = [
        _needed("lego"),
        *("--server", account.directory_url, "--email", "admin@example.com", "--accept-tos", "--path", "lego"),
        *("--eab", "--kid", account.account.id, "--hmac", b64(account.secret)),
        *("--domains", name, "--http", "--http.port", f"127.0.0.1:{acme.http_port}"),
    ]
    _run([*common, "run"], acme, tmp_path)
    _run([*common, "renew", "--days", "1000", "--no-random-sleep"], acme, tmp_path)
    assert _statuses(acme, name) == [VALID, VALID]
    _run([*common, "revoke", "--keep"], acme, tmp_path)
    assert _statuses(acme, name) == [REVOKED, VALID]


def test_dehydrated_obtains_a_wildcard_by_dns_and_revokes(acme: AcmeServer, tmp_path: Path) -> None:
    account, name = acme.new_account(), "dehydrated.test"
    hook = tmp_path / "hook.sh"
    hook.write_text('#!/bin/sh\n[ "$1" = deploy_challenge ] && echo "$4" >> "$NAMES/_acme-challenge.$2"\nexit 0\n')
    hook.chmod(0o755)
    (tmp_path / "config").write_text(
        f'CA="{account.directory_url}"\nEAB_KID="{account.account.id}"\nEAB_HMAC_KEY="{b64(account.secret)}"\n'
        f'BASEDIR="{tmp_path}"\nCHALLENGETYPE="dns-01"\nHOOK="{hook}"\nCONTACT_EMAIL="admin@example.com"\nACCOUNT_KEY_ALGO="secp384r1"\n'
        f'CURL_OPTS="--cacert {acme.ca_file}"\n'
    )
    common = [_needed("dehydrated"), "--config", str(tmp_path / "config")]
    _run([*common, "--register", "--accept-terms"], acme, tmp_path)
    obtain = [*common, "--cron", "--domain", f"*.{name}", "--alias", name]
    _run(obtain, acme, tmp_path)
    assert _statuses(acme, f"*.{name}") == [VALID]
    _run([*obtain, "--force"], acme, tmp_path)
    assert _statuses(acme, f"*.{name}") == [VALID, VALID]
    _run([*common, "--revoke", str(tmp_path / "certs" / name / "cert.pem")], acme, tmp_path)
    assert _statuses(acme, f"*.{name}") == [REVOKED, VALID]


def test_caddy_serves_with_a_certificate_that_it_obtains_and_renews(acme: AcmeServer, tmp_path: Path) -> None:
    account, name, port = acme.new_account(), "caddy.test", free_port()
    issuer = {
        "module": "acme",
        "ca": account.directory_url,
        "email": "admin@example.com",
        "trusted_roots_pem_files": [str(acme.ca_file)],
        "external_account": {"key_id": account.account.id, "mac_key": b64(account.secret)},
        "challenges": {"http": {"alternate_port": acme.http_port}, "tls-alpn": {"disabled": True}},
    }
    # Each certificate is to be renewed at once.
    policy = {"subjects": [name], "issuers": [issuer], "renewal_window_ratio": 1.0}
    config = {
        "admin": {"disabled": True},
        "storage": {"module": "file_system", "root": str(tmp_path / "storage")},
        "apps": {
            "http": {
                "http_port": acme.http_port,
                "https_port": port,
                "servers": {"main": {"listen": [f"127.0.0.1:{port}"], "routes": [{"match": [{"host": [name]}]}]}},
            },
            "tls": {"automation": {"policies": [policy], "renew_interval": "1s"}},
        },
    }
    (tmp_path / "caddy.json").write_text(json.dumps(config))
    (tmp_path / "root.pem").write_text(ssl.DER_cert_to_PEM_cert(acme.platform.authority.certificate))
    with (tmp_path / "log").open("wb") as log:
        command = [_needed("caddy"), "run", "--config", "caddy.json"]
        caddy = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, stdout=log, stderr=log)
    try:
        first = _served(tmp_path / "root.pem", port, name, {None})
        _served(tmp_path / "root.pem", port, name, {None, first})
    finally:
        caddy.terminate()
        caddy.wait()
    assert _statuses(acme, name)[:2] == [VALID, VALID]


def _served(root: Path, port: int, name: str, others: Set[str | None]) -> str:
    """Return the serial number of the certificate that a server shows, once it is none of *others*; verified up to *root*."""
    context = ssl.create_default_context(cafile=str(root))
    ends_at, serial = time.monotonic() + _SECONDS, None
    while serial in others and time.monotonic() < ends_at:
        try:
            with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain, server_hostname=name) as tls:
                serial = str((tls.getpeercert() or {})["serialNumber"])
        except OSError:
            serial = None
        time.sleep(0.1)
    assert serial is not None
    assert serial not in others
    return serial
