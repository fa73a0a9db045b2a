"""Moving a ciphertext to another key: what a caller asks for, and what they get. `ChargedUses.reencrypt` does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from kms.app.keyring import require_key
from kms.app.limits import CIPHERTEXT_BYTES_MAX, MESSAGE_BYTES_MAX
from kms.app.ports import Keys
from kms.domain.algorithms import Hash
from kms.domain.ciphertext import parse_ciphertext
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.fields import check_size
from kms.domain.ids import KeyId, KeyRef, UserId, base_name
from kms.domain.lifecycle import Use
from kms.keys.crypto.encryption import ToDecrypt, ToEncrypt

# What the request of a re-encryption calls the fields of its encryption.
_FIELDS: Final = {"plaintext": "ciphertext", "aad": "new_aad"}


@dataclass(frozen=True, slots=True)
class ToReEncrypt:
    """A ciphertext for another key. `key` None: for the current key of its lineage. `new_aad` None: with the same *aad*.

    `source_key` and `uses` are `key` and `uses` of `ToDecrypt`; `oaep_hash` is that of `ToEncrypt`.
    """

    ciphertext: bytes
    aad: bytes = b""
    source_key: KeyRef | None = None
    key: KeyRef | None = None
    new_aad: bytes | None = None
    oaep_hash: Hash | None = None
    uses: tuple[Use, ...] = (Use.PROCESS,)

    def check(self) -> None:
        """Raise MALFORMED for what is too long."""
        check_size("ciphertext", self.ciphertext, bytes_max=CIPHERTEXT_BYTES_MAX)
        check_size("aad", self.aad, bytes_max=MESSAGE_BYTES_MAX)
        check_size("new_aad", self.new_aad or b"", bytes_max=MESSAGE_BYTES_MAX)

    def to_decrypt(self) -> ToDecrypt:
        """Return the first half: opening the old ciphertext."""
        return ToDecrypt(self.ciphertext, self.aad, self.source_key, raw_oaep=False, oaep_hash=None, uses=self.uses)

    def to_encrypt(self, key: KeyRef, plaintext: bytes) -> ToEncrypt:
        """Return the second half: encrypting *plaintext* with *key*."""
        return ToEncrypt(key, plaintext, self.aad if self.new_aad is None else self.new_aad, self.oaep_hash)

    async def target(self, keys: Keys, caller: UserId) -> KeyRef:
        """Return the key of the new ciphertext: the one that was named, or the name of the old key's lineage.

        Raises CIPHERTEXT_INVALID, KEY_NOT_FOUND. The name of a key is part of the record that its MAC proves.
        """
        if self.key is not None:
            return self.key
        source = await require_key(keys, caller, parse_ciphertext(self.ciphertext).key_id, recent=True)
        return base_name(source.name)


@dataclass(frozen=True, slots=True)
class ReEncrypted:
    """A new ciphertext, the key that made it, and the key that opened the old one."""

    ciphertext: bytes
    key_id: KeyId
    source_key_id: KeyId


@contextmanager
def of_new_ciphertext() -> Iterator[None]:
    """Let each MALFORMED of the encryption in the block name the field of the re-encryption that is at fault."""
    try:
        yield
    except KmsError as refusal:
        field = _FIELDS.get(refusal.metadata.get("field", ""))
        if refusal.reason is not Reason.MALFORMED or field is None:
            raise
        error = malformed(field, f"it does not fit the new key ({refusal.message})")
        error.key_id = refusal.key_id
        raise error from None
