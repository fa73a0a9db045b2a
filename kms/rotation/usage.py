"""How often the predecessors of a key are still used, by whom and by which operation: when can a predecessor go?

The trail tells. It has each use that is charged or recorded, and so neither Verify nor GetPublicKey, which every state permits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from kms.app.keyring import require_key
from kms.app.ports import Keys
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId, base_name
from kms.domain.keys import KeyFilter, KeyRecord

WINDOW: Final = timedelta(days=30)
"""How far back a report looks unless it is told."""


@dataclass(frozen=True, slots=True)
class CountedUse:
    """How often a user put a key to one operation, and from which address last."""

    action: str
    user_id: UserId | None
    count: int
    last_used_at: datetime
    last_peer: str


@dataclass(frozen=True, slots=True)
class CountedUses:
    """The uses of a key from a moment on. The moment is later than asked for if the key has too many entries in the trail."""

    since: datetime
    uses: Sequence[CountedUse] = ()


@dataclass(frozen=True, slots=True)
class UsagePage:
    """Predecessors with their uses, in the order of their names. The next page begins after the name `goes_on_after`.

    `invalid` are predecessors whose records are not as the service left them.
    """

    keys: Sequence[tuple[KeyRecord, CountedUses]]
    invalid: Sequence[KeyId]
    goes_on_after: KeyName | None


class Uses(Protocol):
    """The uses of keys in the trail, as the database has it."""

    async def counted(
        self, caller: UserId, superseded: Mapping[KeyId, datetime], since: datetime | None
    ) -> Mapping[KeyId, CountedUses]:
        """Return the uses of each of these keys of *caller* since it was superseded, but not before *since*.

        None: not before `WINDOW` ago, by the database's clock.
        """
        ...


@dataclass(frozen=True, slots=True)
class LineageUsage:
    """Reports on the predecessors of keys."""

    keys: Keys
    trail: Uses

    async def lineage(self, caller: UserId, ref: KeyRef) -> KeyName:
        """Return the name of the lineage of a key of *caller*. Raises KEY_NOT_FOUND."""
        return base_name((await require_key(self.keys, caller, ref)).name)

    async def page(self, caller: UserId, lineage: KeyName, since: datetime | None, *, after: str, limit: int) -> UsagePage:
        """Return at most *limit* predecessors and their uses, as `Uses.counted` counts them, after the name *after*."""
        page = await self.keys.page(caller, KeyFilter(lineage=lineage), after=after, limit=limit)
        superseded = {key.identity.key_id: key.superseded_at for key in page.keys if key.superseded_at is not None}
        counted = await self.trail.counted(caller, superseded, since)
        found = [(key, counted[key.identity.key_id]) for key in page.keys if key.identity.key_id in superseded]
        return UsagePage(found, page.invalid, page.goes_on_after)
