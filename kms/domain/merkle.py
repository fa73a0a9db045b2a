"""The hash tree of RFC 6962 section 2.1, grown leaf by leaf from its frontier."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

HASH_BYTES: Final = 32


def leaf_hash(content: bytes) -> bytes:
    """Return the hash of a leaf: SHA-256 over 0x00 and its content."""
    return sha256(b"\x00" + content).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node: SHA-256 over 0x01 and the hashes of its two halves."""
    return sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """A tree as far as more leaves and the root need it: the roots of its perfect subtrees, the largest first.

    There is one for each bit that is set in `size`, the number of leaves; 64 at the very most.
    """

    size: int = 0
    hashes: Sequence[bytes] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for hashes that are not those of so many leaves."""
        if self.size < 0 or len(self.hashes) != self.size.bit_count() or any(len(each) != HASH_BYTES for each in self.hashes):
            raise ValueError(f"expected {self.size.bit_count()} hashes of {HASH_BYTES} bytes for {self.size} leaves")

    def extended(self, leaves: Iterable[bytes]) -> "Frontier":
        """Return the tree with more leaves, each given by its hash."""
        size, hashes = self.size, list(self.hashes)
        for node in leaves:
            rest = size
            while rest & 1:
                node = node_hash(hashes.pop(), node)  # noqa: PLW2901  # the leaf rises to the root of its subtree
                rest >>= 1
            hashes.append(node)
            size += 1
        return Frontier(size, tuple(hashes))

    def root(self) -> bytes:
        """Return the root of the tree; that of no leaves is the hash of nothing."""
        if not self.hashes:
            return sha256().digest()
        *larger, node = self.hashes
        for left in reversed(larger):
            node = node_hash(left, node)
        return node
