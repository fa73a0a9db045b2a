"""Key types, purposes, hashes and signature forms, and the table of what fits what."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kms.domain.errors import KmsError, Reason, malformed


class KeyType(StrEnum):
    """`cryptography.keys.key_type`."""

    SECP256K1 = "secp256k1"
    SECP256R1 = "secp256r1"
    ED25519 = "ed25519"
    RSA = "rsa"
    AES = "aes"


class Purpose(StrEnum):
    """`cryptography.keys.key_purpose`: a key has exactly one."""

    SIGNING = "signing"
    ENCRYPTION = "encryption"
    AUTHENTICATION = "authentication"
    DERIVATION = "derivation"


class Hash(StrEnum):
    """A message digest. Keccak-256 is the original padding that Ethereum uses, not FIPS 202's SHA3-256."""

    SHA_256 = "sha-256"
    SHA_384 = "sha-384"
    SHA_512 = "sha-512"
    SHA3_256 = "sha3-256"
    KECCAK_256 = "keccak-256"
    SHA_1 = "sha-1"


class Scheme(StrEnum):
    """A signature scheme: FIPS 186-5 ECDSA, RFC 8032 Ed25519, RFC 8017 RSASSA-PKCS1-v1_5 and RSASSA-PSS."""

    ECDSA = "ecdsa"
    ED25519 = "ed25519"
    RSA_PKCS1 = "rsa-pkcs1"
    RSA_PSS = "rsa-pss"


class SignatureForm(StrEnum):
    """How an ECDSA signature is written: RFC 3279 DER, 64 bytes r‖s, or 65 bytes r‖s‖v with v in 0..3."""

    DER = "der"
    RAW = "raw"
    RECOVERABLE = "recoverable"


DIGEST_BYTES: Final = {
    Hash.SHA_256: 32,
    Hash.SHA_384: 48,
    Hash.SHA_512: 64,
    Hash.SHA3_256: 32,
    Hash.KECCAK_256: 32,
    Hash.SHA_1: 20,
}
ECDSA_HASHES: Final = frozenset({Hash.SHA_256, Hash.SHA3_256, Hash.KECCAK_256})
RSA_HASHES: Final = frozenset({Hash.SHA_256, Hash.SHA_384, Hash.SHA_512})
EC_TYPES: Final = frozenset({KeyType.SECP256K1, KeyType.SECP256R1})

_STRENGTHS: Final = {
    KeyType.SECP256K1: (256,),
    KeyType.SECP256R1: (256,),
    KeyType.ED25519: (256,),
    KeyType.RSA: (2048, 3072, 4096),
    KeyType.AES: (256, 192, 128),
}
_PURPOSES: Final = {
    KeyType.SECP256K1: {Purpose.SIGNING},
    KeyType.SECP256R1: {Purpose.SIGNING},
    KeyType.ED25519: {Purpose.SIGNING},
    KeyType.RSA: {Purpose.SIGNING, Purpose.ENCRYPTION},
    KeyType.AES: {Purpose.ENCRYPTION},
}
_SCHEMES: Final[dict[KeyType, tuple[Scheme, ...]]] = {
    KeyType.SECP256K1: (Scheme.ECDSA,),
    KeyType.SECP256R1: (Scheme.ECDSA,),
    KeyType.ED25519: (Scheme.ED25519,),
    KeyType.RSA: (Scheme.RSA_PSS, Scheme.RSA_PKCS1),
    KeyType.AES: (),
}
_CURVES: Final = {KeyType.SECP256K1: "secp256k1", KeyType.SECP256R1: "secp256r1", KeyType.ED25519: "ed25519"}


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a key is: type, purpose and strength in bits. Made by `key_spec`, so it is always a pair of the table."""

    key_type: KeyType
    purpose: Purpose
    strength_bits: int

    @property
    def curve(self) -> str | None:
        """The curve's name for elliptic-curve keys, else None (`key_curve`)."""
        return _CURVES.get(self.key_type)

    @property
    def is_symmetric(self) -> bool:
        """Whether the key has no public half."""
        return self.key_type is KeyType.AES


def key_spec(key_type: KeyType, purpose: Purpose, strength_bits: int | None) -> KeySpec:
    """Return the spec, or raise MALFORMED for a strength and WRONG_PURPOSE for a purpose that the type does not have.

    `strength_bits` None takes the type's first: 256 (EC, AES) or 2048 (RSA).
    """
    if purpose not in _PURPOSES[key_type]:
        allowed = ", ".join(sorted(_PURPOSES[key_type]))
        raise KmsError(
            Reason.WRONG_PURPOSE, f"a key of type {key_type} serves {allowed}, not {purpose}", field="purpose", purpose=purpose
        )
    strengths = _STRENGTHS[key_type]
    strength = strengths[0] if strength_bits is None else strength_bits
    if strength not in strengths:
        raise malformed("size_bits", f"expected one of {', '.join(map(str, sorted(strengths)))} for {key_type}")
    return KeySpec(key_type, purpose, strength)


@dataclass(frozen=True, slots=True)
class SignatureAlgorithm:
    """A scheme with its hash. Ed25519 hashes inside (RFC 8032), so its hash is None."""

    scheme: Scheme
    hash: Hash | None


def signature_algorithm(key_type: KeyType, scheme: Scheme | None, hash_: Hash | None) -> SignatureAlgorithm:
    """Return the algorithm for a key of *key_type*, filling in the defaults.

    Defaults: ECDSA with SHA-256, Ed25519, RSASSA-PSS with SHA-256. Raises WRONG_PURPOSE for a scheme of another
    key type and MALFORMED for a hash that the scheme does not take.
    """
    fitting = _SCHEMES[key_type]
    chosen = scheme or (fitting[0] if fitting else None)
    if chosen is None or chosen not in fitting:
        raise KmsError(Reason.WRONG_PURPOSE, f"a key of type {key_type} does not sign with {scheme or 'any scheme'}")
    if chosen is Scheme.ED25519:
        if hash_ is not None:
            raise malformed("hash", "expected none: Ed25519 signs the message itself")
        return SignatureAlgorithm(chosen, None)
    hashes = ECDSA_HASHES if chosen is Scheme.ECDSA else RSA_HASHES
    picked = hash_ or Hash.SHA_256
    if picked not in hashes:
        raise malformed("hash", f"expected one of {', '.join(sorted(hashes))} for {chosen}")
    return SignatureAlgorithm(chosen, picked)
