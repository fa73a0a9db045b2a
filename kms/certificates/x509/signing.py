"""pyca/cryptography writes what is to be signed, and the token signs it.

A builder of pyca's asks a private key for a signature of the bytes that it wrote. Our private key is a stand-in:

    first pass    it notes the bytes, and answers with a placeholder    → `Unsigned`
    the token     signs the noted bytes
    second pass   it answers with the token's signature                 → the certificate

So an intent can be recorded before the token signs, and no DER is written by hand. This serves certificates, requests, revocation
lists and OCSP answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256, sha384
from typing import Any, Final, NoReturn, Protocol, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key, load_pem_public_key
from cryptography.x509.oid import SignatureAlgorithmOID

from kms.certificates.names import certificate_invalid
from kms.certificates.profiles import PublicKeyType
from kms.domain.algorithms import Hash, Scheme, SignatureAlgorithm
from kms.domain.errors import KmsError, Reason

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

ALGORITHMS: Final = frozenset(
    {
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.ED25519,
    }
)
"""How certificates and requests of others may be signed: nothing with SHA-1 or MD5."""
ALGORITHMS_RULE: Final = "expected a signature by RSA or ECDSA with SHA-256, SHA-384 or SHA-512, or by Ed25519"

_PLACEHOLDER_ECDSA: Final = bytes.fromhex("3006020101020101")  # r = s = 1
_ED25519_BYTES: Final = 64
_LARGE_RSA_BITS: Final = 3072
_CURVES: Final = {
    "secp256r1": PublicKeyType.P256,
    "secp384r1": PublicKeyType.P384,
    "secp256k1": PublicKeyType.SECP256K1,
}


class _Encodable(Protocol):
    def public_bytes(self, encoding: Encoding) -> bytes: ...


class Builder(Protocol):
    """A builder of pyca's: of a certificate, a request, a revocation list or an OCSP answer."""

    # Any: the four declare the same method with private keys of their own.
    def sign(self, private_key: Any, algorithm: Any) -> _Encodable:  # noqa: ANN401
        """Return the object with the signature that *private_key* makes."""
        ...


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An object that waits for the token's signature of `to_sign`.

    `draft` is its DER with a placeholder for the signature: all else of it is final, so it can be looked at before it is signed.
    """

    to_sign: bytes
    algorithm: SignatureAlgorithm
    draft: bytes
    _finish: Callable[[bytes], bytes] = field(repr=False, compare=False)

    @property
    def token_input(self) -> tuple[bytes, bool]:
        """What the token gets, and whether it is a digest. Ed25519 signs the whole, which must be at most 64 KiB (RFC 8032)."""
        match self.algorithm.hash:
            case None:
                return self.to_sign, False
            case Hash.SHA_384:
                return sha384(self.to_sign).digest(), True
            case _:
                return sha256(self.to_sign).digest(), True

    def signed(self, signature: bytes) -> bytes:
        """Return the object with *signature* (ECDSA: DER), as DER.

        Raises RECORD_INVALID if the signature is not of `to_sign` by the key that the object names: such an object never leaves.
        """
        return self._finish(signature)


def unsigned(builder: Builder, signer: PublicKey) -> Unsigned:
    """Return what *builder* writes, to be signed by the private half of *signer*."""
    algorithm = signature_algorithm_of(signer)
    hash_ = _hash(algorithm)
    stand_in = _stand_in(signer, _placeholder(signer))
    draft = builder.sign(stand_in, hash_).public_bytes(Encoding.DER)
    to_sign = stand_in.noted

    def finish(signature: bytes) -> bytes:
        second = _stand_in(signer, signature)
        der = builder.sign(second, hash_).public_bytes(Encoding.DER)
        if second.noted != to_sign or not is_signed(signer, algorithm, signature, to_sign):
            raise KmsError(Reason.RECORD_INVALID, "the token's signature is not by the key of the certificate")
        return der

    return Unsigned(to_sign, algorithm, draft, finish)


def signature_algorithm_of(signer: PublicKey) -> SignatureAlgorithm:
    """Return how *signer* signs certificates: what every verifier knows, with the hash that fits the key's strength."""
    match signer:
        case rsa.RSAPublicKey():
            return SignatureAlgorithm(Scheme.RSA_PKCS1, Hash.SHA_384 if signer.key_size >= _LARGE_RSA_BITS else Hash.SHA_256)
        case ec.EllipticCurvePublicKey():
            return SignatureAlgorithm(Scheme.ECDSA, Hash.SHA_384 if signer.curve.key_size > 256 else Hash.SHA_256)
        case ed25519.Ed25519PublicKey():
            return SignatureAlgorithm(Scheme.ED25519, None)


