"""Moving envelopes from old generations of the token's keys to the one that makes new envelopes.

    plan ──► a worker claims a slice ──► read a batch ──► the token opens each envelope and makes the next
                                     ──► store what was made, envelope by envelope, unless it has changed meanwhile
                                     ──► … ──► the slice is empty

No row decides what is moved: the seal of an envelope proves whose it is, and the new one is bound to the same. What does not open
stays where it is. Every step may be done twice.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

import structlog

from kms.domain.errors import KmsError, Reason
from kms.domain.keys import HeldKey
from kms.hsm.token_hsm import WrappingKeys
from kms.hsm.wrapping_keys import Kind
from kms.jobs.leasing import Lease

_BATCH: Final = 100
# So many wait for the token at once: enough to keep its lanes busy, few beside the calls of clients.
_IN_FLIGHT: Final = 4
_AGAIN_SECONDS: Final = 1.0
_AGAIN_AFTER_FAULTS_SECONDS: Final = 60.0
_OF_THE_ENVELOPE: Final = frozenset({Reason.ENVELOPE_INVALID, Reason.HSM_KEK_MISSING})
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class Moved:
    """A key, and the envelope that takes the place of the one it has."""

    key: HeldKey
    envelope: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Keys whose envelopes are to be moved, and the ids of rows that hold no key of ours. The next batch follows `last`."""

    keys: Sequence[HeldKey]
    unreadable: Sequence[UUID]
    last: UUID | None


class Envelopes(Protocol):
    """The envelopes of all keys, and the plan of moving them."""

    async def plan(self, newest: int) -> None:
        """Plan that envelopes leave the generations before *newest*."""
        ...

    async def batch(self, sealing_key: UUID, part: int, after: UUID | None, size: int) -> Batch:
        """Return at most *size* keys of slice *part* behind *after* whose envelope names *sealing_key*."""
        ...

    async def store(self, lease: Lease, moved: Sequence[Moved]) -> int:
        """Store envelopes in the place of those that the keys have; return how many. Raises LeaseLostError."""
        ...


class Token(Protocol):
    """The token."""

    def wrapping_keys(self) -> WrappingKeys:
        """Return the KEKs and sealing keys that the token holds."""
        ...

    async def rewrap(self, key: HeldKey) -> str:
        """Return the key's envelope under the generation that makes new ones. Raises ENVELOPE_INVALID, HSM_KEK_MISSING."""
        ...


@dataclass(frozen=True, slots=True)
class Rewrapping:
    """The work of one slice."""

    token: Token
    envelopes: Envelopes
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_IN_FLIGHT), repr=False)

    async def plan(self) -> bool:
        """Plan what is to be moved; return whether there are old generations. Raises STORE_UNAVAILABLE."""
        has_old = bool(self.leavable())
        if has_old:
            await self.envelopes.plan(self.token.wrapping_keys().current)
        return has_old

    def leavable(self) -> frozenset[UUID]:
        """Return the sealing keys that envelopes can leave here: this worker holds them, and makes under a later generation."""
        held = self.token.wrapping_keys()
        return frozenset(key.key_id for key in held.keys if key.kind is Kind.SEALING and key.generation < held.current)

    async def rewrap(self, lease: Lease) -> Mapping[str, object]:
        """Move the envelopes of a slice; return how many did not open, and when to look at the slice again.

        Raises HSM_UNAVAILABLE, STORE_UNAVAILABLE, LeaseLostError.
        """
        sealing_key, part = lease.claim.item["sealing_key_id"], lease.claim.item["slice"]
        state = lease.claim.step_state
        not_opened, after = int(str(state.get("not_opened", 0))), UUID(str(state["after"])) if "after" in state else None
        while isinstance(sealing_key, UUID) and isinstance(part, int) and sealing_key in self.leavable():
            batch = await self.envelopes.batch(sealing_key, part, after, _BATCH)
            if batch.last is None:
                return {"not_opened": not_opened, "retry_seconds": _AGAIN_AFTER_FAULTS_SECONDS if not_opened else _AGAIN_SECONDS}
            moved = [one for one in await self._moved(batch.keys) if one is not None]
            stored = await self.envelopes.store(lease, moved)
            not_opened, after = not_opened + len(batch.keys) - len(moved) + len(batch.unreadable), batch.last
            for key_id in batch.unreadable:
                _LOG.warning("envelope not moved", key=str(key_id), reason=Reason.RECORD_INVALID)
            _LOG.debug("envelopes moved", slice=part, moved=stored)
            await lease.finish_step("moved", {"after": str(after), "not_opened": not_opened})
        # The old generation was removed from the token meanwhile.
        return {"not_opened": not_opened, "retry_seconds": _AGAIN_AFTER_FAULTS_SECONDS}

    async def _moved(self, keys: Sequence[HeldKey]) -> list[Moved | None]:
        return await asyncio.gather(*(self._move(key) for key in keys))

    async def _move(self, key: HeldKey) -> Moved | None:
        async with self._places:
            try:
                return Moved(key, await self.token.rewrap(key))
            except KmsError as error:
                if error.reason not in _OF_THE_ENVELOPE:
                    raise
                _LOG.warning("envelope not moved", key=str(key.identity.key_id), reason=error.reason)
                return None
