"""What a rotation is, which keys may be rotated, and the rows that a rotation leaves. Pure values."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from kms.app.ports import User
from kms.domain.envelope import lengths_prefixed
from kms.domain.errors import INTERNAL, KmsError, Reason
from kms.domain.fields import parse_text
from kms.domain.ids import KeyId, KeyName, UserId, base_name
from kms.domain.key_row import Row
from kms.domain.keys import KeyMaterial, KeyRecord, Origin
from kms.domain.lifecycle import State, check_rotation
from kms.domain.permissions import Permission

REASON_CHARACTERS_MAX: Final = 100
FORMAT_VERSION: Final = 1
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
LAST_MOMENT: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
_REQUEST_AGE_MAX: Final = timedelta(days=1)


class RotationStatus(StrEnum):
    """How far a rotation is, as `key_rotations.migration_status` stores it."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RotationRequest:
    """Who asked for the successor of which key, when and why. The service makes a MAC of it, and acts on no other request.

    `initiated_by` None: a policy asked.
    """

    rotation_id: UUID
    owner_id: UserId
    key_id: KeyId
    reason: str
    initiated_by: UserId | None
    allows_compromised: bool
    created_at: datetime

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the request covers."""
        return lengths_prefixed(
            b"rotation request",
            bytes((FORMAT_VERSION,)),
            self.rotation_id.bytes,
            self.owner_id.bytes,
            self.key_id.bytes,
            self.reason.encode(),
            b"" if self.initiated_by is None else self.initiated_by.bytes,
            bytes((self.allows_compromised,)),
            b"%d" % ((self.created_at - _BEGINNING) // _MICROSECOND),
        )


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation as its caller sees it. Moments are aware datetimes by the database's clock."""

    rotation_id: UUID
    owner_id: UserId
    old_key_id: KeyId
    new_key_id: KeyId | None
    reason: str
    initiated_by: UserId | None
    allows_compromised: bool
    status: RotationStatus
    affected_records_count: int
    error_message: str
    created_at: datetime
    completed_at: datetime | None
    attempts: int

    @property
    def is_over(self) -> bool:
        """Whether nothing happens any more, unless somebody asks for a retry."""
        return self.status in (RotationStatus.COMPLETED, RotationStatus.FAILED)

    @property
    def was_tried(self) -> bool:
        """Whether an attempt has ended: the rotation is over, or waits for the next attempt."""
        return self.is_over or (self.status is RotationStatus.PENDING and self.error_message != "")


@dataclass(frozen=True, slots=True)
class RotationFilter:
    """Which rotations to list; None does not restrict."""

    key_id: KeyId | None = None
    status: RotationStatus | None = None


@dataclass(frozen=True, slots=True)
class RotationPlace:
    """A place in the list of rotations: after the rotation of this moment and id."""

    created_at: datetime
    rotation_id: UUID


def rotates_any(user: User) -> bool:
    """Whether *user* may rotate the keys of all users. Such a user uses none."""
    return Permission.KEYS_ROTATE in user.permissions


def rotation_not_found() -> KmsError:
    """Return the answer for a rotation that the caller may not see, or that is not there."""
    return KmsError(Reason.ROTATION_NOT_FOUND, "there is no rotation of this id of a key of yours")


def parse_reason(text: str) -> str:
    """Return the reason of a rotation, or raise MALFORMED."""
    return parse_text(text, field="reason", characters_max=REASON_CHARACTERS_MAX)


def check_rotatable(key: KeyRecord, *, allow_compromised: bool, by: UserId | None) -> None:
    """Raise why *key* must not be rotated: the reason of its state, or WRONG_PURPOSE for a key of the service itself.

    *by* asks, None: a policy. Only its owner has a key rotated that they stopped, since its successor is active and its uses
    count from 0: KEY_INACTIVE for one that was deactivated, USAGE_LIMIT_REACHED for one at its limit. A policy is its owner's.
    """
    if key.identity.bound_to:
        raise KmsError(Reason.WRONG_PURPOSE, "this key belongs to the service itself", bound_to=key.identity.bound_to)
    if key.superseded_at is not None:
        raise KmsError(Reason.KEY_INACTIVE, "the key was rotated: it has a successor", state=State.INACTIVE)
    check_rotation(key.state, allow_compromised=allow_compromised)
    if by is None or by == key.identity.owner_id:
        return
    if key.deactivated_at is not None:
        raise KmsError(Reason.KEY_INACTIVE, "the key was deactivated: only its owner rotates it", state=State.INACTIVE)
    if key.usage_limit is not None and key.usage_counter >= key.usage_limit:
        raise KmsError(Reason.USAGE_LIMIT_REACHED, "the key has been used as often as it may be: only its owner rotates it")


