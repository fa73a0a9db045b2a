"""What a loaded key does, within one session. Every parameter is checked here before the token sees it.

SoftHSM 2.6.1 accepts a digest of any length for ECDSA and an RSA key for an ECDSA operation, so nothing is left to it.
"""

from kms.domain.algorithms import DIGEST_BYTES, EC_TYPES, Hash, KeySpec, KeyType, Purpose, Scheme, SignatureAlgorithm
from kms.domain.envelope import NONCE_BYTES, TAG_BYTES
from kms.domain.errors import KmsError, Reason, malformed
from kms.hsm import mechanisms
from kms.hsm.envelopes import Handle

_SCHEME_TYPES = {
    Scheme.ECDSA: EC_TYPES,
    Scheme.ED25519: frozenset({KeyType.ED25519}),
    Scheme.RSA_PKCS1: frozenset({KeyType.RSA}),
    Scheme.RSA_PSS: frozenset({KeyType.RSA}),
}
_MESSAGE_BYTES_MAX = 16 * 1024 * 1024
RANDOM_BYTES_MAX = 65_536
MAC_BYTES_MAX = 1024 * 1024


def check_signing(spec: KeySpec, algorithm: SignatureAlgorithm, data: bytes) -> None:
    """Raise WRONG_PURPOSE or DIGEST_LENGTH unless a key of *spec* can sign *data* with *algorithm*."""
    if spec.purpose is not Purpose.SIGNING or spec.key_type not in _SCHEME_TYPES[algorithm.scheme]:
        raise KmsError(Reason.WRONG_PURPOSE, f"a {spec.key_type} key for {spec.purpose} does not sign with {algorithm.scheme}")
    if algorithm.hash is None:
        if algorithm.scheme is not Scheme.ED25519 or len(data) > _MESSAGE_BYTES_MAX:
            raise malformed("data", "expected a hash for this scheme, or a message of at most 16 MiB")
        return
    if len(data) != DIGEST_BYTES[algorithm.hash]:
        raise KmsError(
            Reason.DIGEST_LENGTH,
            f"expected a digest of {DIGEST_BYTES[algorithm.hash]} bytes for {algorithm.hash}, got {len(data)}",
        )
    if spec.key_type is KeyType.RSA and algorithm.hash not in mechanisms.DIGEST_INFO:
        raise malformed("hash", f"expected one of {', '.join(sorted(mechanisms.DIGEST_INFO))} for RSA")


def sign(handle: Handle, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
    """Return the signature as the token makes it: ECDSA r‖s, Ed25519, RSASSA (RFC 8017)."""
    match algorithm.scheme:
        case Scheme.ECDSA:
            return bytes(handle.key.sign(data, mechanism=mechanisms.ECDSA))
        case Scheme.ED25519:
            return bytes(handle.key.sign(data, mechanism=mechanisms.EDDSA))
        case Scheme.RSA_PKCS1:
            prefix = mechanisms.DIGEST_INFO[_hash(algorithm)]
            return bytes(handle.key.sign(prefix + data, mechanism=mechanisms.PKCS1))
        case Scheme.RSA_PSS:
            hash_ = _hash(algorithm)
            parameters = (*mechanisms.RSA_HASH[hash_], DIGEST_BYTES[hash_])
            return bytes(handle.key.sign(data, mechanism=mechanisms.PSS, mechanism_param=parameters))


def check_encryption(spec: KeySpec, aad: bytes) -> None:
    """Raise WRONG_PURPOSE or MALFORMED unless a key of *spec* can encrypt with *aad*."""
    if spec.key_type is not KeyType.AES:
        raise KmsError(Reason.WRONG_PURPOSE, f"a {spec.key_type} key for {spec.purpose} does not do AES-GCM")
    if not aad:
        raise malformed("aad", "expected associated data that is not empty")


def check_sealed(nonce: bytes, body: bytes) -> bool:
    """Whether *nonce* and *body* have lengths that AES-GCM as we use it gives."""
    return len(nonce) == NONCE_BYTES and len(body) >= TAG_BYTES


def check_rsa_decryption(spec: KeySpec, body: bytes) -> bool:
    """Whether *body* is as long as the modulus. Raises WRONG_PURPOSE for a key that does not decrypt."""
    if spec.key_type is not KeyType.RSA or spec.purpose is not Purpose.ENCRYPTION:
        raise KmsError(Reason.WRONG_PURPOSE, f"a {spec.key_type} key for {spec.purpose} does not do RSA-OAEP")
    return len(body) * 8 == spec.strength_bits


def check_random(size_bytes: int) -> None:
    """Raise MALFORMED unless *size_bytes* is 1 to 65,536."""
    if not 1 <= size_bytes <= RANDOM_BYTES_MAX:
        raise malformed("size_bytes", f"expected 1 to {RANDOM_BYTES_MAX}")


def check_mac(data: bytes) -> None:
    """Raise MALFORMED unless *data* has 1 byte to 1 MiB."""
    if not 1 <= len(data) <= MAC_BYTES_MAX:
        raise malformed("data", f"expected 1 to {MAC_BYTES_MAX} bytes")


def _hash(algorithm: SignatureAlgorithm) -> Hash:
    if algorithm.hash is None:
        raise malformed("hash", f"expected one for {algorithm.scheme}")
    return algorithm.hash
