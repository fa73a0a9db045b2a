"""The port `Trail`: the trail as an auditor reads it. That he does is a line of it."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Final, LiteralString
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.access import credentials_invalid
from kms.app.ports import Call
from kms.domain.ids import UserId
from kms.domain.permissions import DUTIES, Permission, permission_denied
from kms.domain.trail import Cursor, Event, EventFilter, Found, Outcome, Place, Severity, Stretch
from kms.store.pool import Acting, Parameters, Pool

# How many rows one call of a search looks at before it gives what it has found and a place to go on.
SCANNED_MAX: Final = 10_000
STRETCH_MAX: Final = 200
POLL_SECONDS: Final = 0.25
QUIET_SECONDS: Final = 5.0

_COLUMNS: Final = """id, created_at, event_type, severity, outcome, user_id, source_ip, resource_type, resource_id, action,
    risk_score, event_details"""
_NEWEST: Final = "ORDER BY created_at DESC, id DESC LIMIT %(scanned_max)s"
_BETWEEN: Final = """created_at >= %(since)s AND created_at <= %(before_at)s
            AND (created_at, id) < (%(before_at)s, %(before_id)s)"""
# Of what was looked at a row leaves if it fits, and the last one anyhow: it says how far this call has come.
_FITS: Final = """(
            severity = ANY (%(severities)s)
            AND (%(user)s::uuid IS NULL OR user_id = %(user)s)
            AND (%(event_type)s::text IS NULL OR event_type = %(event_type)s)
            AND (%(action)s::text IS NULL OR action = %(action)s)
            AND (%(outcome)s::text IS NULL OR outcome = %(outcome)s)
            AND (%(request_id)s::text IS NULL OR event_details ->> 'request_id' = %(request_id)s)
        ) IS TRUE"""
_FOUND: Final = f"""SELECT {_COLUMNS}, number, fits
    FROM (
        SELECT {_COLUMNS}, row_number() OVER (ORDER BY created_at DESC, id DESC) AS number, {_FITS} AS fits
        FROM scanned
    ) AS numbered
    WHERE fits OR number = %(scanned_max)s
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)s"""
_OF_SEVERITY: Final = f"= ANY (%(severities)s) AND {_BETWEEN} {_NEWEST})"
_SELECT: Final = f"SELECT {_COLUMNS} FROM audit.security_events WHERE"

SEARCH_RESOURCE: Final = f"""
    WITH scanned AS NOT MATERIALIZED ({_SELECT} resource_id = %(resource)s AND {_BETWEEN} {_NEWEST}) {_FOUND}
"""
SEARCH_USER: Final = f"""
    WITH scanned AS NOT MATERIALIZED ({_SELECT} user_id = %(user)s AND {_BETWEEN} {_NEWEST}) {_FOUND}