def check_still_wanted(key: KeyRecord, asked_at: datetime, now: datetime) -> None:
    """Raise unless a request of the moment *asked_at* still asks for a successor of *key*.

    Raises DEADLINE_EXCEEDED for a request of more than a day ago: nobody waits for it, and somebody may have put it back. Raises
    KEY_INACTIVE for a key that was deactivated since: its owner wants it to stop.
    """
    if now - asked_at > _REQUEST_AGE_MAX:
        raise KmsError(Reason.DEADLINE_EXCEEDED, "the rotation was asked for more than a day ago: ask again")
    if key.deactivated_at is not None and key.deactivated_at > asked_at:
        raise KmsError(Reason.KEY_INACTIVE, "the key was deactivated after the rotation was asked for", state=State.INACTIVE)


def is_successor(key: KeyRecord, of: KeyRecord) -> bool:
    """Whether *key* took the name of the key *of*, by records that are both proven: it was made when *of* was superseded."""
    return (
        of.superseded_at is not None
        and key.created_at == of.superseded_at
        and str(of.name) != str(base_name(of.name))
        and base_name(key.name) == base_name(of.name)
        and key.identity.spec == of.identity.spec
    )


def predecessor_name(name: KeyName, predecessors: int) -> KeyName:
    """Return what the key *name* is called once it has a successor, after so many *predecessors*."""
    return KeyName(f"{name}@{predecessors + 1}")


def superseded(row: Row, name: KeyName, moment: datetime) -> Row:
    """Return *row* as `cryptography.switch_key` leaves the predecessor at *moment*."""
    return {**row, "key_name": str(name), "superseded_at": moment, "version": row["version"] + 1}


def successor(row: Row, key_id: KeyId, material: KeyMaterial, moment: datetime) -> Row:
    """Return the row of the successor of the key in *row*: the same in all but its material and its moments.

    It is active from *moment*. A key that was to live for a while has a successor that lives as long.
    """
    made: Mapping[str, Any] = {
        "id": key_id,
        "public_key": material.public_key,
        "hsm_key_id": material.hsm_key_id,
        "custody": str(material.custody),
        "origin": str(Origin.GENERATED),
        "key_status": "active",
        "created_at": moment,
        "activated_at": None,
        "expires_at": _expiry(row, moment),
        "version": 1,
    }
    never = ("compromised_at", "revoked_at", "deactivated_at", "superseded_at", "destruction_scheduled_at", "destroyed_at")
    return {**row, **dict.fromkeys(never), "compromise_occurred_at": None, **made}


def adopted(row: Row, parent: KeyId) -> Row:
    """Return *row* as `cryptography.adopt_child` leaves a child of a key whose successor is *parent*."""
    return {**row, "parent_key_id": parent, "version": row["version"] + 1}


def not_taken_along(failures: Mapping[str, Exception]) -> KmsError:
    """Return the error of an attempt that has taken along all dependents but these kinds. A later attempt takes up the rest."""
    told = [
        f"{kind} ({error.reason}: {error.message})" if isinstance(error, KmsError) else f"{kind} ({INTERNAL})"
        for kind, error in failures.items()
    ]
    first = next((error.reason for error in failures.values() if isinstance(error, KmsError)), Reason.STORE_UNAVAILABLE)
    return KmsError(first, f"the key has its successor, and not taken along are: {', '.join(told)}")


def _expiry(row: Row, moment: datetime) -> datetime | None:
    ends_at: datetime | None = row["expires_at"]
    if ends_at is None:
        return None
    lifetime = ends_at - (row["activated_at"] or row["created_at"])
    if lifetime <= timedelta(0):
        # The expiry was brought forward, before the activation. Every key expires after it was made.
        lifetime = ends_at - row["created_at"]
    return moment + lifetime if lifetime < LAST_MOMENT - moment else LAST_MOMENT
