"""Who a client certificate names, told by a real TLS handshake with grpc: hostile certificates are refused, all alike."""

import asyncio
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from structlog.testing import LogCapture

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.pki import client_identity
from kms.pki.authority import Authority, Issued, issue_client, issue_crl, issue_server, make_authority
from kms.pki.client_identity import ClientIdentity, host_clock
from kms.pki.trust import Trust, TrustFiles
from tests.hostile.certificates import ACCEPTED, REFUSED, issued

UUID = "0a1b2c3d-0000-4000-8000-00000000000f"
URI = f"kms://test/user/{UUID}"
NOW = host_clock()
Peer = Mapping[str, Iterable[bytes]]
Asked = grpc.aio.ServicerContext[bytes, bytes]


class Stage:
    """An authority with its identity check, whose clock the test moves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = make_authority(directory, now=NOW)
        self.crl_file = directory / "crl.pem"
        issue_server(self.authority, ["localhost"], now=NOW).write(directory / "server.crt", directory / "server.key")
        self.now = NOW

    def identity(self, *, with_crl: bool = False) -> ClientIdentity:
        return ClientIdentity(self.trust(with_crl=with_crl), deployment="test", clock=lambda: self.now)

    def trust(self, *, with_crl: bool = False, ca_file: str = "authority.crt") -> Trust:
        certificate, key, client_ca = (self.directory / name for name in ("server.crt", "server.key", ca_file))
        files = TrustFiles(certificate, key, client_ca, self.crl_file if with_crl else None)
        return Trust(files, clock=lambda: self.now)

    def revoke(self, *issued: Issued, by: Authority | None = None, days: int = 30) -> None:
        numbers = [x509.load_pem_x509_certificate(each.certificate).serial_number for each in issued]
        new = self.crl_file.with_suffix(".new")
        new.write_bytes(issue_crl(by or self.authority, numbers, now=NOW, days=days))
        new.replace(self.crl_file)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def peer(issued: Issued, uris: tuple[str, ...] = (URI,)) -> Peer:
    """What grpc says of a peer that presented *issued*."""
    return {"peer_uri": [uri.encode() for uri in uris], "x509_pem_cert": [issued.certificate]}


def certificate(authority: Authority, *names: x509.GeneralName, subject: str = "") -> Issued:
    """A certificate with any names, of the right authority: what a careless operator might issue."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=5))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = serialization.Encoding.PEM
    pkcs8 = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issued(builder.sign(authority.key, hashes.SHA256()).public_bytes(pem), pkcs8)


async def as_seen_by_grpc(stage: Stage, client: Issued) -> Peer:
    """Call a server over mTLS as *client* and return the peer as the server saw it."""
    seen: list[Peer] = []

    async def handle(_: bytes, context: Asked) -> bytes:
        seen.append(context.auth_context())
        return b""

    root = stage.authority.certificate.public_bytes(serialization.Encoding.PEM)
    own = issue_server(stage.authority, ["localhost"], now=NOW)
    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("t.T", {"Ask": grpc.unary_unary_rpc_method_handler(handle)})
    server.add_generic_rpc_handlers((handler,))
    credentials = grpc.ssl_server_credentials([(own.key, own.certificate)], root, require_client_auth=True)
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    try:
        offered = grpc.ssl_channel_credentials(root, client.key, client.certificate)
        async with grpc.aio.secure_channel(f"localhost:{port}", offered) as channel:
            await asyncio.wait_for(channel.unary_unary("/t.T/Ask", bytes, bytes)(b""), 10)
    finally:
        await server.stop(None)
    return seen[0]


def refused(identity: ClientIdentity, auth_context: Peer) -> None:
    with pytest.raises(KmsError) as caught:
        identity(auth_context)
    assert caught.value.reason is Reason.CREDENTIALS_INVALID
    assert caught.value.message == "the client certificate does not name a user who may call"
    assert caught.value.metadata == {}


