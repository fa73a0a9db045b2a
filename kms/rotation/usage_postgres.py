"""The uses of keys in `audit.security_events`, counted by an index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from psycopg.rows import DictRow

from kms.domain.ids import KeyId, UserId
from kms.rotation.usage import WINDOW, CountedUse, CountedUses
from kms.store.pool import Pool, as_user
from kms.store.trail import IN_ORDER

SCANNED_MAX: Final = 10_000
"""How many entries of a key a report looks at, the newest first."""
# Nobody but its owner uses a key. So row security, which shows a user their own entries, hides no use.
USES: Final = """
    SELECT keys.id AS key_id, keys.since, used.is_use, used.action, used.user_id, used.entries, used.oldest, used.newest,
        used.last_peer
    FROM (
            SELECT key.id, greatest(key.superseded_at, coalesce(%(since)s::timestamptz, now() - %(window)s::interval)) AS since
            FROM unnest(%(keys)s::uuid[], %(superseded)s::timestamptz[]) AS key (id, superseded_at)
        ) AS keys
        LEFT JOIN LATERAL (
            SELECT (event_type = 'key.used' AND outcome = 'success') IS TRUE AS is_use, action, user_id, count(*) AS entries,
                min(created_at) AS oldest, max(created_at) AS newest,
                (array_agg(host(source_ip) ORDER BY created_at DESC))[1] AS last_peer
            FROM (
                SELECT event_type, outcome, action, user_id, created_at, source_ip
                FROM audit.security_events
                WHERE resource_id = keys.id AND created_at >= keys.since AND created_at <= now()
                ORDER BY created_at DESC
                LIMIT %(scanned_max)s
            ) AS scanned
            GROUP BY 1, 2, 3
        ) AS used ON TRUE
    ORDER BY used.entries DESC, used.action, used.user_id
"""


@dataclass(frozen=True, slots=True)
class StoredUses:
    """`Uses` in PostgreSQL. What it reads is as the database has it: the verifier of the trail proves that."""

    pool: Pool
    scanned_max: int = SCANNED_MAX

    async def counted(
        self, caller: UserId, superseded: Mapping[KeyId, datetime], since: datetime | None
    ) -> Mapping[KeyId, CountedUses]:
        """See `Uses.counted`. It looks at the 10,000 newest entries of each key."""
        parameters = {
            "keys": list(superseded),
            "superseded": list(superseded.values()),
            "since": since,
            "window": WINDOW,
            "scanned_max": self.scanned_max,
        }
        _, rows = await self.pool.fetch_each(as_user(caller), (IN_ORDER, None), (USES, parameters))
        return {key_id: self._counted([row for row in rows if row["key_id"] == key_id]) for key_id in superseded}

    def _counted(self, rows: Sequence[DictRow]) -> CountedUses:
        """Return the uses in the rows of one key: one for each kind of entry, or one without an entry."""
        is_cut = sum(row["entries"] or 0 for row in rows) >= self.scanned_max
        since = min(row["oldest"] if is_cut else row["since"] for row in rows)
        return CountedUses(since, [_use(row) for row in rows if row["is_use"]])


def _use(row: DictRow) -> CountedUse:
    user_id = None if row["user_id"] is None else UserId(row["user_id"])
    return CountedUse(row["action"] or "", user_id, row["entries"], row["newest"], row["last_peer"] or "")
