"""`Lifecycle` with a journal: what a restore must not undo is on disk outside the database before it is answered."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Final
from uuid import UUID

from kms.app.ports import Call, DestroyedKey, Lifecycle
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move
from kms.store.journal import Entry, Event, Journal, Line, changed_line, read_journal, version_in

_DELAY_MIN: Final = timedelta(days=7)
# A cancelled destruction is among them: an old row that has it still must be known as old.
_NARROWING: Final = frozenset({Move.DEACTIVATE, Move.SCHEDULE_DESTRUCTION, Move.CANCEL_DESTRUCTION})


@dataclass(frozen=True, slots=True)
class JournaledLifecycle:
    """Makes the moves of *lifecycle*, and writes those into *journal* after which a key may do less.

    The line comes after the move and before the answer. Where it cannot be written the move stands, and the caller is told so;
    `JournalFollower` writes it later.
    """

    lifecycle: Lifecycle
    journal: Journal
    clock: Callable[[], datetime]

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move; raises what `Lifecycle.move` does, and OUTCOME_UNKNOWN where the journal cannot be written."""
        moved = await self.lifecycle.move(call, key_id, move, change, version=version)
        if (line := _line_of(moved, move, change, self.clock())) is not None:
            await write_line(self.journal, line)
        return moved

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy what is due, as `Lifecycle.destroy_due` does; raises OUTCOME_UNKNOWN as `move` does."""
        destroyed = await self.lifecycle.destroy_due()
        for key in destroyed:
            await write_line(self.journal, Line(Event.KEY_DESTROYED, key.key_id, key.destroyed_at, "scheduled"))
        return destroyed

    async def removable_objects(self, hsm_key_ids: Collection[str]) -> Collection[str]:
        """Return which objects may be removed: those of keys whose destruction this journal was told of long enough ago.

        The line, of the day on which it was scheduled, is by this host's clock. See `Lifecycle.removable_objects`.
        """
        found = await self.lifecycle.removable_objects(hsm_key_ids)
        if not found:
            return ()
        lines = await asyncio.to_thread(read_journal, self.journal.path)
        scheduled = set[UUID]()
        for line in lines:
            if _is_old_schedule(line, self.clock()):
                scheduled.add(line.subject)
            elif line.event is Event.KEY_CHANGED:
                scheduled.discard(line.subject)  # it was cancelled, or scheduled again not long ago
        # The object of a RESIDENT key is named by the key's id.
        return [hsm_key_id for hsm_key_id in found if UUID(hsm_key_id) in scheduled]


def _is_old_schedule(line: Entry, now: datetime) -> bool:
    """Whether *line* is one that a move of ours wrote, as `_line_of` does, and the shortest delay has passed since."""
    _, _, what = line.reason.partition(", ")
    is_ours = line.event is Event.KEY_CHANGED and what.startswith(f"{Move.SCHEDULE_DESTRUCTION.value} ")
    return is_ours and line.occurred_at + _DELAY_MIN <= now


def _line_of(moved: KeyRecord, move: Move, change: Change, now: datetime) -> Line | None:
    """Return the line of a move of *moved*, which is as the move left it; None for one that a restore may undo."""
    key_id, reason = moved.identity.key_id, change.reason or ""
    if move is Move.REVOKE and moved.revoked_at is not None:
        return Line(Event.KEY_REVOKED, key_id, moved.revoked_at, reason)
    if move is Move.COMPROMISE and moved.compromised_at is not None:
        return Line(Event.KEY_COMPROMISED, key_id, moved.compromised_at, reason)
    is_narrowed = change.max_usage_count is not None or change.expires_at is not None
    if move in _NARROWING or (move is Move.UPDATE and is_narrowed):
        what = f"{move.value} {_told(moved)}: {reason}"
        return changed_line(key_id, moved.version, occurred_at=now, what=what)
    return None


def _told(key: KeyRecord) -> str:
    """Return what is not the same in every key that was narrowed: whoever confirms the key may have to do it again."""
    found = {
        "max_usage_count": key.max_usage_count,
        "expires_at": key.expires_at and key.expires_at.isoformat(),
        "destruction_scheduled_at": key.destruction_scheduled_at and key.destruction_scheduled_at.isoformat(),
    }
    return " ".join(f"{name}={value}" for name, value in found.items() if value is not None)


async def write_line(journal: Journal, line: Line) -> None:
    """Write a line before the change that it tells of is answered. Raises OUTCOME_UNKNOWN if it cannot be written."""
    await _written(asyncio.to_thread(journal.write, line))


async def write_first_line(journal: Journal, line: Line, *, since: int) -> None:
    """Write a line as `write_line` does, unless the journal has one of its event, subject and version, or of a later version.

    Only lines after the number *since* are looked at. Of several that write at once, one does.
    """

    def decide(entries: Iterator[Entry]) -> Sequence[Line]:
        later = takewhile(lambda entry: entry.head.sequence > since, entries)
        same = (entry for entry in later if (entry.event, entry.subject) == (line.event, line.subject))
        return () if any(version_in(entry) >= version_in(line) for entry in same) else [line]

    await _written(asyncio.to_thread(journal.extend, decide, at=line.occurred_at))


async def _written(writing: Coroutine[None, None, object]) -> None:
    # Shielded: a caller who gives up must not keep the line from the disk.
    try:
        await asyncio.shield(asyncio.ensure_future(writing))
    except (OSError, KmsError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        raise KmsError(
            Reason.OUTCOME_UNKNOWN, f"the change is made, but the journal of the service cannot be written ({told})"
        ) from None
