"""How often each key was used at the least, as this process knows.

A count that the database has lower was put back, or was never kept.

A use counts only if it began after a count of its key was read, so that it cannot be in that count already.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kms.domain.ids import KeyId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord

_KEYS_MAX: Final = 10_000


@dataclass(slots=True)
class _Count:
    """The least that a count can be, and when that changed: it grows with each use."""

    least: int
    changed_at: int


class Counts:
    """Counts of keys, the last used of them. It belongs to the event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[KeyId, _Count] = OrderedDict()
        self._now = 0

    def mark(self) -> int:
        """Return the moment at which a read begins."""
        return self._now

    def check(self, key: KeyRecord, mark: int) -> None:
        """Take the count of *key* by a read that began at *mark*. Raises RECORD_INVALID for one that is too low."""
        key_id = key.identity.key_id
        known = self._known.get(key_id)
        if known is None:
            self._now += 1
            self._known[key_id] = _Count(key.usage_counter, self._now)
            if len(self._known) > _KEYS_MAX:
                self._known.popitem(last=False)
        elif known.changed_at <= mark and key.usage_counter < known.least:
            raise record_invalid(key_id)

    def is_counted(self, key_id: KeyId) -> bool:
        """Whether a use that begins now is to be counted by `charged` once it was charged."""
        return key_id in self._known

    def charged(self, key_id: KeyId) -> None:
        """Count a use."""
        known = self._known.get(key_id)
        if known is not None:
            self._now += 1
            known.least += 1
            known.changed_at = self._now
            self._known.move_to_end(key_id)
