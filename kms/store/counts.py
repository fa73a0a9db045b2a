"""How often each key was used at the least, as this process knows.

A count that the database has lower was put back, or was never kept.

A use counts only if it began after a count of its key was read, so that it cannot be in that count already. A read need not show
the uses that were charged while it was under way. It must show all that were charged before.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kms.domain.ids import KeyId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord

_KEYS_MAX: Final = 10_000

Meanwhile = Counter[KeyId]
"""How often each key was charged while a read was under way."""


class Counts:
    """Counts of keys, the last used of them. It belongs to the event loop."""

    def __init__(self) -> None:
        self._least: OrderedDict[KeyId, int] = OrderedDict()
        self._reads: dict[int, Meanwhile] = {}  # by their identity: two that are equal are two

    @contextmanager
    def reading(self) -> Iterator[Meanwhile]:
        """Note what is charged while a key is read within the block."""
        meanwhile = Meanwhile()
        self._reads[id(meanwhile)] = meanwhile
        try:
            yield meanwhile
        finally:
            del self._reads[id(meanwhile)]

    def check(self, key: KeyRecord, meanwhile: Meanwhile) -> None:
        """Take the count of *key* by a read. Raises RECORD_INVALID for a count without all uses but those of *meanwhile*."""
        key_id = key.identity.key_id
        least = self._least.setdefault(key_id, key.usage_counter)
        if key.usage_counter < least - meanwhile[key_id]:
            raise record_invalid(key_id)
        if len(self._least) > _KEYS_MAX:
            self._least.popitem(last=False)

    def is_counted(self, key_id: KeyId) -> bool:
        """Whether a use that begins now is to be counted by `charged` once it was charged."""
        return key_id in self._least

    def charged(self, key_id: KeyId) -> None:
        """Count a use."""
        if key_id in self._least:
            self._least[key_id] += 1
            self._least.move_to_end(key_id)
            for meanwhile in self._reads.values():
                meanwhile[key_id] += 1
