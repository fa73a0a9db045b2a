"""The port `KeyTable`: keys as an auditor reads them, each with what the trail says about it at the same moment."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from psycopg.rows import DictRow

from kms.app.trail_ports import KnownKey, LaterKey
from kms.domain.errors import KmsError
from kms.domain.key_check import History, Number, load
from kms.store.pool import AS_AUDITOR, Pool

# A key with more entries is not compared with the database, and one with more uses by the newest ones first.
CHANGES_READ_MAX: Final = 10_000
USES_READ_MAX: Final = 10_000

# All but the envelope and its MAC. A test compares this with the table.
_COLUMNS: Final = """id, user_id, key_name, key_type, key_purpose, key_curve, public_key, key_derivation_path, parent_key_id,
    hsm_key_id, key_status, encryption_algorithm, key_strength, usage_counter, max_usage_count, created_at, activated_at,
    expires_at, compromised_at, revoked_at, last_used_at, metadata, custody, origin, bound_to, version, deactivated_at,
    superseded_at, destruction_scheduled_at, destroyed_at, compromise_occurred_at"""
# A forged number can be anything.
_NUMBER: Final = """CASE
        WHEN jsonb_typeof(event_details -> 'use_number') = 'number'
        THEN least(greatest((event_details ->> 'use_number')::numeric, 0), 9223372036854775807)::bigint
    END"""
PAGE: Final = f"""
    WITH changes AS MATERIALIZED (
        SELECT aggregate_id, json_agg(json_build_array(aggregate_version, event_data::text)) AS found
        FROM audit.domain_events
        WHERE commit_order >= %(from_order)s AND aggregate_type = 'key'
        GROUP BY aggregate_id
    ), uses AS MATERIALIZED (
        SELECT resource_id, max({_NUMBER}) AS used
        FROM audit.security_events
        WHERE commit_order >= %(from_order)s AND event_type = 'key.used'
        GROUP BY resource_id
    )
    SELECT k.id, to_jsonb(k)::text AS row, coalesce(c.found, '[]')::text AS changes, u.used
    FROM (
            SELECT {_COLUMNS} FROM cryptography.keys
            WHERE %(after)s::uuid IS NULL OR id > %(after)s ORDER BY id LIMIT %(limit)s
        ) AS k
        LEFT JOIN changes AS c ON c.aggregate_id = k.id
        LEFT JOIN uses AS u ON u.resource_id = k.id
    ORDER BY k.id
"""
# The ids of which the trail tells are found one after the other by the index: of each only the first event is read.
KNOWN: Final = f"""
    WITH RECURSIVE told (id, number) AS (
        (
            SELECT aggregate_id, 1 FROM audit.domain_events
            WHERE aggregate_type = 'key' AND (%(after)s::uuid IS NULL OR aggregate_id > %(after)s)
            ORDER BY aggregate_id LIMIT 1
        )
        UNION ALL
        SELECT (
            SELECT e.aggregate_id FROM audit.domain_events AS e
            WHERE e.aggregate_type = 'key' AND e.aggregate_id > told.id
            ORDER BY e.aggregate_id LIMIT 1
        ), told.number + 1
        FROM told
        WHERE told.id IS NOT NULL AND told.number < %(limit)s
    ), signed AS MATERIALIZED (
        SELECT coalesce(max(horizon), 0) AS horizon FROM audit.checkpoints
    )
    SELECT page.id, to_jsonb(k)::text AS row, c.found AS changes, c.is_unsigned OR u.is_unsigned AS is_unsigned, u.used,
        c.count > %(changes_max)s::bigint AS is_too_long, u.count >= %(uses_max)s::bigint AS has_more_uses
    FROM (
            SELECT id FROM told WHERE id IS NOT NULL
            UNION
            (
                SELECT id FROM cryptography.keys
                WHERE %(after)s::uuid IS NULL OR id > %(after)s ORDER BY id LIMIT %(limit)s
            )
            ORDER BY id LIMIT %(limit)s
        ) AS page
        LEFT JOIN LATERAL (SELECT {_COLUMNS} FROM cryptography.keys AS held WHERE held.id = page.id OFFSET 0) AS k ON TRUE
        CROSS JOIN LATERAL (
            SELECT count(*) AS count, coalesce(bool_or(e.commit_order >= signed.horizon), FALSE) AS is_unsigned,
                coalesce(
                    json_agg(json_build_array(e.aggregate_version, e.event_data::text) ORDER BY e.aggregate_version), '[]'
                )::text AS found
            FROM signed CROSS JOIN LATERAL (
                SELECT aggregate_version, event_data, commit_order FROM audit.domain_events
                WHERE aggregate_id = page.id AND aggregate_type = 'key'
                ORDER BY aggregate_version LIMIT %(changes_max)s::bigint + 1
            ) AS e
        ) AS c
        CROSS JOIN LATERAL (
            SELECT count(*) AS count, coalesce(bool_or(e.commit_order >= signed.horizon), FALSE) AS is_unsigned,
                max(e.number) AS used
            FROM signed CROSS JOIN LATERAL (
                SELECT commit_order, {_NUMBER} AS number FROM audit.security_events
                WHERE resource_id = page.id AND event_type = 'key.used'
                ORDER BY created_at DESC LIMIT %(uses_max)s::bigint
            ) AS e
        ) AS u
    ORDER BY page.id
