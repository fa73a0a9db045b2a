"""What rotations need of the outside."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kms.app.ports import Call, Repeat, User
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import KeyIdentity, KeyMaterial, KeyRecord
from kms.jobs.leasing import Lease
from kms.rotation.policy import RotationPolicy
from kms.rotation.rotation import Rotation, RotationFilter, RotationPlace, RotationRequest


@dataclass(frozen=True, slots=True)
class OldKey:
    """A key that is about to get a successor: its proven row, and how many predecessors it has."""

    identity: KeyIdentity
    row: Mapping[str, object]
    predecessors: int


class Rotations(Protocol):
    """The log of rotations, which is their queue too."""

    async def now(self) -> datetime:
        """Return the moment by the database's clock."""
        ...

    async def request(self, call: Call, request: RotationRequest, repeat_of: Callable[[UUID], Repeat] | None) -> UUID:
        """Ask for a rotation and return its id. If the key is being rotated already, return the id of that rotation.

        What *repeat_of* makes of the id is stored with it. Raises KEY_NOT_FOUND, CREDENTIALS_INVALID, REQUEST_ID_REUSED.
        """
        ...

    async def owner_of(self, caller: User, key_id: KeyId) -> UserId | None:
        """Return who owns a key that *caller* may rotate, or None. Only the record of the key proves it."""
        ...

    async def retry(self, call: Call, rotation_id: UUID) -> bool:
        """Make a rotation due at once, with new attempts. Return False if it, or another rotation of the key, is under way.

        Raises ROTATION_NOT_FOUND, CREDENTIALS_INVALID.
        """
        ...

    async def find(self, caller: User, rotation_id: UUID) -> Rotation | None:
        """Return a rotation of a key that *caller* may rotate, or None."""
        ...

    async def page(self, caller: User, which: RotationFilter, *, after: RotationPlace | None, limit: int) -> Sequence[Rotation]:
        """Return at most *limit* rotations of keys that *caller* may rotate, after the place *after*, the newest first."""
        ...

    async def proven_request(self, lease: Lease) -> RotationRequest:
        """Return the request of the rotation that is leased. Raises RECORD_INVALID unless the service made it."""
        ...

    async def old_key(self, request: RotationRequest) -> OldKey:
        """Return the key that is to be rotated, proven. Raises KEY_NOT_FOUND, RECORD_INVALID and why it must not be rotated."""
        ...

    async def switch(self, lease: Lease, old: OldKey, key_id: KeyId, material: KeyMaterial, policy_version: int | None) -> None:
        """Give the key its successor, in one transaction. *policy_version* is that of the policy that asked; None: a user did.

        Raises STALE if the key or that policy changed meanwhile, LeaseLostError.
        """
        ...

    async def proven_successor(self, owner: UserId, old_id: KeyId, key_id: KeyId) -> KeyRecord:
        """Return the key *key_id* if the records prove that it took the name of the key *old_id*, and note that outside.

        Raises RECORD_INVALID if they do not prove it, OUTCOME_UNKNOWN if the journal cannot be written.
        """
        ...

    async def has_key(self, owner: UserId, key_id: KeyId) -> bool:
        """Whether *owner* has a key of this id."""
        ...

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of dependents: the names of what is taken along."""
        ...

    async def take_along(self, kind: str, lease: Lease, request: RotationRequest, key_id: KeyId) -> int:
        """Give the successor *key_id* all dependents of a kind, and return how many there are. Raises LeaseLostError.

        Raises STORE_UNAVAILABLE, HSM_UNAVAILABLE, RECORD_INVALID, STALE.
        """
        ...


class ServedKeys(Protocol):
    """The keys that this process remembers."""

    def drop(self, key_id: UUID | None) -> None:
        """Forget a key."""
        ...


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A row that says that it is the policy of a name of a user. Only `Policies.proven` makes a policy of it."""

    owner_id: UserId
    name: KeyName
    row: Mapping[str, object]

    @property
    def requests(self) -> int:
        """Return how often a rotation was asked for since the key has been there. It decides how long to wait, and no more."""
        count = self.row["requests"]
        return count if isinstance(count, int) else 0


class Policies(Protocol):
    """When keys are rotated without anybody asking."""

    async def find(self, owner: UserId, name: KeyName) -> RotationPolicy | None:
        """Return the policy of a name, proven, or None. Raises RECORD_INVALID, HSM_UNAVAILABLE."""
        ...

    async def version(self, owner: UserId, name: KeyName) -> int | None:
        """Return the version of what is stored as the policy of a name, proven or not. None: nothing is."""
        ...

    async def set(self, call: Call, policy: RotationPolicy, look_at: datetime | None) -> bool:
        """Store a policy of the caller; workers look at it first at *look_at*. Return False if its version is not the next one.

        Raises KEY_NOT_FOUND, CREDENTIALS_INVALID.
        """
        ...

    async def clear(self, call: Call, name: KeyName) -> None:
        """Remove the policy of a name of the caller, if there is one. Raises CREDENTIALS_INVALID."""
        ...

    def to_look_at(self) -> AsyncIterator[StoredPolicy]:
        """Yield what is to be looked at: by time, or because of the uses of its key. Nothing of it is proven."""
        ...

    async def proven(self, stored: StoredPolicy) -> RotationPolicy:
        """Return the policy that is stored, or raise RECORD_INVALID unless the service made it. Raises HSM_UNAVAILABLE."""
        ...

    async def key(self, policy: RotationPolicy) -> tuple[KeyRecord, datetime] | None:
        """Return the key that is under *policy*, proven, and the moment by the database's clock. Raises RECORD_INVALID."""
        ...

    async def look_later(self, stored: StoredPolicy, look_at: datetime | None, *, is_failure: bool = False) -> None:
        """Look at the policy again at *look_at*; None: when its key changes. A failure is looked at less and less often.

        If the policy or its key changed since *stored* was read, the next round looks again.
        """
        ...

    async def request(self, request: RotationRequest, stored: StoredPolicy, wait_seconds: float) -> bool:
        """Ask for a rotation because of a policy, and not again for *wait_seconds*.

        Return False if one is under way, or if the policy or its key changed since *stored* was read: the next round looks again.
        """
        ...
