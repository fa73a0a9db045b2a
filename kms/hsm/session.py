"""One PKCS#11 session with the token's own keys as it sees them, and the operations they serve: sealing and MACs.

A session, its objects and a `TokenSession` belong to one thread at a time (an object of the binding is tied to the session
it came from). Methods raise the binding's errors; the callers in this package translate them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pkcs11

from kms.domain.algorithms import Hash
from kms.domain.envelope import NONCE_BYTES
from kms.hsm import mechanisms
from kms.hsm.errors import kek_missing

if TYPE_CHECKING:
    from kms.hsm.wrapping_keys import TokenView


@dataclass(frozen=True, slots=True)
class TokenSession:
    """A session, the KEKs and sealing keys by id, which of them new envelopes are made with, and the MAC key.

    `view` is what the connection knew of the token's keys when the session was opened.
    """

    raw: pkcs11.Session
    keks: Mapping[UUID, Any]
    sealing_keys: Mapping[UUID, Any]
    kek_id: UUID
    sealing_key_id: UUID
    mac_key: Any
    oaep_hashes: frozenset[Hash]
    view: "TokenView"

    def kek(self, key_id: UUID) -> Any:  # noqa: ANN401  # the binding makes a class for each object
        """Return the KEK, or raise HSM_KEK_MISSING."""
        found = self.keks.get(key_id)
        if found is None:
            raise kek_missing()
        return found

    def seal(self, plaintext: bytes, aad: bytes) -> tuple[bytes, bytes]:
        """Return nonce and AES-256-GCM ciphertext of *plaintext* under the current sealing key."""
        return encrypt_gcm(self.raw, self.sealing_keys[self.sealing_key_id], plaintext, aad)

    def unseal(self, sealing_key_id: UUID, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
        """Open what `seal` made. Raises HSM_KEK_MISSING, or the binding's error for what does not open."""
        key = self.sealing_keys.get(sealing_key_id)
        if key is None:
            raise kek_missing()
        return decrypt_gcm(key, nonce, sealed, aad)

    def mac(self, data: bytes) -> bytes:
        """Return HMAC-SHA-256 (RFC 2104) of *data*, which is not empty, under the MAC key: 32 bytes."""
        return bytes(self.mac_key.sign(data, mechanism=mechanisms.HMAC))


def encrypt_gcm(session: pkcs11.Session, key: Any, plaintext: bytes, aad: bytes) -> tuple[bytes, bytes]:  # noqa: ANN401  # the binding makes a class for each object
    """Return a fresh nonce from the token and the AES-GCM ciphertext with its tag (NIST SP 800-38D)."""
    nonce = session.generate_random(NONCE_BYTES * 8)
    parameters = mechanisms.gcm_parameters(nonce, aad)
    return nonce, key.encrypt(plaintext, mechanism=mechanisms.GCM, mechanism_param=parameters)


def decrypt_gcm(key: Any, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:  # noqa: ANN401  # as above
    """Return the plaintext of *sealed*, which ends in its tag. Raises the binding's error if the tag is wrong."""
    parameters = mechanisms.gcm_parameters(nonce, aad)
    return bytes(key.decrypt(sealed, mechanism=mechanisms.GCM, mechanism_param=parameters))
