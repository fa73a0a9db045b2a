"""Reading the trail."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from kms.app.ports import Call
from kms.app.trail_ports import Trail
from kms.app.verifying import VerifyTrail
from kms.domain.errors import malformed
from kms.domain.fields import parse_number
from kms.domain.trail import Cursor, EventFilter, Found, Place, Stretch
from kms.domain.trail_check import TrailReport

EVENTS_MAX: Final = 1000
KEYS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Auditing:
    """The trail, for whoever holds the permission to read it."""

    trail: Trail
    verifier: Callable[[], Awaitable[VerifyTrail]]

    async def search(self, call: Call, which: EventFilter, *, before: Place | None, limit: int) -> Found:
        """Return at most *limit* events that fit, behind *before*, the newest first; see `Trail` for what is raised.

        MALFORMED for a range of time that ends before it begins, and for a limit outside 1 to 1000.
        """
        if which.since is not None and which.until is not None and which.until <= which.since:
            raise malformed("until", "expected a moment behind since")
        parse_number(limit, field="page_size", least=1, most=EVENTS_MAX)
        return await self.trail.search(call, which, before=before, limit=limit)

    async def tail(self, call: Call, after: Cursor | None) -> AsyncIterator[Stretch]:
        """Yield the events behind *after*, or from now on, as they become final; first where it begins, without events."""
        begin = await self.trail.begin(call, after)
        yield Stretch((), begin)
        async for stretch in self.trail.follow(call, begin):
            yield stretch

    async def verify(self, call: Call, from_size: int, to_size: int | None, keys_after: UUID | None = None) -> TrailReport:
        """Compare the rows with the checkpoints, as `VerifyTrail.verify` says, once it is recorded who asked.

        Without *to_size* keys are compared, too: about 500 with ids above *keys_after*.

        Raises KEY_NOT_FOUND where no checkpoint was ever made, and MALFORMED for a range that ends before it begins.
        """
        parse_number(from_size, field="from_size")
        if to_size is not None and parse_number(to_size, field="to_size") <= from_size:
            raise malformed("to_size", "expected 0, or a size above from_size")
        if to_size is not None and keys_after is not None:
            raise malformed("keys_after", "expected none with to_size")
        await self.trail.record(call, "verify", {"from_size": from_size, **({} if to_size is None else {"to_size": to_size})})
        verifier = await self.verifier()
        report = await verifier.verify(from_size, to_size)
        if to_size is not None:
            return report
        return replace(report, keys=await verifier.compare_keys(keys_after, keys_max=KEYS_MAX))
