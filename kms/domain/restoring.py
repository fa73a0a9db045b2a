"""What the beginning of an epoch makes of a key's row: the mirror of the statements in `kms/store/epoch.py`.

The statements change rows of a database that came from elsewhere. A row gets a new MAC only if it was ours before and became what
this function says, so that a trigger in a restored database widens no key.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from kms.domain.key_row import Row, state_of
from kms.domain.lifecycle import State

POSTPONED: Final = timedelta(days=7)
_MAY_PROTECT_AGAIN: Final = frozenset({State.PRE_ACTIVE, State.ACTIVE, State.INACTIVE})


@dataclass(frozen=True, slots=True)
class Restoring:
    """What is known of the keys of a restored database: the journal's moments by key, and whose counts are in doubt."""

    begun_at: datetime
    every_key: bool
    revoked: Mapping[UUID, datetime] = field(default_factory=dict)
    compromised: Mapping[UUID, datetime] = field(default_factory=dict)
    destroyed: Mapping[UUID, datetime] = field(default_factory=dict)
    changed: Set[UUID] = frozenset()

    def applied(self, row: Row) -> Row:
        """Return *row* as the beginning of the epoch leaves it, but for its version."""
        after = {**row, **self._ended(row)}
        due_at = after["destruction_scheduled_at"]
        if after["destroyed_at"] is None and due_at is not None and due_at <= self.begun_at:
            after["destruction_scheduled_at"] = self.begun_at + POSTPONED
        if self._is_in_doubt(after) and after["deactivated_at"] is None:
            after |= {"deactivated_at": self.begun_at, "key_status": "inactive"}
        return after

    def _ended(self, row: Row) -> dict[str, object]:
        key_id, changes = row["id"], dict[str, object]()
        if row["key_status"] != "revoked" and key_id in self.revoked:
            changes |= {"key_status": "revoked", "revoked_at": self.revoked[key_id]}
        elif row["key_status"] not in ("revoked", "compromised") and key_id in self.compromised:
            changes |= {"key_status": "compromised", "compromised_at": self.compromised[key_id]}
        if row["destroyed_at"] is None and key_id in self.destroyed:
            changes["destroyed_at"] = self.destroyed[key_id]
        return changes

    def _is_in_doubt(self, row: Row) -> bool:
        if row["destroyed_at"] is not None or row["superseded_at"] is not None:
            return False
        state = state_of({**row, "destruction_scheduled_at": None}, self.begun_at)
        is_counted = row["key_type"] == "aes" or row["max_usage_count"] is not None
        return state in _MAY_PROTECT_AGAIN and (self.every_key or is_counted or row["id"] in self.changed)


def confirmed(row: Row, *, by_restore: bool) -> Row:
    """Return *row* as the confirmation of its count leaves it: the mirror of `cryptography.confirm_restored_key`.

    A key that was deactivated *by_restore*, and by nobody else, is what it was before.
    """
    after = {**row, "version": row["version"] + 1}
    if by_restore and row["key_status"] == "inactive":
        is_ahead = row["activated_at"] is not None and row["activated_at"] > row["deactivated_at"]
        after |= {"deactivated_at": None, "key_status": "inactive" if is_ahead else "active"}
    return after
