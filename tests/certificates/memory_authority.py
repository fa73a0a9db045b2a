"""An authority whose key is in memory, for tests of what is built before a token signs it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from kms.certificates.x509.signing import PublicKey, Unsigned

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
_NO_PURPOSES = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


# Who validates asks a responder only for a certificate that names one.
_OCSP = x509.AccessDescription(
    AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier("http://pki.example.com/ocsp/test/1")
)


@dataclass(frozen=True, slots=True)
class MemoryAuthority:
    """A key and its certificate."""

    key: PrivateKey
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def sign(self, unsigned: Unsigned) -> bytes:
        """Return *unsigned* with the signature of the key, as the token makes it."""
        return unsigned.signed(signature(self.key, unsigned.to_sign))

    def issue(
        self,
        serial_number: int,
        *,
        now: datetime = NOW,
        for_ocsp: bool = False,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> "MemoryAuthority":
        """Return an end entity, for servers or for answering OCSP."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.OCSP_SIGNING if for_ocsp else ExtendedKeyUsageOID.SERVER_AUTH
        names = x509.SubjectAlternativeName([x509.DNSName(f"host-{serial_number}.example.com")])
        builder = (
            _builder(f"entity {serial_number}", self.certificate.subject, key.public_key(), serial_number, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{**_NO_PURPOSES, "digital_signature": True}), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.AuthorityInformationAccess([_OCSP]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if for_ocsp:
            builder = builder.add_extension(x509.OCSPNoCheck(), critical=False)
        return MemoryAuthority(key, builder.sign(self.key, _hash(self.key)))


@cache
def authority(kind: str = "p256", now: datetime = NOW) -> MemoryAuthority:
    """Return the authority with a key of this *kind*: p256, secp256k1, rsa or ed25519. One serves all tests of a process."""
    key = _key(kind)
    name = f"Test {kind}"
    builder = (
        _builder(name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), 1, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_PURPOSES, "key_cert_sign": True, "crl_sign": True}), critical=True)
    )
    return MemoryAuthority(key, builder.sign(key, _hash(key)))


def signature(key: PrivateKey, data: bytes) -> bytes:
    """Return the signature of *data* as a token makes it."""
    match key:
        case ec.EllipticCurvePrivateKey():
            return key.sign(data, ec.ECDSA(hashes.SHA256()))
        case rsa.RSAPrivateKey():
            return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        case ed25519.Ed25519PrivateKey():
            return key.sign(data)


def _builder(name: str, issuer: x509.Name, key: PublicKey, serial: int, now: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=90))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key(kind: str) -> PrivateKey:
    match kind:
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case _:
            return ec.generate_private_key(ec.SECP256K1() if kind == "secp256k1" else ec.SECP256R1())


def _hash(key: PrivateKey) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
