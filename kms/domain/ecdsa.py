"""ECDSA signatures as numbers: the low-S rule and the three forms. Nothing here is secret.

A token gives r‖s of 64 bytes with either s; both s and n-s verify. One of the two is chosen (s ≤ n/2, BIP 62, SEC 1 leaves it
open) so that a signature has one spelling.
"""

from dataclasses import dataclass
from typing import Final

from kms.domain.algorithms import KeyType
from kms.domain.errors import malformed

_ORDER: Final = {
    KeyType.SECP256K1: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141,
    KeyType.SECP256R1: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
}
_SCALAR_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class EcdsaSignature:
    """r and s on the curve of *key_type*, each in 1..n-1."""

    key_type: KeyType
    r: int
    s: int

    @property
    def is_low_s(self) -> bool:
        """Whether s ≤ n/2."""
        return self.s <= _ORDER[self.key_type] // 2

    def low_s(self) -> "EcdsaSignature":
        """Return the same signature with s ≤ n/2."""
        return self if self.is_low_s else EcdsaSignature(self.key_type, self.r, _ORDER[self.key_type] - self.s)

    def raw(self) -> bytes:
        """Return r‖s, 64 bytes."""
        return self.r.to_bytes(_SCALAR_BYTES, "big") + self.s.to_bytes(_SCALAR_BYTES, "big")

    def der(self) -> bytes:
        """Return the DER SEQUENCE of two INTEGERs (RFC 3279 section 2.2.3)."""
        body = _der_integer(self.r) + _der_integer(self.s)
        return bytes((0x30, len(body))) + body


def from_raw(key_type: KeyType, data: bytes) -> EcdsaSignature:
    """Return the signature in r‖s of 64 bytes, or raise MALFORMED."""
    if len(data) != 2 * _SCALAR_BYTES:
        raise malformed("signature", "expected r‖s of 64 bytes")
    signature = EcdsaSignature(key_type, int.from_bytes(data[:_SCALAR_BYTES], "big"), int.from_bytes(data[_SCALAR_BYTES:], "big"))
    order = _ORDER[key_type]
    if not (0 < signature.r < order and 0 < signature.s < order):
        raise malformed("signature", "expected r and s between 1 and the order of the curve")
    return signature


def from_der(key_type: KeyType, data: bytes) -> EcdsaSignature:
    """Return the signature in strict DER, or raise MALFORMED. Only the canonical encoding is accepted."""
    expected = "expected the DER SEQUENCE of the INTEGERs r and s"
    try:
        r_bytes = data[3]
        s_at = 4 + r_bytes + 2
        r, s = int.from_bytes(data[4 : 4 + r_bytes], "big"), int.from_bytes(data[s_at : s_at + data[s_at - 1]], "big")
    except IndexError:
        raise malformed("signature", expected) from None
    order = _ORDER[key_type]
    if not (0 < r < order and 0 < s < order):
        raise malformed("signature", expected)
    signature = EcdsaSignature(key_type, r, s)
    # Re-encoding is the strictness: whatever is not canonical differs from its own parse.
    if signature.der() != data:
        raise malformed("signature", expected)
    return signature


def _der_integer(value: int) -> bytes:
    body = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes((0x02, len(body))) + body
