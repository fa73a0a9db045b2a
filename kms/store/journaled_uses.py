"""Uses of keys with a limit, told to the journal: so the next worker, which remembers nothing, keeps the limit too."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from kms.keys.ledger.counts import Counts
from kms.store.errors import unavailable
from kms.store.journal import Journal, used_line


@dataclass(frozen=True, slots=True)
class JournaledUses:
    """Tells the journal what `counts` gives to be remembered."""

    journal: Journal
    counts: Counts
    clock: Callable[[], datetime]

    async def write(self) -> None:
        """Write down the uses since the last time. Raises STORE_UNAVAILABLE where the journal cannot be written.

        Uses that could not be written are not tried again. A line that is there after all would count them twice, and that would
        refuse a key which nobody has touched.
        """
        now = self.clock()
        lines = [used_line(key_id, uses, occurred_at=now) for key_id, uses in self.counts.take_due()]
        if not lines:
            return
        try:
            await asyncio.to_thread(self.journal.extend, lambda _: lines, at=now)
        except OSError as error:
            raise unavailable(f"the journal {self.journal.path} cannot be written: {error.strerror}") from None
