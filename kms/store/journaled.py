"""`Lifecycle` with a journal: what a restore must not undo is on disk outside the database before it is answered."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from kms.app.ports import Call, Change, DestroyedKey, Lifecycle
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Move
from kms.store.journal import Event, Journal

_EVENTS: Final = {Move.REVOKE: Event.KEY_REVOKED, Move.COMPROMISE: Event.KEY_COMPROMISED}


@dataclass(frozen=True, slots=True)
class JournaledLifecycle:
    """Makes the moves of *lifecycle*, and writes those that are for good into *journal*.

    The line comes after the move and before the answer. Where it cannot be written the move stands, and the caller is told so;
    `JournalFollower` writes it later.
    """

    lifecycle: Lifecycle
    journal: Journal

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move; raises what `Lifecycle.move` does, and OUTCOME_UNKNOWN where the journal cannot be written."""
        moved = await self.lifecycle.move(call, key_id, move, change, version=version)
        event = _EVENTS.get(move)
        at = {Move.REVOKE: moved.revoked_at, Move.COMPROMISE: moved.compromised_at}.get(move)
        if event is not None and at is not None:
            await self._write(event, key_id, at, change.reason or "")
        return moved

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy what is due, as `Lifecycle.destroy_due` does; raises OUTCOME_UNKNOWN as `move` does."""
        destroyed = await self.lifecycle.destroy_due()
        for key in destroyed:
            await self._write(Event.KEY_DESTROYED, key.key_id, key.destroyed_at, "scheduled")
        return destroyed

    async def _write(self, event: Event, key_id: KeyId, at: datetime, reason: str) -> None:
        # Shielded: a caller who gives up must not keep the line from the disk.
        writing = asyncio.to_thread(self.journal.append, event, key_id, occurred_at=at, reason=reason)
        try:
            await asyncio.shield(asyncio.ensure_future(writing))
        except (OSError, KmsError) as error:
            told = error.strerror if isinstance(error, OSError) else str(error)
            raise KmsError(
                Reason.OUTCOME_UNKNOWN, f"the change is made, but the journal of the service cannot be written ({told})"
            ) from None
