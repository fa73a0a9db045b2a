"""What the journal knows of keys, asked at every use of one: a row that the database's owner puts back is older than its line.

The file is read once and then followed. Each question looks at its size, and reads new lines where it has grown, be they of this
worker or of another on the machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from kms.app.ports import Call, KeyPage, Keys, NewKey, Repeat
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyRef, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyFilter, KeyRecord, UsableKey
from kms.domain.lifecycle import State
from kms.store.errors import unavailable
from kms.store.journal import Entry, Event, parse_line

_ENDS = (Event.KEY_COMPROMISED, Event.KEY_REVOKED, Event.KEY_DESTROYED)


@dataclass(slots=True, eq=False)
class JournalKnowledge:
    """The journal in *path*, as far as it was read: it follows the file, so it changes."""

    path: Path
    _offset: int = 0
    _ended: dict[UUID, set[Event]] = field(default_factory=dict, repr=False)
    _versions: dict[UUID, int] = field(default_factory=dict, repr=False)

    def check(self, key: KeyRecord) -> None:
        """Raise RECORD_INVALID for a key that the journal knows to be revoked, compromised, destroyed or changed since.

        Raises STORE_UNAVAILABLE where the journal cannot be read.
        """
        self.follow()
        key_id = key.identity.key_id
        shows = all(_shows(key, event) for event in self._ended.get(key_id, ()))
        if not shows or key.version < self._versions.get(key_id, 0):
            raise record_invalid(key_id)

    def follow(self) -> None:
        """Learn what was written since the last look. Raises STORE_UNAVAILABLE."""
        try:
            size = os.stat(self.path).st_size
            if size == self._offset:
                return
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(size - self._offset)
        except (OSError, ValueError):
            raise unavailable(f"the journal {self.path} cannot be read, or was cut off") from None
        # A line that is being written is read the next time.
        finished = content[: content.rfind(b"\n") + 1]
        for line in finished.splitlines():
            self._learn(parse_line(line, str(self.path)))
        self._offset += len(finished)

    def _learn(self, line: Entry) -> None:
        if line.event is Event.EPOCH_SEEN:
            # Versions of another epoch are those of other changes; what was ended stays so.
            self._versions.clear()
        elif line.event in _ENDS:
            self._ended.setdefault(line.subject, set()).add(line.event)
        elif line.event is Event.KEY_CHANGED:
            self._versions[line.subject] = max(self._versions.get(line.subject, 0), _version(line))


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """`Keys` that refuses a key of which the journal knows better."""

    keys: Keys
    knowledge: JournalKnowledge

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        """Store a key: see `Keys.insert`."""
        return await self.keys.insert(caller, key, call=call, repeat=repeat)

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key, or None: see `Keys.find`. Raises RECORD_INVALID."""
        record = await self.keys.find(caller, ref, recent=recent)
        if record is not None:
            self.knowledge.check(record)
        return record

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope, or None: see `Keys.find_usable`. Raises RECORD_INVALID."""
        key = await self.keys.find_usable(caller, ref, recent=recent)
        if key is not None:
            self.knowledge.check(key.record)
        return key

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return keys in the order of their names: see `Keys.page`."""
        page = await self.keys.page(caller, which, after=after, limit=limit)
        invalid = [key.identity.key_id for key in page.keys if self._is_invalid(key)]
        return _without(page, invalid) if invalid else page

    def _is_invalid(self, key: KeyRecord) -> bool:
        try:
            self.knowledge.check(key)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return True
        return False


def _without(page: KeyPage, invalid: Sequence[KeyId]) -> KeyPage:
    kept = [key for key in page.keys if key.identity.key_id not in invalid]
    return KeyPage(kept, page.goes_on_after, [*page.invalid, *invalid])


def _shows(key: KeyRecord, event: Event) -> bool:
    """Whether the key's record says what *event* says, in whatever state it is since."""
    match event:
        case Event.KEY_COMPROMISED:
            return key.compromised_at is not None or key.revoked_at is not None
        case Event.KEY_REVOKED:
            return key.revoked_at is not None
        case _:
            return key.state is State.DESTROYED


def _version(line: Entry) -> int:
    """Return the version in a line that `changed_line` made, 0 for another."""
    number = line.reason.removeprefix("version ").partition(",")[0]
    return int(number) if number.isdecimal() else 0