"""
# There is no index by time alone, which each use of a key would pay for: four by severity and time are merged.
SEARCH_ALL: Final = f"""
    WITH scanned AS NOT MATERIALIZED (
        SELECT {_COLUMNS}
        FROM (
            ({_SELECT} severity = 'low' AND 'low' {_OF_SEVERITY}
            UNION ALL ({_SELECT} severity = 'medium' AND 'medium' {_OF_SEVERITY}
            UNION ALL ({_SELECT} severity = 'high' AND 'high' {_OF_SEVERITY}
            UNION ALL ({_SELECT} severity = 'critical' AND 'critical' {_OF_SEVERITY}
        ) AS every
        {_NEWEST}
    ) {_FOUND}
"""
# Row and horizon of one snapshot: below the horizon it shows all that will ever be there.
FOLLOW: Final = f"""
    SELECT reached.horizon, next.*
    FROM (SELECT audit.order_horizon() AS horizon) AS reached LEFT JOIN LATERAL (
        SELECT {_COLUMNS}, commit_order
        FROM audit.security_events
        WHERE (commit_order, id) > (%(after_order)s, %(after_id)s) AND commit_order < reached.horizon
        ORDER BY commit_order, id
        LIMIT %(limit)s
    ) AS next ON TRUE
"""
HORIZON: Final = "SELECT audit.order_horizon() AS horizon"
# Index order to the end, whatever the statistics say: else a call could read and sort all events of a user. And one plan for
# all values: to plan for each again costs more than to run, with every partition in it.
IN_ORDER: Final = "SELECT set_config('enable_sort', 'off', true), set_config('plan_cache_mode', 'force_generic_plan', true)"
RECORD: Final = "SELECT audit.record_reading(%(action)s, %(request_id)s, %(peer)s, %(details)s) AS verdict"

_ROLE: Final = DUTIES[Permission.AUDIT_READ].database_role
_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
_END: Final = datetime.max.replace(tzinfo=UTC)
_FIRST_ID: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class StoredTrail:
    """`Trail` in `audit.security_events`, in the role that reads the trail and nothing else."""

    pool: Pool
    scanned_max: int = SCANNED_MAX

    async def search(self, call: Call, which: EventFilter, *, before: Place | None, limit: int) -> Found:
        """Return at most *limit* events that fit, behind *before*, the newest first, once it is recorded that they were read.

        Raises PERMISSION_DENIED or CREDENTIALS_INVALID for a caller who at this moment may not.
        """
        query = SEARCH_RESOURCE if which.resource_id is not None else SEARCH_USER if which.user_id is not None else SEARCH_ALL
        async with self.pool.transaction(_as_auditor(call)) as connection:
            rows = await _rows(connection, query, _parameters(which, before, limit + 1, self.scanned_max))
            found = _found(rows, limit, self.scanned_max)
            await _record(connection, call, "search", {**_told(which), "events": len(found.events)})
        return found

    async def begin(self, call: Call, after: Cursor | None) -> Cursor:
        """Record that *call* follows the trail, and return where it begins: behind *after*, or where the trail ends now."""
        async with self.pool.transaction(_as_auditor(call)) as connection:
            row = await (await connection.execute(HORIZON)).fetchone()
            assert row is not None  # noqa: S101  # a query without FROM gives a row
            begin = after or Cursor(row["horizon"], _FIRST_ID)
            details = {"from": "cursor" if after else "now", "after_order": begin.commit_order, "after_id": str(begin.event_id)}
            await _record(connection, call, "tail", details)
        return begin

    async def follow(self, call: Call, after: Cursor) -> AsyncIterator[Stretch]:
        """Yield what is behind *after*, each event once, as it becomes final; an empty stretch where all is quiet for 5 s.

        An event is final when every transaction that began before its own has ended. Whoever takes no stretch gets no further
        one read. Ends with STORE_UNAVAILABLE when the database does not answer.
        """
        given_at = monotonic()
        while True:
            parameters = {"after_order": after.commit_order, "after_id": after.event_id, "limit": STRETCH_MAX}
            async with self.pool.transaction(_as_auditor(call)) as connection:
                rows = await _rows(connection, FOLLOW, parameters)
            stretch = _stretch(rows, after)
            after = stretch.cursor
            if stretch.events or monotonic() - given_at >= QUIET_SECONDS:
                yield stretch
                given_at = monotonic()
            if len(stretch.events) < STRETCH_MAX:
                await asyncio.sleep(POLL_SECONDS)

    async def record(self, call: Call, action: str, details: Mapping[str, object]) -> None:
        """Record a reading of another kind, or raise PERMISSION_DENIED or CREDENTIALS_INVALID."""
        async with self.pool.transaction(_as_auditor(call)) as connection:
            await _record(connection, call, action, details)


def _as_auditor(call: Call) -> Acting:
    return Acting(_ROLE, str(call.user.user_id))


async def _rows(connection: AsyncConnection[DictRow], query: LiteralString, parameters: Parameters) -> list[DictRow]:
    await connection.execute(IN_ORDER)
    return await (await connection.execute(query, parameters, prepare=True)).fetchall()


async def _record(connection: AsyncConnection[DictRow], call: Call, action: str, details: Mapping[str, object]) -> None:
    parameters = {"action": action, "request_id": call.request_id, "peer": call.peer or None, "details": Jsonb(dict(details))}
    row = await (await connection.execute(RECORD, parameters)).fetchone()
    assert row is not None  # noqa: S101  # a function that returns no set gives a row or raises
    if row["verdict"] == "PERMISSION_DENIED":
        raise permission_denied(Permission.AUDIT_READ)
    if row["verdict"] != "OK":
        raise credentials_invalid()


def _parameters(which: EventFilter, before: Place | None, limit: int, scanned_max: int) -> dict[str, object]:
    # `until` itself is excluded: no id is below the first.
    begin = before or Place(which.until or _END, _FIRST_ID)
    return {
        "since": which.since or _BEGINNING,
        "before_at": begin.created_at,
        "before_id": begin.event_id,
        "severities": list(which.severities),
        "user": which.user_id,
        "resource": which.resource_id,
        "event_type": which.event_type,
        "action": which.action,
        "outcome": which.outcome,
        "request_id": which.request_id,
        "limit": limit,
        "scanned_max": scanned_max,
    }


def _told(which: EventFilter) -> dict[str, object]:
    """Return the fields that are set, as JSON has them."""
    told = {
        "since": which.since and which.since.isoformat(),
        "until": which.until and which.until.isoformat(),
        "user": which.user_id and str(which.user_id),
        "resource": which.resource_id and str(which.resource_id),
        "event_type": which.event_type,
        "action": which.action,
        "outcome": which.outcome,
        "severity_min": which.severity_min,
        "searched_request_id": which.request_id,
    }
    return {name: value for name, value in told.items() if value is not None}


def _found(rows: list[DictRow], limit: int, scanned_max: int) -> Found:
    if len(rows) > limit:
        return Found([_event(row) for row in rows[:limit]], _place(rows[limit - 1]))
    is_at_end = not rows or rows[-1]["number"] < scanned_max
    return Found([_event(row) for row in rows if row["fits"]], None if is_at_end else _place(rows[-1]))


def _place(row: DictRow) -> Place:
    return Place(row["created_at"], row["id"])


def _stretch(rows: list[DictRow], after: Cursor) -> Stretch:
    events = [row for row in rows if row["id"] is not None]
    if len(events) == STRETCH_MAX:
        cursor = Cursor(events[-1]["commit_order"], events[-1]["id"])
    else:
        # All below the horizon has been given.
        cursor = max(after, Cursor(rows[0]["horizon"], _FIRST_ID))
    return Stretch([_event(row) for row in events], cursor)


def _event(row: DictRow) -> Event:
    return Event(
        event_id=row["id"],
        created_at=row["created_at"],
        event_type=row["event_type"],
        severity=Severity(row["severity"]),
        outcome=Outcome(row["outcome"]) if row["outcome"] else None,
        user_id=UserId(row["user_id"]) if row["user_id"] else None,
        peer=str(row["source_ip"] or ""),
        resource_type=row["resource_type"] or "",
        resource_id=row["resource_id"],
        action=row["action"] or "",
        risk_score=row["risk_score"] or 0,
        details=row["event_details"] or {},
    )
