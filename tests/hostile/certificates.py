"""Client certificates as a careless or deceived authority might issue them: the right name, and extensions of all kinds."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from kms.pki.authority import Authority, Issued

CLIENT: Final = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER: Final = ExtendedKeyUsageOID.SERVER_AUTH
ANY: Final = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE


@dataclass(frozen=True, slots=True)
class Made:
    """What a certificate says it is made for. `None` leaves an extension out; `cause` is what the log says of it."""

    purposes: tuple[x509.ObjectIdentifier, ...] | None = (CLIENT,)
    is_authority: bool | None = False
    key_usages: frozenset[str] | None = frozenset({"digital_signature"})
    more_names: bytes = b""
    cause: str = ""


REFUSED: Final = {
    "no extended key usage": Made(purposes=None, cause="clientAuth"),
    "no extension but the name": Made(purposes=None, is_authority=None, key_usages=None, cause="clientAuth"),
    "for a server": Made(purposes=(SERVER,), cause="clientAuth"),
    "for anything": Made(purposes=(ANY,), cause="clientAuth"),
    "for a server and anything": Made(purposes=(SERVER, ANY), cause="clientAuth"),
    "for mail": Made(purposes=(ExtendedKeyUsageOID.EMAIL_PROTECTION,), cause="clientAuth"),
    "for signing code": Made(purposes=(ExtendedKeyUsageOID.CODE_SIGNING,), cause="clientAuth"),
    "for signing OCSP answers": Made(purposes=(ExtendedKeyUsageOID.OCSP_SIGNING,), cause="clientAuth"),
    "an authority": Made(is_authority=True, key_usages=frozenset({"key_cert_sign", "crl_sign"}), cause="authority"),
    "an authority that is for clients": Made(is_authority=True, cause="authority"),
    "an authority without usages": Made(purposes=None, is_authority=True, key_usages=None, cause="authority"),
    "may sign certificates": Made(key_usages=frozenset({"digital_signature", "key_cert_sign"}), cause="keyCertSign"),
    "may sign certificates, no constraints": Made(
        is_authority=None, key_usages=frozenset({"digital_signature", "key_cert_sign"}), cause="keyCertSign"
    ),
    "may sign revocation lists": Made(key_usages=frozenset({"digital_signature", "crl_sign"}), cause="cRLSign"),
    "a name that nobody reads": Made(more_names=b"\xa3\x02\x30\x00", cause="x400Address"),
}
ACCEPTED: Final = {
    "for a client": Made(),
    "for a client and a server": Made(purposes=(SERVER, CLIENT)),
    "for a client and anything": Made(purposes=(ANY, CLIENT)),
    "for a client, without basic constraints": Made(is_authority=None),
    "for a client, without key usages": Made(is_authority=None, key_usages=None),
}
_USAGES: Final = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def issued(authority: Authority, uri: str, made: Made, *, now: datetime) -> Issued:
    """Return a certificate of *authority* for *uri* that says of itself what *made* does."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = b"\x86" + bytes([len(uri)]) + uri.encode()
    names = name + made.more_names
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30" + bytes([len(names)]) + names),
            critical=True,
        )
    )
    if made.purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(made.purposes), critical=False)
    if made.is_authority is not None:
        builder = builder.add_extension(x509.BasicConstraints(made.is_authority, None), critical=True)
    if made.key_usages is not None:
        usages = {usage: usage in made.key_usages for usage in _USAGES}
        builder = builder.add_extension(x509.KeyUsage(**usages), critical=True)
    pem = serialization.Encoding.PEM
    pkcs8 = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issued(builder.sign(authority.key, hashes.SHA256()).public_bytes(pem), pkcs8)
