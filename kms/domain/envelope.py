"""The envelope: how a private key is kept in `encrypted_private_key`. `docs/formats.md` gives it byte by byte.

An envelope is `version(1) ‖ custody(1) ‖ KEK id(16) ‖ sealing-key id(16) ‖ nonce(12) ‖ sealed`, in base64. `sealed` is
AES-256-GCM (NIST SP 800-38D) under the sealing key over the inner layer: for WRAPPED the private key wrapped by the KEK
with AES-KWP (RFC 5649), for SEALED the raw private key, for RESIDENT the CKA_ID of the token object. The associated
data binds the envelope to its row, because key wrapping alone would let rows be swapped.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody, KeyIdentity

FORMAT_VERSION: Final = 1
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_HEADER_BYTES: Final = 2 + 16 + 16 + NONCE_BYTES
_CUSTODY_CODE: Final = {Custody.SEALED: 1, Custody.WRAPPED: 2, Custody.RESIDENT: 3}
_NO_KEK: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. `kek_id` is the nil UUID where no KEK took part (SEALED and RESIDENT)."""

    custody: Custody
    kek_id: UUID
    sealing_key_id: UUID
    nonce: bytes
    sealed: bytes

    def encode(self) -> str:
        """Return the text that is stored."""
        head = bytes((FORMAT_VERSION, _CUSTODY_CODE[self.custody]))
        return base64.b64encode(head + self.kek_id.bytes + self.sealing_key_id.bytes + self.nonce + self.sealed).decode()


def envelope_invalid() -> KmsError:
    """Return the one error for every envelope that does not fit its row, whatever the fault."""
    return KmsError(Reason.ENVELOPE_INVALID, "the stored key does not fit its record; it was altered or damaged")


def parse_envelope(text: str) -> Envelope:
    """Return the envelope in *text*, or raise ENVELOPE_INVALID."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise envelope_invalid() from None
    custody = {code: custody for custody, code in _CUSTODY_CODE.items()}.get(raw[1] if len(raw) > 1 else 0)
    # Base64 has spare bits at its end: only the canonical spelling is an envelope, so that no byte is free to vary.
    if (
        custody is None
        or raw[0] != FORMAT_VERSION
        or len(raw) <= _HEADER_BYTES + TAG_BYTES
        or base64.b64encode(raw).decode() != text
    ):
        raise envelope_invalid()
    return Envelope(custody, UUID(bytes=raw[2:18]), UUID(bytes=raw[18:34]), raw[34:_HEADER_BYTES], raw[_HEADER_BYTES:])


def associated_data(
    identity: KeyIdentity, *, custody: Custody, public_key: str, sealing_key_id: UUID, kek_id: UUID = _NO_KEK
) -> bytes:
    """Return the bytes an envelope is bound to: every fixed attribute of its row, each with its length in front."""
    spec = identity.spec
    return lengths_prefixed(
        b"key",
        bytes((FORMAT_VERSION,)),
        identity.key_id.bytes,
        identity.owner_id.bytes,
        spec.key_type.encode(),
        (spec.curve or "").encode(),
        str(spec.strength_bits).encode(),
        spec.purpose.encode(),
        identity.bound_to.encode(),
        custody.encode(),
        identity.origin.encode(),
        kek_id.bytes,
        sealing_key_id.bytes,
        hashlib.sha256(public_key.encode()).digest(),
    )


def lengths_prefixed(*parts: bytes) -> bytes:
    """Return *parts* joined, each behind its length as four bytes, big-endian: no two lists give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
