"""`kms cert revoke` and `kms crl`, against a real server."""

from pathlib import Path

from cryptography import x509

from tests.cli.running import Kms
from tests.conformance.certificates import csr
from tests.fixtures.server import RunningServer


def test_a_certificate_is_revoked_and_its_list_is_shown_and_written(kms: Kms, server: RunningServer, tmp_path: Path) -> None:
    manager, issuer = (server.client_config(role, role=role) for role in ("key-manager", "certificate-issuer"))
    created = kms("--config", manager, "ca", "create", "revoking", "--subject", "CN=R", "--custody-min", "wrapped", "--json")
    assert created.code == 0, created.err
    (tmp_path / "www.csr").write_bytes(csr("dns:www.example.com"))
    certificate = x509.load_pem_x509_certificate((issuer.parent / "client.crt").read_bytes())
    [uri] = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    user = str(uri.value).rpartition("/")[2]
    assert kms("--config", manager, "ca", "allow", "revoking", user, "server").code == 0
    issue = ("cert", "issue", "revoking", "--profile", "server", "--csr", tmp_path / "www.csr", "--json")
    issued = kms("--config", issuer, *issue).json
    revoke = ("cert", "revoke", issued["id"], "--reason", "key-compromise")
    revoked = kms("--config", issuer, *revoke)
    assert (revoked.code, b"key_compromise" in revoked.out) == (0, True), revoked.err
    assert kms("--config", issuer, *revoke, "--json").json["status"] == "revoked"
    out = tmp_path / "list.crl"
    assert kms("--config", issuer, "crl", "show", "revoking", "--format", "der", "--out", out).code == 0
    crl = x509.load_der_x509_crl(out.read_bytes())
    assert [f"{each.serial_number:x}" for each in crl] == [issued["serial_number"]]
    shown = kms("--config", issuer, "crl", "show", "revoking", "--json").json
    assert x509.load_pem_x509_crl(shown["crl_pem"].encode()) == crl
    made = kms("--config", manager, "crl", "publish", "revoking", "--shard", "0", "--json").json
    assert made["number"] > shown["number"]
    assert kms("--config", issuer, "crl", "publish", "revoking", "--json").failure["reason"] == "PERMISSION_DENIED"
    hold = kms("--config", issuer, "cert", "revoke", issued["id"], "--reason", "hold")
    assert (hold.code, "key-compromise" in hold.err) == (2, True)
