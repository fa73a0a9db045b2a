"""What Encrypt hands out: a self-describing ciphertext that finds its key. `docs/formats.md` gives it byte by byte.

AES-GCM: `0x01 ‖ key id(16) ‖ nonce(12) ‖ ciphertext ‖ tag(16)`; RSA-OAEP: `0x02 ‖ key id(16) ‖ hash(1) ‖ ciphertext`.
"""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.domain.algorithms import Hash
from kms.domain.envelope import NONCE_BYTES, TAG_BYTES, lengths_prefixed
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId

AES_GCM: Final = 1
RSA_OAEP: Final = 2
_OAEP_CODE: Final = {Hash.SHA_1: 1, Hash.SHA_256: 2, Hash.SHA_384: 3, Hash.SHA_512: 4}


@dataclass(frozen=True, slots=True)
class AesCiphertext:
    """AES-GCM: `body` is the ciphertext with its 16-byte tag."""

    key_id: KeyId
    nonce: bytes
    body: bytes

    def encode(self) -> bytes:
        """Return the bytes handed to the caller."""
        return bytes((AES_GCM,)) + self.key_id.bytes + self.nonce + self.body


@dataclass(frozen=True, slots=True)
class RsaCiphertext:
    """RSA-OAEP with MGF1 over the same hash and an empty label: `body` is as long as the modulus."""

    key_id: KeyId
    hash: Hash
    body: bytes

    def encode(self) -> bytes:
        """Return the bytes handed to the caller."""
        return bytes((RSA_OAEP,)) + self.key_id.bytes + bytes((_OAEP_CODE[self.hash],)) + self.body


Ciphertext = AesCiphertext | RsaCiphertext


def ciphertext_invalid() -> KmsError:
    """Return the one error for every ciphertext that does not open: tag, associated data, padding and form alike."""
    return KmsError(Reason.CIPHERTEXT_INVALID, "the ciphertext or its associated data is not what was encrypted")


def parse_ciphertext(data: bytes) -> Ciphertext:
    """Return the ciphertext in *data*, or raise CIPHERTEXT_INVALID."""
    if len(data) < 18:
        raise ciphertext_invalid()
    key_id = KeyId(UUID(bytes=data[1:17]))
    if data[0] == AES_GCM and len(data) >= 17 + NONCE_BYTES + TAG_BYTES:
        return AesCiphertext(key_id, data[17 : 17 + NONCE_BYTES], data[17 + NONCE_BYTES :])
    hashes = {code: hash_ for hash_, code in _OAEP_CODE.items()}
    if data[0] == RSA_OAEP and data[17] in hashes:
        return RsaCiphertext(key_id, hashes[data[17]], data[18:])
    raise ciphertext_invalid()


def ciphertext_aad(key_id: KeyId, aad: bytes) -> bytes:
    """Return the associated data of an AES-GCM ciphertext; it is never empty, whatever the caller's *aad* is."""
    return lengths_prefixed(bytes((AES_GCM,)), key_id.bytes, aad)
