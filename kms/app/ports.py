"""What the use cases need of the outside, each port a few verbs.

Cancellation is the deadline: the edge cancels a call whose time is up, and an implementation must not begin work for a
cancelled call. All failures are `KmsError`; a driver's own exceptions end in its package.
"""

from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from kms.domain.algorithms import Hash, KeySpec, SignatureAlgorithm
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, HeldKey, KeyFilter, KeyIdentity, KeyMaterial, KeyRecord, UsableKey
from kms.domain.lifecycle import Change, Move, Use
from kms.domain.permissions import Permission
from kms.domain.residents import Holdings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sealed:
    """What AES-GCM made: a 12-byte nonce drawn in the token, and the ciphertext with its 16-byte tag."""

    nonce: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key about to be stored. One whose `activated_at` lies ahead is pre-active until then; None is no limit, no end."""

    identity: KeyIdentity
    name: KeyName
    material: KeyMaterial
    metadata: dict[str, str]
    max_usage_count: int | None = None
    activated_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class KeyPage:
    """Keys in the order of their names. The next page begins after the name `goes_on_after`; None: there is none.

    `invalid` are keys of this page whose records are not as the service left them: each is RECORD_INVALID to who asks for it.
    """

    keys: Sequence[KeyRecord]
    goes_on_after: KeyName | None
    invalid: Sequence[KeyId] = ()


@dataclass(frozen=True, slots=True)
class User:
    """Who calls. `version` advances with every change of roles, grants or standing; `permissions` are those of his roles."""

    user_id: UserId
    name: str
    version: int
    permissions: frozenset[Permission] = frozenset()


class Uninterrupted(Protocol):
    """Does work to its end although its caller is cancelled; the cancellation takes effect afterwards."""

    async def __call__(self, work: Coroutine[Any, Any, T], /) -> T:
        """Return what *work* returns, or raise what it raises."""
        ...


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
        """Make a key in the token and return its envelope. Nothing is left in the token unless it is RESIDENT.

        A RESIDENT key has a mark in the token until `confirm`: its creation has not ended. CUSTODY_UNAVAILABLE where the token
        holds as many as are allowed. A call that fails or is cancelled returns after what it made is removed; where the token
        fails too, the mark stays.
        """
        ...

    async def confirm(self, key_id: KeyId) -> None:
        """Remove the mark of a RESIDENT key whose row is stored. Raises HSM_UNAVAILABLE where the token does not hold the key."""
        ...

    async def abandon(self, key_id: KeyId) -> None:
        """Remove a RESIDENT key that has a mark, and the mark. Leaves a key without a mark alone: it was confirmed."""
        ...

    async def discard(self, key_id: KeyId, bound_to: str) -> None:
        """Remove the token object of a RESIDENT key that is destroyed. Nothing else removes the object of a confirmed key.

        Raises WRONG_PURPOSE for a key that is bound to the service itself, if *bound_to* or the token says so.
        """
        ...

    async def residents(self) -> Collection[str]:
        """Return the `hsm_key_id` of every RESIDENT key whose object the token holds."""
        ...

    async def holdings(self) -> Holdings:
        """Return the RESIDENT keys and the marks in the token."""
        ...

    async def opens(self, key: HeldKey) -> bool:
        """Whether the envelope of *key* opens here, which proves that this service made it for these attributes. Uses nothing."""
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

    async def mac(self, data: bytes) -> bytes:
        """Return HMAC-SHA-256 (RFC 2104) of *data*, 1 byte to 1 MiB, under the token's own MAC key: 32 bytes.

        HSM_KEK_MISSING if the token has no MAC key.
        """
        ...

    def oaep_hashes(self) -> frozenset[Hash]:
        """Return the hashes with which the token does RSA-OAEP."""
        ...


class Keys(Protocol):
    """Stored keys, as the calling user sees them: another user's key is simply not there.

    Where *recent* will do, a key may be as it was at most a second ago, counted from before it was read; None is what is so now.
    Nobody is refused by what was: before a refusal the key is read without *recent*.
    """

    async def insert(
        self, caller: UserId, key: NewKey, *, call: "Call | None" = None, repeat: "Repeat | None" = None
    ) -> KeyRecord:
        """Store a key, and with it *repeat*; *call* goes into the trail.

        Raises NAME_TAKEN; MALFORMED for an expiry that has passed; REQUEST_ID_REUSED where something is kept under the id of
        *repeat* already.
        """
        ...

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key, or None where the caller has none by that id or name."""
        ...

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope, or None. A destroyed key has none and is found by `find` only."""
        ...

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        """Return how many keys of *caller* had *name* before: they are called `name@1`, `name@2`, ….

        Whoever owns the database may give another number. The keys of these names are proven when they are found.
        """
        ...

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return at most *limit* keys in the order of their names, beginning behind the name *after*.

        Fewer, or none, where few of those that it looks at fit: the last page is the one with no place to go on.
        """
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls what, and how the call is found again in log and trail. `peer` is the address without its port.

    `rpc` is `Service/Method`, and empty for what the service does for itself.
    """

    user: User
    request_id: str
    peer: str
    rpc: str = ""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A caller who was not admitted. `claimed` is whom the certificate names, which is no proof of anything."""

    request_id: str
    peer: str
    claimed: UserId | None


