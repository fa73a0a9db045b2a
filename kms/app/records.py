"""Proving that a row of the database is as the service left it.

Whoever owns the database can write any row. They cannot make the MAC of one, since its key never leaves the token. So a row is
proven before anything of it is used, and what was proven is remembered by its hash: proving a row again costs no token call.
"""

import hmac
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final
from uuid import UUID

from kms.domain.key_row import Row, epoch_bytes, key_bytes, record_invalid

MAC_COLUMN: Final = "record_mac"
_REMEMBERED_MAX: Final = 20_000  # hashes of 32 bytes

_CLOCKS_APART_MAX: Final = timedelta(minutes=1)

Mac = Callable[[bytes], Awaitable[bytes]]
"""HMAC-SHA-256 under the token's MAC key: `Hsm.mac`."""


@dataclass(frozen=True, slots=True)
class Records:
    """Makes and proves the MACs of rows. One is shared by a process, since it remembers which rows were proven.

    *clock* is the host's, against a database whose clock was set back.
    """

    mac: Mac
    clock: Callable[[], datetime]
    _proven: OrderedDict[bytes, None] = field(default_factory=OrderedDict, repr=False)

    def judged_at(self, now: datetime) -> datetime:
        """Return the moment at which states are judged: *now* by the database's clock, unless that is over a minute slow."""
        return max(now, self.clock() - _CLOCKS_APART_MAX)

    async def mac_of_key(self, row: Row) -> bytes:
        """Return the MAC of a row of `cryptography.keys`: 32 bytes. Raises HSM_UNAVAILABLE."""
        made = await self.mac(text := key_bytes(row))
        self._remember(_hash(text, made))
        return made

    async def prove_key(self, row: Row) -> None:
        """Raise RECORD_INVALID unless *row*, with its `record_mac`, is one that `mac_of_key` made. Raises HSM_UNAVAILABLE."""
        await self.prove(key_bytes(row), row[MAC_COLUMN], row.get("id"))

    async def prove_epoch(self, row: Row) -> None:
        """Raise RECORD_INVALID unless *row* of `cryptography.epochs` has its MAC. Raises HSM_UNAVAILABLE."""
        await self.prove(epoch_bytes(row), row[MAC_COLUMN], row.get("id"))

    async def prove(self, text: bytes, stored: object, key_id: UUID | None) -> None:
        """Raise RECORD_INVALID, about the key *key_id*, unless *stored* is the MAC of *text*. Raises HSM_UNAVAILABLE."""
        if not isinstance(stored, bytes):
            raise record_invalid(key_id)
        key = _hash(text, stored)
        if key in self._proven:
            self._proven.move_to_end(key)
            return
        if not hmac.compare_digest(await self.mac(text), stored):
            raise record_invalid(key_id)
        self._remember(key)

    def _remember(self, key: bytes) -> None:
        self._proven[key] = None
        if len(self._proven) > _REMEMBERED_MAX:
            self._proven.popitem(last=False)


def _hash(text: bytes, mac: bytes) -> bytes:
    return sha256(mac + text).digest()
