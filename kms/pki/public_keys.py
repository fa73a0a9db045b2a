"""Operations with public keys, by pyca/cryptography, libsecp256k1 (recovery) and PyCryptodome (Keccak)."""

import hashlib
from functools import lru_cache
from typing import Final

from coincurve import PublicKey as Secp256k1PublicKey
from Crypto.Hash import keccak
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from kms.domain.algorithms import DIGEST_BYTES, Hash, Scheme, SignatureAlgorithm

_PARSED_MAX: Final = 1024
_HASHES: Final[dict[Hash, hashes.HashAlgorithm]] = {
    Hash.SHA_1: hashes.SHA1(),  # noqa: S303 - OAEP alone takes it, where collisions do no harm (RFC 8017 appendix B.1)
    Hash.SHA_256: hashes.SHA256(),
    Hash.SHA_384: hashes.SHA384(),
    Hash.SHA_512: hashes.SHA512(),
}
_HASHLIB_NAMES: Final = {Hash.SHA_256: "sha256", Hash.SHA_384: "sha384", Hash.SHA_512: "sha512", Hash.SHA3_256: "sha3_256"}
_ECDSA_DIGEST: Final = ec.ECDSA(
    utils.Prehashed(hashes.SHA256())
)  # ECDSA reads no more of the hash than its length, 32 bytes for all


class PublicKeyOperations:
    """The port `PublicKeys`. Parsed keys are kept, the last 1,024."""

    def is_valid(self, public_key: str, algorithm: SignatureAlgorithm, data: bytes, signature: bytes) -> bool:
        """Whether *signature* (ECDSA: DER) is of *data*: the digest, for Ed25519 the message.

        A PSS salt is as long as the digest, as this service makes it and TLS 1.3 demands it (RFC 8446 section 4.2.3);
        a signature with another salt is not valid.
        """
        try:
            _verify(_parsed(public_key), algorithm, data, signature)
        except InvalidSignature:
            return False
        return True

    def encrypt_rsa(self, public_key: str, hash_: Hash, plaintext: bytes) -> bytes:
        """Encrypt by RSA-OAEP with MGF1 over the same hash and an empty label (RFC 8017 section 7.1)."""
        key = _parsed(public_key)
        if not isinstance(key, rsa.RSAPublicKey):
            raise TypeError("expected an RSA key")
        algorithm = _HASHES[hash_]
        return key.encrypt(plaintext, padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=None))

    def recovery_id(self, public_key: str, digest: bytes, raw: bytes) -> int:
        """Return v in 0..3 with which r‖s of *digest* recovers to this secp256k1 key (SEC 1 section 4.1.6).

        Raises ValueError if there is none: then the signature is not of this key and digest.
        """
        expected = _parsed(public_key).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        for v in range(4):
            if _recovered(raw + bytes((v,)), digest) == expected:
                return v
        raise ValueError("the signature does not recover to the key")

    def digest(self, hash_: Hash, message: bytes) -> bytes:
        """Return the hash of *message*; Keccak-256 with the padding from before FIPS 202."""
        if hash_ is Hash.KECCAK_256:
            return keccak.new(digest_bits=256, data=message).digest()
        return hashlib.new(_HASHLIB_NAMES[hash_], message).digest()


PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


@lru_cache(_PARSED_MAX)
def _parsed(public_key: str) -> PublicKey:
    key = load_pem_public_key(public_key.encode("ascii"))
    if not isinstance(key, PublicKey):
        raise TypeError("expected an EC, Ed25519 or RSA key")
    return key


def _verify(key: PublicKey, algorithm: SignatureAlgorithm, data: bytes, signature: bytes) -> None:
    match key:
        case ec.EllipticCurvePublicKey():
            key.verify(signature, data, _ECDSA_DIGEST)
        case ed25519.Ed25519PublicKey():
            key.verify(signature, data)
        case rsa.RSAPublicKey():
            hash_ = algorithm.hash or Hash.SHA_256
            key.verify(signature, data, _padding(algorithm.scheme, hash_), utils.Prehashed(_HASHES[hash_]))


def _padding(scheme: Scheme, hash_: Hash) -> padding.AsymmetricPadding:
    if scheme is Scheme.RSA_PKCS1:
        return padding.PKCS1v15()
    return padding.PSS(mgf=padding.MGF1(_HASHES[hash_]), salt_length=DIGEST_BYTES[hash_])


def _recovered(recoverable: bytes, digest: bytes) -> bytes | None:
    try:
        return Secp256k1PublicKey.from_signature_and_message(recoverable, digest, hasher=None).format(compressed=False)
    except ValueError:  # no point has that r, or not with this v
        return None
