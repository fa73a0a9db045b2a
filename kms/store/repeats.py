"""What was answered before, for a request that is repeated."""

from dataclasses import dataclass
from typing import Final

from kms.app.ports import Repeat
from kms.domain.ids import UserId
from kms.store.pool import AS_JOB, BEFORE_LOGIN, Pool

FIND: Final = "SELECT body_mac, result FROM cryptography.find_answer(%(user)s, %(rpc)s, %(request_id)s)"
FORGET: Final = "SELECT cryptography.forget_answers() AS removed"
FORGET_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class StoredRepeats:
    """`cryptography.request_records`, which only the ledger writes."""

    pool: Pool

    async def earlier(self, user_id: UserId, rpc: str, request_id: str) -> Repeat | None:
        """Return what was kept under this id less than 24 hours ago, or None."""
        rows = await self.pool.fetch(BEFORE_LOGIN, FIND, {"user": user_id, "rpc": rpc, "request_id": request_id})
        return Repeat(rpc, request_id, _bytes(rows[0]["body_mac"]), _bytes(rows[0]["result"])) if rows else None

    async def forget(self) -> int:
        """Remove what is no longer given, at most `FORGET_MAX` answers; return how many."""
        async with self.pool.transaction(AS_JOB) as connection:
            row = await (await connection.execute(FORGET)).fetchone()
        assert row is not None  # noqa: S101  # a function that returns no set gives a row or raises
        return int(row["removed"])


def _bytes(value: object) -> bytes:
    # A function that the database's owner replaced may return NULL or another type. Empty bytes prove nothing.
    return value if isinstance(value, bytes) else b""
