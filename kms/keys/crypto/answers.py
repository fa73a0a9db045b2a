"""Results of uses in the form in which the ledger stores them for a repeat: lengths-prefixed parts, the kind first.

`domain/answers.py` puts its version and a MAC in front. No form holds a plaintext: a data key is opened again in the token.
"""

from typing import Final
from uuid import UUID

from kms.domain.algorithms import Hash, Scheme, SignatureAlgorithm
from kms.domain.envelope import lengths_prefixed
from kms.domain.ids import KeyId
from kms.keys.crypto.encryption import DataKey, Encrypted
from kms.keys.crypto.reencryption import ReEncrypted
from kms.keys.crypto.signing import Signature

_LENGTH_BYTES: Final = 4


def encode_signature(signature: Signature) -> bytes:
    """Return the stored form of a signature."""
    algorithm = signature.algorithm
    parts = (algorithm.scheme.encode(), (algorithm.hash or "").encode(), signature.signature)
    return lengths_prefixed(b"signature", signature.key_id.bytes, *parts)


def decode_signature(content: bytes) -> Signature:
    """Return the signature that `encode_signature` encoded."""
    key_id, scheme, hash_, signature = _parts(content, b"signature", 4)
    algorithm = SignatureAlgorithm(Scheme(scheme.decode()), Hash(hash_.decode()) if hash_ else None)
    return Signature(signature, _key_id(key_id), algorithm)


def encode_encrypted(encrypted: Encrypted) -> bytes:
    """Return the stored form of a ciphertext."""
    return lengths_prefixed(b"ciphertext", encrypted.key_id.bytes, encrypted.ciphertext)


def decode_encrypted(content: bytes) -> Encrypted:
    """Return the ciphertext that `encode_encrypted` encoded."""
    key_id, ciphertext = _parts(content, b"ciphertext", 2)
    return Encrypted(ciphertext, _key_id(key_id))


def encode_reencrypted(reencrypted: ReEncrypted) -> bytes:
    """Return the stored form of a ciphertext that was moved to another key."""
    return lengths_prefixed(
        b"moved ciphertext", reencrypted.key_id.bytes, reencrypted.source_key_id.bytes, reencrypted.ciphertext
    )


def decode_reencrypted(content: bytes) -> ReEncrypted:
    """Return the ciphertext that `encode_reencrypted` encoded."""
    key_id, source_key_id, ciphertext = _parts(content, b"moved ciphertext", 3)
    return ReEncrypted(ciphertext, _key_id(key_id), _key_id(source_key_id))


def encode_data_key(data_key: DataKey) -> bytes:
    """Return the stored form of a data key: without its plaintext."""
    return lengths_prefixed(b"data key", data_key.key_id.bytes, data_key.ciphertext)


def decode_data_key(content: bytes) -> DataKey:
    """Return the data key that `encode_data_key` encoded, with an empty plaintext."""
    key_id, ciphertext = _parts(content, b"data key", 2)
    return DataKey(b"", ciphertext, _key_id(key_id))


def _parts(content: bytes, kind: bytes, number: int) -> list[bytes]:
    """Return the *number* parts behind *kind*. The MAC proves that the service made the content, so a mismatch is a bug."""
    parts = []
    rest = content
    while rest:
        end = _LENGTH_BYTES + int.from_bytes(rest[:_LENGTH_BYTES], "big")
        parts.append(rest[_LENGTH_BYTES:end])
        rest = rest[end:]
    if parts[:1] != [kind] or len(parts) != number + 1:
        raise ValueError(f"the content of a stored answer is no {kind.decode()}")
    return parts[1:]


def _key_id(value: bytes) -> KeyId:
    return KeyId(UUID(bytes=value))