async def test_the_user_is_the_one_uri_of_the_certificate(stage: Stage) -> None:
    found = await as_seen_by_grpc(stage, issue_client(stage.authority, URI, now=NOW))
    assert str(stage.identity()(found)) == UUID


async def test_a_dns_name_or_subject_in_the_shape_of_the_uri_is_no_user(stage: Stage) -> None:
    hostile = certificate(stage.authority, x509.DNSName(URI), subject=URI)
    found = await as_seen_by_grpc(stage, hostile)
    assert URI.encode() in tuple(found["x509_subject_alternative_name"])
    refused(stage.identity(), found)


@pytest.mark.parametrize(
    "uris",
    [
        pytest.param((), id="none"),
        pytest.param((URI, "kms://test/user/0a1b2c3d-0000-4000-8000-000000000000"), id="two"),
        pytest.param((URI, URI), id="twice the same"),
        pytest.param((URI, "https://elsewhere.example/"), id="one of another kind beside it"),
        pytest.param((f"kms://other/user/{UUID}",), id="another deployment"),
        pytest.param((f"kms://test/user/{UUID.upper()}",), id="upper-case uuid"),
        pytest.param((URI.replace("kms://test", "KMS://TEST"),), id="upper-case scheme"),
        pytest.param((URI + "/",), id="longer"),
        pytest.param((URI + "?x",), id="query"),
        pytest.param((URI + "\n",), id="line end"),
        pytest.param((URI + "\0",), id="nul"),
        pytest.param((URI.replace("test", "test/user/x"),), id="path before the user"),
    ],
)
async def test_other_uris_than_the_one_canonical_form_are_refused(stage: Stage, uris: tuple[str, ...]) -> None:
    hostile = certificate(stage.authority, *map(x509.UniformResourceIdentifier, uris), subject="x")
    refused(stage.identity(), await as_seen_by_grpc(stage, hostile))


def test_a_certificate_is_refused_before_and_after_its_time_also_on_an_open_connection(stage: Stage) -> None:
    issued, identity = issue_client(stage.authority, URI, now=NOW, days=1), stage.identity()
    assert identity(peer(issued))
    stage.now = NOW + timedelta(days=1, seconds=1)
    refused(identity, peer(issued))
    stage.now = NOW - timedelta(minutes=6)
    refused(identity, peer(issued))


def test_a_revoked_certificate_is_refused_from_the_moment_the_list_says_so(stage: Stage) -> None:
    kept, lost = (issue_client(stage.authority, URI, now=NOW) for _ in range(2))
    stage.revoke()
    identity = stage.identity(with_crl=True)
    assert identity(peer(lost)) == identity(peer(kept))
    stage.revoke(lost)
    refused(identity, peer(lost))
    assert identity(peer(kept))
    stage.revoke()
    assert identity(peer(lost))


def test_a_list_that_cannot_be_relied_on_refuses_everyone(stage: Stage) -> None:
    issued = issue_client(stage.authority, URI, now=NOW)
    stage.revoke()
    identity = stage.identity(with_crl=True)
    stage.revoke(by=make_authority(stage.directory / "other", now=NOW))
    refused(identity, peer(issued))
    stage.crl_file.write_bytes(b"nonsense")
    refused(identity, peer(issued))
    stage.crl_file.unlink()
    refused(identity, peer(issued))
    stage.revoke(days=1)
    assert identity(peer(issued))
    stage.now = NOW + timedelta(days=1, seconds=1)
    refused(identity, peer(issued))


def test_start_refuses_a_list_of_another_authority(stage: Stage) -> None:
    stage.revoke(by=make_authority(stage.directory / "other", now=NOW))
    with pytest.raises(KmsError, match="client_crl_file"):
        stage.identity(with_crl=True)


