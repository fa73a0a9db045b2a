"""Authorities and requests for the tests of certificates: who manages, who issues, and keys that are held elsewhere."""

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kms.v1 import certificates_pb2 as pb
from tests.conformance.refusals import refusal_of
from tests.fixtures.server import Caller, RunningServer

_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Platform:
    """An active authority, who manages it, and who issues from it."""

    name: str
    manager: Caller
    issuer: Caller
    authority: pb.CertificateAuthority

    def issue(self, **fields: object) -> pb.IssueCertificateResponse:
        """Issue a certificate as its issuer does, see `issue_from`."""
        return issue_from(self.issuer, self.name, **fields)


def issue_from(issuer: Caller, name: str, **fields: object) -> pb.IssueCertificateResponse:
    """Issue a certificate of an authority: of a request for a server unless *fields* say otherwise."""
    default = {} if "key" in fields else {"csr": csr("dns:www.example.com")}
    given: dict[str, Any] = {"profile": "server", **default, **fields}
    return issuer.certificates.IssueCertificate(pb.IssueCertificateRequest(authority=name, **given))


def refused(call: Callable[..., object], *arguments: object, **fields: object) -> str:
    """Return the reason for which *call* is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    return refusal_of(caught.value).reason


def new_name(prefix: str = "ca") -> str:
    """Return a name that no authority of the shared server has."""
    return f"{prefix}-{next(_numbers)}"


def manager_of(server: RunningServer) -> Caller:
    """Return a new user who may make authorities."""
    return server.caller(server.deployment.new_user(role="key-manager"))


def manager_and_issuer_of(server: RunningServer) -> Caller:
    """Return a new user who may make authorities, and issue where an authority lets them: intermediates, for one."""
    manager = manager_of(server)
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        connection.execute("SELECT authentication.assign_role(%s, 'certificate-issuer')", (manager.user_id,))
    return manager


def issuer_of(server: RunningServer) -> Caller:
    """Return a new user who may issue where an authority lets them."""
    return server.caller(server.deployment.new_user(role="certificate-issuer"))


def create(manager: Caller, name: str, **fields: object) -> pb.CreateCertificateAuthorityResponse:
    """Make an authority. Its key is kept wrapped: places for RESIDENT keys are few in a shared token."""
    given: dict[str, Any] = {"subject": f"CN={name}", "custody_min": 1, **fields}
    return manager.certificates.CreateCertificateAuthority(pb.CreateCertificateAuthorityRequest(name=name, **given))


def allow(manager: Caller, name: str, *grants: tuple[Caller, str]) -> pb.CertificateAuthority:
    """Let users issue certificates of profiles."""
    allowed = [pb.IssuerGrant(user_id=str(user.user_id), profile=profile) for user, profile in grants]
    request = pb.UpdateCertificateAuthorityRequest(authority=name, allow=allowed)
    return manager.certificates.UpdateCertificateAuthority(request).authority


def platform(server: RunningServer, **fields: object) -> Platform:
    """Make a root and its users."""
    manager, issuer, name = manager_of(server), issuer_of(server), new_name()
    create(manager, name, **fields)
    grants = [(issuer, profile) for profile in ("server", "client", "code-signing", "intermediate", "device")]
    return Platform(name, manager, issuer, allow(manager, name, *grants))


def csr(*names: str, subject: str = "", key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """Return a request (DER) of a new key for DNS names, given as `dns:NAME`."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if names:
        dns = [x509.DNSName(name.partition(":")[2]) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(dns), critical=False)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def pem(*ders: bytes) -> bytes:
    """Return certificates in PEM."""
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM) for der in ders)


def verified(directory: Path, leaf: bytes, roots: tuple[bytes, ...], untrusted: tuple[bytes, ...] = (), *options: str) -> str:
    """Return what `openssl verify -x509_strict` says of *leaf* (DER)."""
    files = {"leaf.pem": pem(leaf), "roots.pem": pem(*roots), "untrusted.pem": pem(*untrusted)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "roots.pem", *options]
    if untrusted:
        command += ["-untrusted", "untrusted.pem"]
    done = subprocess.run([*command, "leaf.pem"], cwd=directory, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def signed_elsewhere(request: bytes, root_key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    """Return what another authority makes of a request, a certificate of an authority, and its own certificate."""
    now = datetime.now(UTC).replace(microsecond=0)
    asked, root_name = x509.load_der_x509_csr(request), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "elsewhere")])
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ders = []
    for subject, key in ((asked.subject, asked.public_key()), (root_name, root_key.public_key())):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        ders.append(builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.DER))
    return ders[0], ders[1]
