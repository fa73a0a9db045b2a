"""The journal made complete: what a restore must not undo, and was not written when it was done, is appended.

A service that was killed between a change and its line, or could not write the line, leaves such a gap, and so do others that
serve the same database. The events of keys are followed in the order of the trail, from a place that the journal itself keeps
in lines of its own: a journal that is gone, or is of another epoch, has none, and then every key is looked at once. Nothing is
appended that the proven record of its key does not show.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import structlog
from psycopg.rows import DictRow

from kms.app.records import Records
from kms.domain.errors import KmsError, Reason
from kms.domain.key_row import AUTHENTICATED
from kms.store.errors import unavailable
from kms.store.journal import Entry, Event, Journal, Line, changed_line, version_in
from kms.store.pool import AS_ADMINISTRATOR, AS_JOB, Pool

# Epochs of one number can differ: a backup may be restored twice.
HERE: Final = """
    SELECT audit.order_horizon() AS horizon, clock_timestamp() AS now, md5(concat_ws(
            '/', e.number, extract(epoch FROM e.begun_at), e.system_identifier, e.timeline, e.database_oid
        ))::uuid AS epoch
    FROM cryptography.epochs AS e
    ORDER BY e.number DESC
    LIMIT 1
"""
# Below the horizon every event is there that will ever be.
EVENTS: Final = """
    SELECT commit_order, id, aggregate_id, aggregate_version, event_type, occurred_at, event_data ->> 'reason' AS reason,
        event_data ?| ARRAY['max_usage_count', 'expires_at'] AS is_narrowed
    FROM audit.domain_events
    WHERE (commit_order, id) > (%(order)s, %(id)s) AND commit_order < (SELECT audit.order_horizon())
    ORDER BY commit_order, id
    LIMIT %(limit)s
"""
KEYS: Final = """
    SELECT id, version, compromised_at, revoked_at, destroyed_at, clock_timestamp() AS now, version > 1 AND coalesce(
            deactivated_at::text, superseded_at::text, destruction_scheduled_at::text, expires_at::text, max_usage_count::text
        ) IS NOT NULL AS is_narrowed
    FROM cryptography.keys
    WHERE id > %(after)s
    ORDER BY id
    LIMIT %(limit)s
"""
OF_KEYS: Final = f"""
    SELECT {", ".join(AUTHENTICATED)}, record_mac FROM cryptography.keys WHERE id = ANY (%(ids)s)