def test_start_refuses_a_file_that_does_not_hold_authorities_each_once(stage: Stage) -> None:
    one = (stage.directory / "authority.crt").read_bytes()
    leaf = issue_client(stage.authority, URI, now=NOW).certificate
    for content in (b"", one + one, leaf, b"nonsense"):
        file = stage.directory / "ca.pem"
        file.write_bytes(content)
        with pytest.raises(KmsError, match="client_ca_file"):
            stage.trust(ca_file="ca.pem")


def test_a_certificate_of_another_authority_of_the_same_name_is_refused(stage: Stage) -> None:
    other = make_authority(stage.directory / "other", now=NOW)
    assert other.certificate.subject == stage.authority.certificate.subject
    refused(stage.identity(), peer(issue_client(other, URI, now=NOW)))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_certificate_that_was_not_made_for_a_client_is_refused_and_the_log_says_why(
    stage: Stage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogCapture()
    monkeypatch.setattr(client_identity, "_LOG", structlog.wrap_logger(None, processors=[log]))
    identity, offered = stage.identity(), peer(issued(stage.authority, URI, REFUSED[kind], now=NOW))
    for _ in range(2):  # what was refused is not remembered as good
        refused(identity, offered)
    assert [REFUSED[kind].cause in entry["cause"] for entry in log.entries] == [True, True]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_certificate_for_a_client_is_accepted_whatever_else_it_is_for(stage: Stage, kind: str) -> None:
    assert str(stage.identity()(peer(issued(stage.authority, URI, ACCEPTED[kind], now=NOW)))) == UUID


def test_openssl_makes_a_certificate_that_is_accepted_as_the_documentation_says(stage: Stage, tmp_path: Path) -> None:
    documented = (
        (Path(__file__).parents[2] / "docs/operations.md").read_text().partition("## Certificates")[2].partition("\n## ")[0]
    )
    extensions = re.findall(r"^    (\w+ = .*)$", documented, re.MULTILINE)
    assert len(extensions) == 4
    uri = URI.rpartition("/user/")[0]
    content = "\n".join(extensions).replace("kms://<deployment id>", uri).replace("<uuid>", UUID)
    (tmp_path / "client.ext").write_text(content)
    command = documented.partition("`openssl x509 -req")[2].partition("`")[0].split()
    request = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/"]
    for arguments in ([*request, "-keyout", "client.key", "-out", "client.csr"], ["x509", "-req", *command]):
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    issued = Issued((tmp_path / "client.crt").read_bytes(), b"")
    stage.now = host_clock() + timedelta(minutes=1)  # openssl does not backdate it
    assert str(stage.identity()(peer(issued))) == UUID


@pytest.mark.parametrize(
    "auth_context",
    [
        {},
        {"peer_uri": [URI.encode()]},
        {"peer_uri": [URI.encode()], "x509_pem_cert": [b""]},
        {"peer_uri": [URI.encode()], "x509_pem_cert": [b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"]},
    ],
)
def test_a_peer_without_a_certificate_that_parses_is_refused(stage: Stage, auth_context: Peer) -> None:
    refused(stage.identity(), auth_context)


def test_bytes_that_are_no_text_are_refused(stage: Stage) -> None:
    issued = issue_client(stage.authority, URI, now=NOW)
    refused(stage.identity(), {"peer_uri": [b"\xff" + URI.encode()], "x509_pem_cert": [issued.certificate]})


def test_many_certificates_do_not_fill_the_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kms.pki.client_identity._CERTIFICATES_MAX", 2)
    identity = stage.identity()
    users = {f"kms://test/user/0a1b2c3d-0000-4000-8000-{number:012x}" for number in range(4)}
    found: list[UserId] = [identity(peer(issue_client(stage.authority, uri, now=NOW), (uri,))) for uri in users]
    assert len(set(found)) == 4
    assert len(identity._seen) == 2


def test_the_clock_of_the_host_is_aware() -> None:
    assert host_clock().tzinfo is UTC
    assert abs(host_clock() - datetime.now(UTC)) < timedelta(seconds=5)
