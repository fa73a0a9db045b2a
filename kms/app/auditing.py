"""Reading the trail."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from kms.app.ports import Call, Trail
from kms.domain.errors import malformed
from kms.domain.trail import Cursor, EventFilter, Found, Place, Stretch

EVENTS_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Auditing:
    """The trail, for whoever holds the permission to read it."""

    trail: Trail

    async def search(self, call: Call, which: EventFilter, *, before: Place | None, limit: int) -> Found:
        """Return at most *limit* events that fit, behind *before*, the newest first; see `Trail` for what is raised.

        MALFORMED for a range of time that ends before it begins, and for a limit outside 1 to 1000.
        """
        if which.since is not None and which.until is not None and which.until <= which.since:
            raise malformed("until", "expected a moment behind since")
        if not 0 < limit <= EVENTS_MAX:
            raise malformed("page_size", f"expected at most {EVENTS_MAX}")
        return await self.trail.search(call, which, before=before, limit=limit)

    async def tail(self, call: Call, after: Cursor | None) -> AsyncIterator[Stretch]:
        """Yield the events behind *after*, or from now on, as they become final; first where it begins, without events."""
        begin = await self.trail.begin(call, after)
        yield Stretch((), begin)
        async for stretch in self.trail.follow(call, begin):
            yield stretch