@dataclass(frozen=True, slots=True)
class Repeat:
    """An answer that is stored for a repeat, under the caller's own id and a MAC that recognizes the request.

    `answer_id` is in `result` too. It is empty for an answer that was read and not opened yet.
    """

    rpc: str
    request_id: str
    body_mac: bytes
    result: bytes
    answer_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the trail about a use of a key: charged (sign, encrypt, data key) or only recorded (decrypt).

    `version` is the key's version that the result was computed with. `details` are what the trail may hold of it:
    algorithm, sizes, digests; nothing secret and nothing derived from plaintext but as an HMAC.
    """

    call: Call
    action: str
    key_id: KeyId
    version: int
    use: Use
    is_charged: bool
    details: Mapping[str, str | int]
    repeat: Repeat | None = None


class Ledger(Protocol):
    """Charges and records, together and durably. A result leaves only after `settle` has returned.

    The key that `settle` refuses for what it is, and with CREDENTIALS_INVALID the caller, is read anew by who asks for it next,
    *recent* or not.
    """

    async def settle(self, entry: Entry) -> None:
        """Charge and record a use, or raise what the database says at that very moment.

        The state's reason (KEY_REVOKED, …), KEY_NOT_FOUND, USAGE_LIMIT_REACHED, CREDENTIALS_INVALID (the caller's standing or
        version changed), PERMISSION_DENIED (the use takes a permission that he does not have), STALE (the key's version
        changed, or the same request was answered meanwhile: begin again, with `earlier` and the key), REQUEST_ID_REUSED;
        STORE_UNAVAILABLE only where certainly nothing was charged, OUTCOME_UNKNOWN where that cannot be learnt before the
        call's time is up.
        """
        ...

    async def earlier(self, user_id: UserId, rpc: str, request_id: str) -> Repeat | None:
        """Return what was kept under this id less than 24 hours ago, or None."""
        ...

    def note_refusal(self, call: Call | Stranger, action: str, key: KeyId | None, reason: str) -> None:
        """Record a refusal, without waiting for it: in a queue and at a rate of its own. Of strangers it may be left out.

        *reason* is a `Reason`, or INTERNAL for a bug.
        """
        ...


@dataclass(frozen=True, slots=True)
class DestroyedKey:
    """A key that was destroyed."""

    key_id: KeyId
    destroyed_at: datetime


class Lifecycle(Protocol):
    """Moves keys between states. Each move is a domain event with the next version of the key, and a line of the trail."""

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move and return the key as it is then.

        Raises KEY_NOT_FOUND; STALE where the key is no longer at *version* (None: any); the state's reason where the table
        has no such move; USAGE_LIMIT_REACHED for reactivating a key at its limit; MALFORMED for an update that raises a
        limit or puts off an expiry.
        """
        ...

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy at most 100 keys whose time has come and return them: their envelopes are gone, the rows stay."""
        ...

    async def removable_objects(self, hsm_key_ids: Collection[str]) -> Collection[str]:
        """Return which of *hsm_key_ids* may be removed from the token: those of keys that the service destroyed when due.

        Never those of keys that are bound to the service, nor any that nothing but a row of the database speaks of.
        """
        ...


class Users(Protocol):
    """Who may call. Where *recent* will do, a user may be as he was at most a second ago; None is what is so now."""

    async def find(self, user_id: UserId, *, recent: bool = False) -> User | None:
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
