"""Moving keys between states, and changing what may be changed."""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.app.keyring import require_key
from kms.app.ports import Call, Hsm, Keys, Lifecycle
from kms.domain.errors import about_key
from kms.domain.fields import check_metadata, parse_number, parse_text
from kms.domain.ids import KeyId, KeyRef
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move, check_move

REASON_CHARACTERS_MAX: Final = 200
PENDING_DAYS: Final = range(7, 91)


@dataclass(frozen=True, slots=True)
class Moving:
    """The moves of `domain/lifecycle.py`, for the owner of a key."""

    keys: Keys
    lifecycle: Lifecycle

    async def move(self, call: Call, ref: KeyRef, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move and return the key as it is then; see `Lifecycle.move` for what is raised."""
        _check(move, change)
        key = await require_key(self.keys, call.user.user_id, ref)
        with about_key(key.identity.key_id):
            check_move(key.state, move)
            return await self.lifecycle.move(call, key.identity.key_id, move, change, version=version)


@dataclass(frozen=True, slots=True)
class Destruction:
    """The end of keys whose destruction has fallen due."""

    lifecycle: Lifecycle
    hsm: Hsm

    async def destroy_due(self) -> list[KeyId]:
        """Destroy what is due and return the ids; the objects of RESIDENT keys are for `remove_objects`."""
        return [key.key_id for key in await self.lifecycle.destroy_due()]

    async def remove_objects(self) -> None:
        """Remove the token objects of all destroyed keys: of those of now, and those that could not be removed at their time."""
        held = (await self.hsm.holdings()).objects
        # Whatever the rows say: what the service itself needs is not among the destroyed.
        objects = [key_id.hex for key_id, bound_to in held.items() if not bound_to]
        for hsm_key_id in await self.lifecycle.removable_objects(objects):
            await self.hsm.discard(KeyId(UUID(hsm_key_id)), "")


def _check(move: Move, change: Change) -> None:
    if change.reason is not None or move in (Move.REVOKE, Move.COMPROMISE):
        parse_text(change.reason or "", field="reason", characters_max=REASON_CHARACTERS_MAX)
    if move is Move.SCHEDULE_DESTRUCTION:
        parse_number(change.pending_days or 0, field="pending_days", least=PENDING_DAYS[0], most=PENDING_DAYS[-1])
    if change.metadata is not None:
        check_metadata(change.metadata)
    if change.max_usage_count is not None:
        parse_number(change.max_usage_count, field="max_usage_count", least=1)
