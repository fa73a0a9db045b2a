"""What a lease is: a worker has an item of work for a while, and extends that while as long as it lives.

    due ──claim──► leased ──finish step──► leased ──complete──► completed
     ▲               │ │
     └── back-off ◄──┘ └── no extension: the lease runs out, and the item is due again
                            (after `attempts_max` attempts at one step: failed)

Pure values and decisions. `leasing` executes them, `postgres` stores them. A lease decides who does the work and nothing else:
no caller, key or owner follows from what the database says about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from kms.domain.errors import KmsError, Reason


@dataclass(frozen=True, slots=True)
class LeasePolicy:
    """How long a lease lasts, how long a failed item waits, and after how many attempts at one step it has failed."""

    lease_seconds: float = 60.0
    backoff_seconds_min: float = 5.0
    backoff_seconds_max: float = 3600.0
    attempts_max: int = 10

    @property
    def extension_seconds(self) -> float:
        """Return how often a living worker extends its lease. Two extensions may fail before the lease runs out."""
        return self.lease_seconds / 3

    def backoff_seconds(self, attempts: int) -> float:
        """Return how long an item waits after its *attempts*-th failure in a row: twice as long after each."""
        doublings = min(max(attempts - 1, 0), 64)  # far beyond any maximum, and small enough for a float
        return min(self.backoff_seconds_min * 2.0**doublings, self.backoff_seconds_max)


@dataclass(frozen=True, slots=True)
class Claim:
    """An item that a worker has claimed. `number` tells this claim from every other claim of the item.

    `attempts` counts the claims since the last finished step, this one included. `step` is the last finished step, empty before
    the first; `step_state` is what that step left for the next. `item` has the columns of the item itself.
    """

    item_id: UUID
    number: int
    attempts: int
    step: str
    step_state: Mapping[str, object]
    item: Mapping[str, object]


class LeaseLostError(KmsError):
    """Another worker has the item now, or the item has ended. What this worker still does must not be recorded."""

    def __init__(self) -> None:
        super().__init__(Reason.STALE, "another worker has taken the work over")

    def __reduce__(self) -> tuple[object, ...]:
        return LeaseLostError, ()


class LeasedItems(Protocol):
    """Items of work that workers share. Every method but `claim` raises LeaseLostError where the claim is void.

    Each raises STORE_UNAVAILABLE, and then what it does may have happened.
    """

    async def claim(self, worker: UUID, items_max: int, policy: LeasePolicy, *, item_id: UUID | None = None) -> Sequence[Claim]:
        """Claim at most *items_max* items that are due, or the item *item_id* alone if it is due.

        Items that other workers hold are skipped, never waited for.
        """
        ...

    async def extend(self, worker: UUID, claim: Claim, policy: LeasePolicy) -> None:
        """Let the lease last for another `lease_seconds` from now."""
        ...

    async def finish_step(self, worker: UUID, claim: Claim, step: str, state: Mapping[str, object], policy: LeasePolicy) -> None:
        """Record that *step* has been finished, with what the next one needs to know. Extends the lease too."""
        ...

    async def complete(self, worker: UUID, claim: Claim, result: Mapping[str, object]) -> None:
        """Record that the item has been completed with *result*."""
        ...

    async def fail(self, worker: UUID, claim: Claim, message: str, retry_seconds: float, attempts_max: int) -> None:
        """Record a failed attempt: the item is due again after *retry_seconds*, or has failed after *attempts_max* attempts."""
        ...

    async def release(self, worker: UUID, claim: Claim) -> None:
        """Give the item back: it is due at once, and this attempt does not count."""
        ...
