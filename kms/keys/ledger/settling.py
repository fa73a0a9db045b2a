"""Using a key: compute first, then charge, and return nothing before the charge is durable.

    caller and key, perhaps a second old ──▶ compute ──▶ settle ──▶ return
                     ▲                          │           │
                     └─── read both again ◀── refused ◀─────┘

The reads before the computation only save work. The ledger looks at the key's state and version and at the caller's standing
again, in the statement that locks the key. If the ledger refuses the use, the computed result is dropped.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, Generic, Protocol, TypeVar

from kms.app.access import Access
from kms.app.ports import Call, Entry, Ledger
from kms.domain.errors import KmsError, Reason, about_key
from kms.domain.permissions import check_permitted

_ATTEMPTS: Final = 4
# Refusals that a key or a caller may cause who changed since they were read. The next attempt reads them again.
RETRYABLE_REFUSALS: Final = frozenset(
    {
        Reason.STALE,
        Reason.CREDENTIALS_INVALID,
        Reason.KEY_NOT_FOUND,
        Reason.KEY_PRE_ACTIVE,
        Reason.KEY_INACTIVE,
        Reason.KEY_EXPIRED,
        Reason.KEY_COMPROMISED,
        Reason.KEY_REVOKED,
        Reason.KEY_PENDING_DESTRUCTION,
        Reason.KEY_DESTROYED,
        Reason.USAGE_LIMIT_REACHED,
    }
)
# Refusals that stale cached data may cause. Retry with a fresh read before reporting them.
POSSIBLY_STALE_REFUSALS: Final = frozenset({Reason.ENVELOPE_INVALID, Reason.HSM_KEK_MISSING, Reason.PERMISSION_DENIED})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PendingResult(Generic[T]):
    """A computed result that must not be returned until the ledger has settled `entry`. None: nothing is recorded."""

    result: T
    entry: Entry | None

    def __repr__(self) -> str:
        return "<PendingResult>"


Compute = Callable[[Call, bool], Awaitable[PendingResult[T]]]
"""Computes a result for the caller of a call. True: read keys from the database, not from the cache."""


class Slot(Protocol):
    """The place of one use among those of a request.

    A few results are computed at a time. They are settled in the order of the request.
    """

    async def compute(self, compute: Callable[[], Awaitable[PendingResult[T]]]) -> PendingResult[T]:
        """Return what *compute* returns, once there is room for the work."""
        ...

    async def settle(self) -> None:
        """Return when every use before this one has gone to the ledger."""
        ...


class _Single:
    async def compute(self, compute: Callable[[], Awaitable[PendingResult[T]]]) -> PendingResult[T]:
        return await compute()

    async def settle(self) -> None:
        pass


SINGLE: Final[Slot] = _Single()
"""The slot of a request that is one use."""


@dataclass(frozen=True, slots=True)
class Settling:
    """Charges and records uses."""

    ledger: Ledger
    access: Access

    async def settle_use(self, call: Call, compute: Compute[T], slot: Slot) -> T:
        """Return a computed result that the ledger has settled. Compute it again if the key or the caller changed meanwhile.

        Raises what *compute* raises for the key and the caller of now, or what the ledger answers. Raises STALE if the key
        changes during every attempt.
        """
        for attempts_left in reversed(range(_ATTEMPTS)):
            call, pending = await self._computed(call, compute, slot)
            if pending.entry is None:
                return pending.result
            await slot.settle()
            try:
                with about_key(pending.entry.key_id):
                    await self.ledger.settle(pending.entry)
            except KmsError as refusal:
                if refusal.reason not in RETRYABLE_REFUSALS or not attempts_left:
                    raise
                if refusal.reason is Reason.CREDENTIALS_INVALID:
                    call = await self.readmitted(call)
            else:
                return pending.result
        raise AssertionError("the last attempt returns or raises")

    async def readmitted(self, call: Call) -> Call:
        """Return *call* with its user as the database has them now. Raises CREDENTIALS_INVALID, PERMISSION_DENIED."""
        user = await self.access.admit(call.user.user_id)
        check_permitted(user.permissions, call.rpc)
        return replace(call, user=user)

    async def _computed(self, call: Call, compute: Compute[T], slot: Slot) -> tuple[Call, PendingResult[T]]:
        try:
            return call, await slot.compute(lambda: compute(call, False))
        except KmsError as refusal:
            if refusal.reason not in POSSIBLY_STALE_REFUSALS:
                raise
        again = await self.readmitted(call)
        return again, await slot.compute(lambda: compute(again, True))