def is_signed(signer: PublicKey, algorithm: SignatureAlgorithm, signature: bytes, data: bytes) -> bool:
    """Whether *signature* is of *data* by *signer*."""
    hash_ = _hash(algorithm)
    try:
        match signer:
            case rsa.RSAPublicKey():
                signer.verify(signature, data, padding.PKCS1v15(), hash_ or hashes.SHA256())
            case ec.EllipticCurvePublicKey():
                signer.verify(signature, data, ec.ECDSA(hash_ or hashes.SHA256()))
            case ed25519.Ed25519PublicKey():
                signer.verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(256)
def load_public_key(spki: bytes) -> PublicKey:
    """Return the key of a SubjectPublicKeyInfo (DER). Raises CERTIFICATE_INVALID for what is none, or of another type."""
    try:
        return public_key_of(load_der_public_key(spki))
    except (ValueError, UnsupportedAlgorithm):
        raise certificate_invalid("key", "expected a public key of RSA, P-256, P-384, secp256k1 or Ed25519") from None


def public_key_of(key: object) -> PublicKey:
    """Return *key* as one that can be certified. Raises CERTIFICATE_INVALID for a key of another type or curve."""
    known = isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    )
    if not known or not isinstance(key, PublicKey):
        raise certificate_invalid("key", "expected a public key of RSA, P-256, P-384, secp256k1 or Ed25519")
    return key


def spki_of(key: PublicKey) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of *key*: a point of a curve in full, not compressed (RFC 5480 section 2.2)."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def spki_of_pem(public_key: str) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of a public key in PEM, as key records hold it."""
    return spki_of(public_key_of(load_pem_public_key(public_key.encode("ascii"))))


def type_of(key: PublicKey) -> tuple[PublicKeyType, int]:
    """Return the type of *key* and its size in bits."""
    match key:
        case rsa.RSAPublicKey():
            return PublicKeyType.RSA, key.key_size
        case ec.EllipticCurvePublicKey():
            return _CURVES[key.curve.name], key.key_size
        case ed25519.Ed25519PublicKey():
            return PublicKeyType.ED25519, 256


def _hash(algorithm: SignatureAlgorithm) -> hashes.SHA256 | hashes.SHA384 | None:
    match algorithm.hash:
        case None:
            return None
        case Hash.SHA_384:
            return hashes.SHA384()
        case _:
            return hashes.SHA256()


def _placeholder(signer: PublicKey) -> bytes:
    match signer:
        case rsa.RSAPublicKey():
            return bytes(signer.key_size // 8)
        case ec.EllipticCurvePublicKey():
            return _PLACEHOLDER_ECDSA
        case ed25519.Ed25519PublicKey():
            return bytes(_ED25519_BYTES)


class _StandIn:
    """A private key that notes what it is asked to sign, and answers with a signature that it was given."""

    def __init__(self, public: Any, signature: bytes) -> None:  # noqa: ANN401 - pyca has no type for all three
        self._public = public
        self._signature = signature
        self.noted = b""

    def public_key(self) -> Any:  # noqa: ANN401
        return self._public

    def sign(self, data: Any, *_: Any) -> bytes:  # noqa: ANN401 - RSA and ECDSA name a hash, Ed25519 does not
        self.noted = bytes(data)
        return self._signature

    @property
    def key_size(self) -> int:
        size: int = self._public.key_size
        return size

    @property
    def curve(self) -> Any:  # noqa: ANN401
        return self._public.curve

    def _never(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError("the private key is in the token")

    exchange = decrypt = private_numbers = private_bytes = private_bytes_raw = _never

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _EcStandIn(_StandIn, ec.EllipticCurvePrivateKey):
    pass


class _RsaStandIn(_StandIn, rsa.RSAPrivateKey):
    pass


class _Ed25519StandIn(_StandIn, ed25519.Ed25519PrivateKey):
    pass


def _stand_in(signer: PublicKey, signature: bytes) -> _StandIn:
    match signer:
        case rsa.RSAPublicKey():
            return _RsaStandIn(signer, signature)
        case ec.EllipticCurvePublicKey():
            return _EcStandIn(signer, signature)
        case ed25519.Ed25519PublicKey():
            return _Ed25519StandIn(signer, signature)