"""
ROWS_MAX: Final = 1_000
_LOG = structlog.get_logger("kms.store.journal_follower")
_FIRST_ID: Final = UUID(int=0)
_EVENTS: Final = {
    "key.revoked": Event.KEY_REVOKED,
    "key.compromised": Event.KEY_COMPROMISED,
    "key.destroyed": Event.KEY_DESTROYED,
}
_NARROWING: Final = frozenset({"key.deactivated", "key.superseded", "key.destruction_scheduled", "key.destruction_cancelled"})
_COLUMNS: Final = {
    "compromised_at": Event.KEY_COMPROMISED,
    "revoked_at": Event.KEY_REVOKED,
    "destroyed_at": Event.KEY_DESTROYED,
}


class Place(NamedTuple):
    """A place in the order of the trail; what is before it has been looked at."""

    order: int
    event_id: UUID = _FIRST_ID


@dataclass(frozen=True, slots=True)
class JournalFollower:
    """Appends to *journal* what it lacks of the moves in the database of *pool*. Several may do so at once."""

    pool: Pool
    journal: Journal
    records: Records

    async def catch_up(self) -> None:
        """Append every move that belongs there, was made before all transactions under way, and is not in the journal.

        Raises STORE_UNAVAILABLE. What a call writes at the same moment may be there twice.
        """
        here = (await self.pool.fetch(AS_JOB, HERE))[0]
        epoch, now = here["epoch"], here["now"]
        written = await self._written(epoch, now)
        if written is None:
            lines, reached = await self._lines_of_keys(), Place(here["horizon"])
        else:
            lines, reached = await self._lines_of_events(written)
        lines = await self._shown(lines)
        if lines or reached != written:
            await self._extend(now, lambda entries: _missing(entries, lines, epoch, now, written, reached))

    async def _shown(self, lines: Sequence[Line]) -> list[Line]:
        """Return those of *lines* that the proven record of their key shows too: what is in the journal is there for ever."""
        shown = list[Line]()
        for start in range(0, len(lines), ROWS_MAX):
            part = lines[start : start + ROWS_MAX]
            rows = await self.pool.fetch(AS_ADMINISTRATOR, OF_KEYS, {"ids": list({line.subject for line in part})})
            proven = {row["id"]: row for row in rows if await self._is_proven(row)}
            shown += [line for line in part if line.subject in proven and _shows(proven[line.subject], line)]
            for line in part:
                if line.subject not in proven:
                    _LOG.error("not journaled: the key's record is not ours", key=str(line.subject), line=line.event.value)
        return shown

    async def _is_proven(self, row: DictRow) -> bool:
        try:
            await self.records.prove_key(row)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return False
        return True

    async def _written(self, epoch: UUID, now: datetime) -> Place | None:
        """Return how far the journal says that *epoch* was followed."""
        found = list[Place | None]()

        def look(entries: Iterator[Entry]) -> Sequence[Line]:
            found.append(_behind_place(entries, epoch)[0])
            return ()

        await self._extend(now, look)
        return found[0]

    async def _lines_of_events(self, after: Place) -> tuple[list[Line], Place]:
        """Return the lines of the events behind *after*, and a place before which all were looked at, if far enough on."""
        place, lines = after, list[Line]()
        while True:
            parameters = {"order": place.order, "id": place.event_id, "limit": ROWS_MAX}
            rows = await self.pool.fetch(AS_JOB, EVENTS, parameters)
            lines += [line for row in rows if (line := _line_of_event(row)) is not None]
            if len(rows) < ROWS_MAX:
                # Looked at again the next time: a line for each few events would be more than the events.
                return lines, place
            place = Place(rows[-1]["commit_order"], rows[-1]["id"])

    async def _lines_of_keys(self) -> list[Line]:
        lines, after = list[Line](), _FIRST_ID
        while rows := await self.pool.fetch(AS_ADMINISTRATOR, KEYS, {"after": after, "limit": ROWS_MAX}):
            lines += [line for row in rows for line in _lines_of_key(row)]
            after = rows[-1]["id"]
        return lines

    async def _extend(self, now: datetime, decide: Callable[[Iterator[Entry]], Sequence[Line]]) -> None:
        try:
            await asyncio.to_thread(self.journal.extend, decide, at=now)
        except OSError as error:
            raise unavailable(f"the journal {self.journal.path} cannot be written: {error.strerror}") from None


def _shows(row: DictRow, line: Line) -> bool:
    match line.event:
        case Event.KEY_REVOKED:
            return row["revoked_at"] is not None
        case Event.KEY_COMPROMISED:
            return row["compromised_at"] is not None
        case Event.KEY_DESTROYED:
            return row["destroyed_at"] is not None
        case _:
            return bool(row["version"] >= version_in(line))


def _missing(
    entries: Iterator[Entry], lines: Sequence[Line], epoch: UUID, now: datetime, written: Place | None, reached: Place
) -> Sequence[Line]:
    """Return those of *lines* that the journal lacks, and one that says that *reached* was, as far as there is need of it."""
    place, behind = _behind_place(entries, epoch)
    if place != written:
        return ()  # another worker was here meanwhile, and wrote them
    # Versions of another epoch are those of other changes.
    known = {_identity(entry) for entry in behind if place is not None or entry.event is not Event.KEY_CHANGED}
    missing = [line for line in lines if _identity(line) not in known]
    if reached == written:
        return missing
    return [*missing, Line(Event.FOLLOWED, epoch, now, f"{reached.order} {reached.event_id}")]


def _behind_place(entries: Iterator[Entry], epoch: UUID) -> tuple[Place | None, list[Entry]]:
    """Return the last place of *epoch* in the journal and the lines behind it; without one, all lines."""
    behind = list[Entry]()
    for entry in entries:
        if entry.event is Event.FOLLOWED and entry.subject == epoch:
            order, _, event_id = entry.reason.partition(" ")
            return Place(int(order), UUID(event_id)), behind
        behind.append(entry)
    return None, behind


def _identity(line: Line) -> tuple[Event, UUID, str]:
    """Return what two lines that tell of the same thing have in common."""
    return line.event, line.subject, line.reason.partition(",")[0] if line.event is Event.KEY_CHANGED else ""


def _line_of_event(row: DictRow) -> Line | None:
    kind, key_id, at, reason = row["event_type"], row["aggregate_id"], row["occurred_at"], row["reason"] or ""
    if (event := _EVENTS.get(kind)) is not None:
        return Line(event, key_id, at, reason)
    if kind in _NARROWING or (kind == "key.updated" and row["is_narrowed"]):
        return changed_line(key_id, int(row["aggregate_version"]), occurred_at=at, what=f"{kind}: {reason}")
    return None


def _lines_of_key(row: DictRow) -> list[Line]:
    """Return the lines of a key as it is. One that was changed to and fro may be told of without need."""
    lines = [Line(event, row["id"], row[column], "") for column, event in _COLUMNS.items() if row[column] is not None]
    if row["is_narrowed"] and not lines:
        lines.append(changed_line(row["id"], row["version"], occurred_at=row["now"], what="at some time"))
    return lines
