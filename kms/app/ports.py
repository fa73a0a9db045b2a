"""What the use cases need of the outside, each port a few verbs.

Cancellation is the deadline: the edge cancels a call whose time is up, and an implementation must not begin work for a
cancelled call. All failures are `KmsError`; a driver's own exceptions end in its package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kms.domain.algorithms import Hash, KeySpec, SignatureAlgorithm
from kms.domain.ids import KeyName, KeyRef, UserId
from kms.domain.keys import Custody, HeldKey, KeyFilter, KeyIdentity, KeyMaterial, KeyRecord, UsableKey


@dataclass(frozen=True, slots=True)
class Sealed:
    """What AES-GCM made: a 12-byte nonce drawn in the token, and the ciphertext with its 16-byte tag."""

    nonce: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key about to be stored."""

    identity: KeyIdentity
    name: KeyName
    material: KeyMaterial
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class User:
    """Who calls. `version` advances with every change of roles, grants or standing."""

    user_id: UserId
    name: str
    version: int


class Hsm(Protocol):
    """The token. One contract suite (`tests/contract/test_hsm.py`) holds for every implementation.

    Any method may raise HSM_UNAVAILABLE (the token does not answer), and every one that takes a `HeldKey` may raise
    HSM_KEK_MISSING (the token lacks a key that the envelope names) or ENVELOPE_INVALID (the envelope does not fit).
    """

    def custody_for(self, spec: KeySpec, minimum: Custody | None) -> Custody:
        """Return the custody in which a key of *spec* would be made, or raise CUSTODY_UNAVAILABLE.

        RESIDENT is used only when *minimum* asks for it; HSM_MECHANISM_UNSUPPORTED if the token cannot make the type.
        """
        ...

    async def generate(self, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
        """Make a key in the token and return its envelope. Nothing is left in the token unless it is RESIDENT."""
        ...

    async def discard(self, material: KeyMaterial) -> None:
        """Remove the token object of a RESIDENT key that was never stored; nothing to do for other custodies."""
        ...

    async def sign(self, key: HeldKey, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
        """Sign. *data* is the digest (of the algorithm's length), for Ed25519 the message.

        ECDSA comes back as the token's r‖s of 64 bytes, either s; Ed25519 64 bytes; RSA as long as the modulus.
        """
        ...

    async def encrypt(self, key: HeldKey, plaintext: bytes, aad: bytes) -> Sealed:
        """Encrypt with an AES key by AES-GCM under a fresh nonce from the token. *aad* is not empty."""
        ...

    async def decrypt(self, key: HeldKey, sealed: Sealed, aad: bytes) -> bytes:
        """Open what `encrypt` made, or raise CIPHERTEXT_INVALID."""
        ...

    async def decrypt_rsa(self, key: HeldKey, hash_: Hash, body: bytes) -> bytes:
        """Open RSA-OAEP with MGF1 over the same hash and an empty label, or raise CIPHERTEXT_INVALID.

        HSM_MECHANISM_UNSUPPORTED for a hash that the token does not do.
        """
        ...

    async def random(self, size_bytes: int) -> bytes:
        """Return *size_bytes* random bytes from the token, 1 to 65,536."""
        ...

    def oaep_hashes(self) -> frozenset[Hash]:
        """Return the hashes with which the token does RSA-OAEP."""
        ...


class Keys(Protocol):
    """Stored keys, as the calling user sees them: another user's key is simply not there."""

    async def insert(self, caller: UserId, key: NewKey) -> KeyRecord:
        """Store a key that is active at once, or raise NAME_TAKEN."""
        ...

    async def find(self, caller: UserId, ref: KeyRef) -> KeyRecord | None:
        """Return the key, or None where the caller has none by that id or name."""
        ...

    async def find_usable(self, caller: UserId, ref: KeyRef) -> UsableKey | None:
        """Return the key with its envelope, or None. A destroyed key has none and is found by `find` only."""
        ...

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> Sequence[KeyRecord]:
        """Return at most *limit* keys in the order of their names, beginning behind the name *after*."""
        ...


class Users(Protocol):
    """Who may call."""

    async def find(self, user_id: UserId) -> User | None:
        """Return the user in good standing, or None for one that is unknown, locked or deleted."""
        ...


class PublicKeys(Protocol):
    """Operations with a public key. They need no token and run in the service. Keys are SPKI PEM."""

    def is_valid(self, public_key: str, algorithm: SignatureAlgorithm, data: bytes, signature: bytes) -> bool:
        """Whether *signature* (ECDSA: DER) is of *data*: the digest, for Ed25519 the message."""
        ...

    def encrypt_rsa(self, public_key: str, hash_: Hash, plaintext: bytes) -> bytes:
        """RSA-OAEP with MGF1 over the same hash and an empty label. *plaintext* fits (`oaep_bytes_max`)."""
        ...

    def recovery_id(self, public_key: str, digest: bytes, raw: bytes) -> int:
        """Return v in 0..3 with which r‖s of *digest* recovers to this secp256k1 key (SEC 1 section 4.1.6)."""
        ...

    def digest(self, hash_: Hash, message: bytes) -> bytes:
        """Return the hash of *message*."""
        ...
