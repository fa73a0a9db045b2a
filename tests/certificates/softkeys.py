"""Keys in software that sign as a token does: what they get, they sign."""

from dataclasses import dataclass
from functools import cache
from hashlib import sha384

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kms.certificates.profiles import PublicKeyType
from kms.certificates.x509.signing import Unsigned, spki_of

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

_CURVES = {
    PublicKeyType.P256: ec.SECP256R1(),
    PublicKeyType.P384: ec.SECP384R1(),
    PublicKeyType.SECP256K1: ec.SECP256K1(),
}


@dataclass(frozen=True)
class SoftKey:
    private: PrivateKey

    @property
    def spki(self) -> bytes:
        return spki_of(self.private.public_key())

    @property
    def pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, unsigned: Unsigned) -> bytes:
        """Return the object of *unsigned*, signed."""
        data, is_digest = unsigned.token_input
        assert is_digest is not isinstance(self.private, ed25519.Ed25519PrivateKey)
        hash_ = Prehashed(hashes.SHA384() if len(data) == sha384().digest_size else hashes.SHA256())
        match self.private:
            case ec.EllipticCurvePrivateKey():
                return unsigned.signed(self.private.sign(data, ec.ECDSA(hash_)))
            case rsa.RSAPrivateKey():
                return unsigned.signed(self.private.sign(data, padding.PKCS1v15(), hash_))
            case ed25519.Ed25519PrivateKey():
                return unsigned.signed(self.private.sign(data))


@cache
def soft_key(key_type: PublicKeyType, number: int = 0, *, bits: int = 2048) -> SoftKey:
    """Return the key of this type and number, the same one each time: RSA keys take long to make."""
    match key_type:
        case PublicKeyType.RSA:
            return SoftKey(rsa.generate_private_key(65_537, bits))
        case PublicKeyType.ED25519:
            return SoftKey(ed25519.Ed25519PrivateKey.generate())
        case _:
            return SoftKey(ec.generate_private_key(_CURVES[key_type]))