"""
# Counter and uses of one moment, too.
ALL_USES: Final = f"""
    SELECT k.usage_counter, (
        SELECT max({_NUMBER}) FROM audit.security_events WHERE resource_id = k.id AND event_type = 'key.used'
    ) AS used
    FROM cryptography.keys AS k
    WHERE k.id = %(id)s
"""


@dataclass(frozen=True, slots=True)
class StoredKeyTable:
    """`KeyTable` in `cryptography.keys`, with its entries in `audit.domain_events` and `audit.security_events`."""

    pool: Pool

    async def page(self, after: UUID | None, from_order: int, limit: int) -> Sequence[LaterKey]:
        """Return at most *limit* keys with ids above *after* (None: from the first), each with its entries from an order on."""
        rows = await self.pool.fetch(AS_AUDITOR, PAGE, {"after": after, "from_order": from_order, "limit": limit})
        return [LaterKey(row["id"], row["row"], row["changes"], row["used"]) for row in rows]

    async def known(self, after: UUID | None, limit: int) -> Sequence[KnownKey]:
        """Return at most *limit* keys that the table or the trail has, with ids above *after* (None: from the first)."""
        parameters = {"after": after, "limit": limit, "changes_max": CHANGES_READ_MAX, "uses_max": USES_READ_MAX}
        rows = await self.pool.fetch(AS_AUDITOR, KNOWN, parameters)
        return [await self._known(row) for row in rows]

    async def _known(self, row: DictRow) -> KnownKey:
        found, history = None if row["row"] is None else load(row["row"]), _history(row)
        if found is None or history is None:
            return KnownKey(row["id"], found, history)
        if row["has_more_uses"] and found["usage_counter"] != Number(str(history.used)):
            # The newest by time do not have the highest number where a clock was set back. Where reading all takes too long, they
            # have to do: the difference is named then.
            with suppress(KmsError):
                for all_uses in await self.pool.fetch(AS_AUDITOR, ALL_USES, {"id": row["id"]}):
                    found["usage_counter"] = Number(str(all_uses["usage_counter"]))
                    history = replace(history, used=all_uses["used"])
        return KnownKey(row["id"], found, history)


def _history(row: DictRow) -> History | None:
    if row["is_too_long"]:
        return None
    changes, conflict = list[tuple[int, str]](), None
    for version, data in load(row["changes"]):
        # The column is NOT NULL, until somebody who may says otherwise: no entry has version 0, so that the key differs.
        number = int(version.text) if isinstance(version, Number) else 0
        if not changes or changes[-1][0] != number:
            changes.append((number, data))
        elif changes[-1][1] != data:
            conflict = number
    return History(tuple(changes), row["used"], conflict, row["is_unsigned"])
