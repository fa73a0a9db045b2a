"""A key as the service sees it: one material, one purpose, one owner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from kms.domain.algorithms import KeySpec, KeyType
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.lifecycle import State

AES_USES_MAX: Final = 2**32  # NIST SP 800-38D section 8.3: encryptions under random nonces


class Custody(StrEnum):
    """How the private half is kept; from weakest to strongest SEALED, WRAPPED, RESIDENT."""

    SEALED = "SEALED"
    WRAPPED = "WRAPPED"
    RESIDENT = "RESIDENT"

    def meets(self, minimum: "Custody | None") -> bool:
        """Whether this custody is at least as strong as *minimum*."""
        order = tuple(Custody)
        return minimum is None or order.index(self) >= order.index(minimum)


class Origin(StrEnum):
    """Where the material was made."""

    GENERATED = "GENERATED"
    IMPORTED = "IMPORTED"


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """What is fixed about a key before it has any material."""

    key_id: KeyId
    owner_id: UserId
    spec: KeySpec
    bound_to: str = ""
    origin: Origin = Origin.GENERATED


@dataclass(frozen=True, slots=True)
class KeyMaterial:
    """What the token made for a `KeyIdentity`.

    `public_key` is SPKI PEM (RFC 5280), or for a symmetric key its check value: `kcv:` and the first three bytes,
    in hex, of AES-CMAC of a zero block. `envelope` is the base64 text of `domain/envelope.py`. `hsm_key_id` is the
    CKA_ID in hex of a RESIDENT key's token object, else None.
    """

    custody: Custody
    public_key: str
    envelope: str = field(repr=False)
    hsm_key_id: str | None = None


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key with its material: all that the HSM needs to use it. `version` is part of the name of any cached handle."""

    identity: KeyIdentity
    material: KeyMaterial
    version: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as a reader sees it: everything but the envelope. Moments are aware datetimes by the database's clock.

    None: no limit, active from the beginning, without end, never used, not pending destruction and so on.
    """

    identity: KeyIdentity
    name: KeyName
    state: State
    custody: Custody
    public_key: str
    version: int
    usage_counter: int
    created_at: datetime
    metadata: Mapping[str, str]
    hsm_key_id: str | None = None
    max_usage_count: int | None = None
    activated_at: datetime | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    deactivated_at: datetime | None = None
    superseded_at: datetime | None = None
    compromised_at: datetime | None = None
    compromise_occurred_at: datetime | None = None
    revoked_at: datetime | None = None
    destruction_scheduled_at: datetime | None = None
    destroyed_at: datetime | None = None

    @property
    def usage_limit(self) -> int | None:
        """How often the key may be used, which for AES has an end anyhow; None: without end."""
        return usage_limit(self.identity.spec.key_type, self.max_usage_count)


@dataclass(frozen=True, slots=True)
class UsableKey:
    """A key fetched to be used, with the state it was in when read."""

    record: KeyRecord
    held: HeldKey


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """Which of the caller's keys to list; None does not restrict. `lineage` is the name that its current key has."""

    key_type: str | None = None
    purpose: str | None = None
    status: str | None = None
    name_prefix: str | None = None
    lineage: KeyName | None = None


def usage_limit(key_type: str, max_usage_count: int | None) -> int | None:
    """Return how often a key may be used: the mirror of `cryptography.usage_limit`. None: without end."""
    ends = AES_USES_MAX if key_type == KeyType.AES else None
    return min((limit for limit in (max_usage_count, ends) if limit is not None), default=None)


def check_custody(custody: Custody, minimum: Custody | None) -> None:
    """Raise CUSTODY_UNAVAILABLE if *custody* is weaker than *minimum*."""
    if not custody.meets(minimum):
        raise KmsError(
            Reason.CUSTODY_UNAVAILABLE,
            f"this key type can be kept {custody} at best here, which is weaker than {minimum}",
            custody=custody,
        )
