"""Authorities and requests for the tests of certificates: who manages, who issues, and keys that are held elsewhere."""

import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kms.v1 import certificates_pb2 as pb
from tests.fixtures.server import Caller, RunningServer

_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Platform:
    """An active authority, who manages it, and who issues from it."""

    name: str
    manager: Caller
    issuer: Caller
    authority: pb.CertificateAuthority

    def issue(
        self, profile: str = "server", *, names: tuple[str, ...] = ("dns:www.example.com",), **fields: object
    ) -> pb.IssueCertificateResponse:
        """Issue a certificate as its issuer does: of a request for *names* unless *fields* have a key of another kind."""
        given: dict[str, Any] = fields if {"csr", "key"} & fields.keys() else {"csr": csr(*names), **fields}
        return self.issuer.certificates.IssueCertificate(
            pb.IssueCertificateRequest(authority=self.name, profile=profile, **given)
        )


def new_name(prefix: str = "ca") -> str:
    """Return a name that no authority of the shared server has."""
    return f"{prefix}-{next(_numbers)}"


def manager_of(server: RunningServer) -> Caller:
    """Return a new user who may make authorities."""
    return server.caller(server.deployment.new_user(role="key-manager"))


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
    grants = [(issuer, profile) for profile in ("server", "client", "code-signing", "intermediate")]
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
