"""The development identity authority: one ECDSA P-256 key that certifies clients and the server (RFC 5280).

In production an authority of the operator's own takes its place; the service needs its certificate and its CRL only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kms.domain.errors import malformed
from kms.pki.private_file import write_private

CERTIFICATE_FILE: Final = "authority.crt"
KEY_FILE: Final = "authority.key"

_AUTHORITY_DAYS: Final = 3650
_LEAF_DAYS: Final = 365
_CRL_DAYS: Final = 30
_BACKDATED: Final = timedelta(minutes=5)  # for clocks that are a little behind
_NO_PURPOSES: Final = {
    "digital_signature": False,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority that exists: its certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key (PKCS#8), both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    def write(self, cert_file: Path, key_file: Path) -> None:
        """Write both, replacing what is there; the key with mode 0400. Raises OSError."""
        write_private(key_file, self.key)
        cert_file.write_bytes(self.certificate)


def make_authority(directory: Path, *, now: datetime) -> Authority:
    """Return the authority in *directory* (`authority.crt`, `authority.key`), made for ten years on first use."""
    cert_file, key_file = directory / CERTIFICATE_FILE, directory / KEY_FILE
    if not cert_file.exists():
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _new_authority(now).write(cert_file, key_file)
    return load_authority(cert_file, key_file)


def load_authority(cert_file: Path, key_file: Path) -> Authority:
    """Return the authority in the two files. Raises OSError, and MALFORMED if they are not a P-256 pair in PEM."""
    try:
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    except (ValueError, TypeError):
        raise malformed("authority", f"expected PEM in {cert_file} and {key_file}, the key without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise malformed("authority", f"expected in {key_file} the elliptic-curve key of {cert_file}")
    return Authority(certificate, key)


def issue_client(authority: Authority, uri: str, *, now: datetime, days: int = _LEAF_DAYS) -> Issued:
    """Return a client certificate whose one name is *uri* (see `kms.domain.ids.identity_uri`)."""
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    return _issue(authority, name, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, days=days)


def issue_server(authority: Authority, hosts: Sequence[str], *, now: datetime, days: int = _LEAF_DAYS) -> Issued:
    """Return a server certificate for *hosts*: DNS names and IP addresses, at least one."""
    name = x509.SubjectAlternativeName([_host(host) for host in hosts])
    return _issue(authority, name, ExtendedKeyUsageOID.SERVER_AUTH, now=now, days=days)


def issue_crl(authority: Authority, serial_numbers: Iterable[int], *, now: datetime, days: int = _CRL_DAYS) -> bytes:
    """Return, as PEM, a revocation list of *serial_numbers* that is good for *days* (RFC 5280 section 5)."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - _BACKDATED)
        .next_update(now + timedelta(days=days))
    )
    for number in serial_numbers:
        revoked = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _new_authority(now: datetime) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Neo KMS development identity authority")])
    certificate = (
        _builder(name, name, key.public_key(), now=now, days=_AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_PURPOSES, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _issued(certificate, key)


def _issue(
    authority: Authority, name: x509.SubjectAlternativeName, purpose: x509.ObjectIdentifier, *, now: datetime, days: int
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    # An empty subject makes the alternative name the only one, and critical (RFC 5280 section 4.2.1.6).
    certificate = (
        _builder(x509.Name([]), issuer.subject, key.public_key(), now=now, days=days)
        .add_extension(name, critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_PURPOSES, "digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _issued(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    pkcs8 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issued(certificate.public_bytes(serialization.Encoding.PEM), pkcs8)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
