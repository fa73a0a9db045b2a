"""`kms ca` and `kms cert`, against a real server."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.cli.running import Ended, Kms
from tests.conformance.certificates import csr, pem, signed_elsewhere
from tests.fixtures.server import RunningServer


@dataclass(frozen=True, slots=True)
class As:
    """`kms` as a user."""

    kms: Kms
    config: Path
    user_id: str

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Ended:
        return self.kms("--config", self.config, *arguments, stdin=stdin)


@pytest.fixture
def as_user(kms: Kms, server: RunningServer) -> Callable[[str], As]:
    """Make `kms` run as a new user with a role."""

    def new(role: str) -> As:
        config = server.client_config(role, role=role)
        certificate = x509.load_pem_x509_certificate((config.parent / "client.crt").read_bytes())
        [uri] = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return As(kms, config, str(uri.value).rpartition("/")[2])

    return new


def test_an_authority_is_made_and_issues_for_whom_its_manager_allows(as_user: Callable[[str], As], tmp_path: Path) -> None:
    manager, issuer = as_user("key-manager"), as_user("certificate-issuer")
    key = issuer("key", "create", "tls", "--type", "secp256r1", "--json").json
    made = manager("ca", "create", "cli", "--subject", "CN=CLI Root", "--custody-min", "wrapped", "--validity", "30d", "--json")
    assert (made.json["status"], made.json["subject"], made.json["generation"]) == ("active", "CN=CLI Root", 1)
    issue = ("cert", "issue", "cli", "--profile", "server", "--key", "tls", "--name", "dns:www.example.com")
    assert (issuer(*issue, "--json").code, issuer(*issue, "--json").failure["reason"]) == (4, "PERMISSION_DENIED")
    assert manager("ca", "allow", "cli", issuer.user_id, "server").code == 0
    issued = issuer(*issue, "--chain")
    leaf, root = x509.load_pem_x509_certificates(issued.out)
    leaf.verify_directly_issued_by(root)
    listed = issuer("cert", "list", "--json").json["certificates"]
    assert [(each["names"], each["key_id"], each["status"]) for each in listed] == [(["dns:www.example.com"], key["id"], "valid")]
    (tmp_path / "next.csr").write_bytes(csr())
    renewed = issuer("cert", "renew", listed[0]["id"], "--csr", tmp_path / "next.csr", "--json").json
    assert (renewed["replaces"], renewed["names"]) == (listed[0]["id"], ["dns:www.example.com"])
    shown = issuer("cert", "show", listed[0]["id"])
    assert b"superseded at" in shown.out
    out = tmp_path / "leaf.der"
    assert issuer("cert", "show", listed[0]["id"], "--format", "der", "--out", out).code == 0
    assert x509.load_der_x509_certificate(out.read_bytes()) == leaf
    exported = manager("ca", "export", "cli")
    assert x509.load_pem_x509_certificate(exported.out) == root
    assert manager("ca", "allow", "cli", issuer.user_id, "server", "--revoke").code == 0
    assert issuer(*issue).code == 4
    assert manager("ca", "rotate", "cli", "--json").json["generation"] == 2
    assert [line.split("\t")[1:3] for line in manager("ca", "list").out.decode().splitlines() if line.startswith("cli\t")] == [
        ["2", "active"],
        ["1", "superseded"],
    ]
    crossed = x509.load_pem_x509_certificates(manager("ca", "export", "cli", "--cross").out)
    assert len(crossed) == 2
    assert manager("ca", "disable", "cli", "--json").json["status"] == "disabled"
    usage = issuer("cert", "issue", "cli", "--profile", "server")
    assert (usage.code, "--csr" in usage.err) == (2, True)


def test_an_authority_of_an_external_root_and_a_key_certified_elsewhere(as_user: Callable[[str], As], tmp_path: Path) -> None:
    manager = as_user("key-manager")
    asked = tmp_path / "site.csr"
    assert manager("ca", "create", "cli-site", "--subject", "CN=Site", "--external", "--out", asked).code == 0
    request = x509.load_pem_x509_csr(asked.read_bytes())
    certificate, root = signed_elsewhere(request.public_bytes(Encoding.DER), ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "chain.pem").write_bytes(pem(certificate, root))
    done = manager("ca", "import", "cli-site/1", "--in", tmp_path / "chain.pem", "--json")
    assert done.json["status"] == "active"
    manager("key", "create", "code", "--type", "rsa")
    sent = x509.load_pem_x509_csr(manager("cert", "request", "code", "--subject", "CN=Ann").out).public_bytes(Encoding.DER)
    mine, _ = signed_elsewhere(sent, ec.generate_private_key(ec.SECP256R1()))
    kept = manager("cert", "import", "code", "--json", stdin=mine).json
    assert (kept["subject"], kept["owner_id"], "authority_id" in kept) == ("CN=Ann", manager.user_id, False)


def test_accounts_of_acme_clients_are_made_listed_and_ended(as_user: Callable[[str], As]) -> None:
    manager, issuer = as_user("key-manager"), as_user("certificate-issuer")
    manager("ca", "create", "cli-acme", "--subject", "CN=ACME", "--custody-min", "wrapped")
    assert issuer("acme", "create", "cli-acme", "--json").failure["reason"] == "PERMISSION_DENIED"
    manager("ca", "allow", "cli-acme", issuer.user_id, "server")
    made = issuer("acme", "create", "cli-acme", "--json").json
    assert len(base64.urlsafe_b64decode(made["secret"] + "=")) == 32
    assert "directory" not in made, "this server does not serve ACME"
    [account] = issuer("acme", "list", "--json").json["accounts"]
    assert (account["id"], account["status"], account["authority"]) == (made["key_id"], "pending", "cli-acme")
    listed = issuer("acme", "list").out.decode()
    assert made["secret"] not in listed
    assert listed.count("\t") == 4
    ended = issuer("acme", "deactivate", account["id"])
    assert (ended.code, b"deactivated" in ended.out) == (0, True)
    missing = issuer("acme", "deactivate", "00000000-0000-4000-8000-000000000000", "--json")
    assert (missing.code, missing.failure["reason"]) == (3, "ACME_ACCOUNT_NOT_FOUND")
