"""Keys that the service is about to act on by itself: their rows, as it left them, and no older than what the journal knows."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from psycopg.rows import DictRow

from kms.app.records import Records
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyRef, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.keys import FIND_BY_ID, FIND_BY_NAME, key_record
from kms.store.pool import Pool, as_user

# Changes of one key that come between a read and the look at the journal, one after another.
_READS_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class ProvenKey:
    """A key with its row, as both were at the moment `read_at` of the database's clock."""

    row: DictRow
    record: KeyRecord
    read_at: datetime


@dataclass(frozen=True, slots=True)
class ProvenKeys:
    """Finds keys and proves them, by their MACs and by what the journal knows."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None

    async def find(self, owner: UserId, ref: KeyRef) -> ProvenKey | None:
        """Return a key of *owner*, or None where they have none by that id or name. Raises RECORD_INVALID, HSM_UNAVAILABLE."""
        for reads_left in reversed(range(_READS_MAX)):
            key = await self._read(owner, ref)
            if key is None or self.knowledge is None:
                return key
            try:
                self.knowledge.check(key.record)
            except KmsError as error:
                # The journal may know of a change that came after the read: a read that begins now shows it.
                if error.reason is not Reason.RECORD_INVALID or not reads_left:
                    raise
            else:
                return key
        raise AssertionError("the last read returns or raises")

    async def _read(self, owner: UserId, ref: KeyRef) -> ProvenKey | None:
        is_id = isinstance(ref, UUID)
        rows = await self.pool.fetch(as_user(owner), FIND_BY_ID if is_id else FIND_BY_NAME, {"caller": owner, "ref": ref})
        if not rows:
            return None
        row = rows[0]
        if row["user_id"] != owner or (row["id"] if is_id else row["key_name"]) != ref:
            raise record_invalid(ref if isinstance(ref, UUID) else None)
        await self.records.prove_key(row)
        return ProvenKey(row, key_record(row, self.records.judged_at(row["now"])), row["now"])
