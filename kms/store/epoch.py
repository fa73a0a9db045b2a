"""Epochs: a database that was restored or recovered is not served until what it must not bring back is gone.

The newest epoch says where the database lies (cluster, timeline, oid). A dump that is restored lies elsewhere and a recovery to
a point in time has a new timeline, so that neither can pass for the database that was served last, whatever tool was used.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, LiteralString
from uuid import UUID

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.rows import dict_row

from kms.app.records import Records
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.key_row import AUTHENTICATED, Row, epoch_bytes
from kms.domain.restoring import Restoring, confirmed
from kms.store.errors import unavailable
from kms.store.journal import Entry, Event, is_superseded, successor_in
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.keys import key_record
from kms.store.pool import AS_ADMINISTRATOR, AS_JOB, Pool
from kms.store.renewed_macs import TokenMac, renewed_macs

CURRENT: Final = """
    SELECT e.number, e.cause, e.begun_at, e.backup_created_at, e.system_identifier, e.timeline, e.database_oid, e.record_mac,
        (e.system_identifier, e.timeline, e.database_oid)
        = (here.system_identifier, here.timeline, here.database_oid) AS is_here
    FROM cryptography.epochs AS e CROSS JOIN cryptography.location() AS here
    ORDER BY e.number DESC
    LIMIT 1
"""
HERE: Final = """
    SELECT clock_timestamp() AS begun_at, here.system_identifier, here.timeline, here.database_oid
    FROM cryptography.location() AS here
"""
BEGIN_FIRST: Final = """
    SELECT cryptography.begin_first_epoch(
        %(begun_at)s, %(system_identifier)s, %(timeline)s, %(database_oid)s, %(record_mac)s
    )
"""
# What a restore does to keys says so in their events.
BECAUSE_RESTORED: Final = "SELECT set_config('app.reason', 'RESTORED', true)"
RAISE_ORDER: Final = "SELECT audit.raise_order() AS base"
UNCONFIRMED: Final = """
    SELECT key_id, user_id, epoch
    FROM cryptography.restored_keys
    WHERE confirmed_at IS NULL
    ORDER BY user_id, key_id
"""
RESTORED_KEY: Final = f"""
    SELECT {", ".join(f"k.{column}" for column in AUTHENTICATED)}, k.usage_counter, k.last_used_at, k.record_mac,
        clock_timestamp() AS now
    FROM cryptography.restored_keys AS r JOIN cryptography.keys AS k ON k.id = r.key_id
    WHERE r.key_id = %(key)s AND r.confirmed_at IS NULL
"""
BEGUN_AT: Final = """
    SELECT e.number, e.cause, e.begun_at, e.backup_created_at, e.system_identifier, e.timeline, e.database_oid, e.record_mac
    FROM cryptography.epochs AS e
    WHERE e.begun_at = %(moment)s
"""
CONFIRM: Final = "SELECT cryptography.confirm_restored_key(%(key)s, %(count)s::bigint, %(version)s, %(mac)s) AS is_active"
NEXT: Final = """
    SELECT (SELECT coalesce(max(number), 0) + 1 FROM cryptography.epochs) AS number, %(cause)s AS cause,
        clock_timestamp() AS begun_at, %(backup_created_at)s::timestamptz AS backup_created_at, here.system_identifier,
        here.timeline, here.database_oid
    FROM cryptography.location() AS here
"""
BEGIN: Final = """
    INSERT INTO cryptography.epochs (
        number, cause, begun_at, backup_created_at, system_identifier, timeline, database_oid, record_mac
    ) VALUES (
        %(number)s, %(cause)s, %(begun_at)s, %(backup_created_at)s, %(system_identifier)s, %(timeline)s, %(database_oid)s,
        %(record_mac)s
    )
"""
TO_BE_EMPTIED: Final = """
    SELECT n.nspname::text, c.relname::text
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
        AND starts_with(obj_description(c.oid, 'pg_class'), 'Emptied by a restore')
    ORDER BY 1, 2
"""
# A destruction that the backup had waiting may have been cancelled since, which no journal tells: there is time to do it again.
# What was really destroyed is in the journal.
POSTPONE: Final = """
    UPDATE cryptography.keys
    SET destruction_scheduled_at = %(begun_at)s::timestamptz + INTERVAL '7 days'
    WHERE destroyed_at IS NULL AND destruction_scheduled_at <= %(begun_at)s
"""
# A key that is superseded, expired, revoked or compromised never protects anything again. One that waits for its destruction
# may be spared it.
DEACTIVATE: Final = """
    WITH concerned AS (
        SELECT id, user_id, key_status, deactivated_at IS NULL AS was_not_deactivated
        FROM cryptography.keys
        WHERE destroyed_at IS NULL AND superseded_at IS NULL
            AND cryptography.effective_status(
                key_status, activated_at, deactivated_at, superseded_at, expires_at, NULL, NULL, %(begun_at)s
            ) IN ('pre_active', 'active', 'inactive')
            AND (%(every_key)s OR key_type = 'aes' OR max_usage_count IS NOT NULL OR id = ANY (%(changed)s::uuid[]))
    ), noted AS (
        INSERT INTO cryptography.restored_keys AS known (key_id, user_id, epoch, status_before, deactivated_by_restore)
        SELECT id, user_id, %(epoch)s, key_status, was_not_deactivated FROM concerned
        ON CONFLICT (key_id) DO UPDATE SET
            epoch = excluded.epoch, confirmed_at = NULL, confirmed_count = NULL, confirmed_by = NULL,
            status_before = CASE WHEN known.confirmed_at IS NULL THEN known.status_before ELSE excluded.status_before END,
            deactivated_by_restore =
                excluded.deactivated_by_restore OR (known.confirmed_at IS NULL AND known.deactivated_by_restore)
        RETURNING key_id
    ), deactivated AS (
        UPDATE cryptography.keys AS k
        SET deactivated_at = %(begun_at)s, key_status = 'inactive'
        FROM concerned
        WHERE k.id = concerned.id AND concerned.was_not_deactivated
        RETURNING k.id
    )
    SELECT (SELECT count(*) FROM noted), (SELECT count(*) FROM deactivated)
"""
SUPERSEDED: Final = "SELECT id, superseded_at IS NOT NULL FROM cryptography.keys WHERE id = ANY (%(ids)s::uuid[])"
REVOKE_KEYS: Final = """
    UPDATE cryptography.keys AS k
    SET key_status = 'revoked', revoked_at = told.at
    FROM unnest(%(subjects)s::uuid[], %(moments)s::timestamptz[]) AS told (id, at)
    WHERE k.id = told.id AND k.key_status <> 'revoked'
"""
COMPROMISE_KEYS: Final = """
    UPDATE cryptography.keys AS k
    SET key_status = 'compromised', compromised_at = told.at
    FROM unnest(%(subjects)s::uuid[], %(moments)s::timestamptz[]) AS told (id, at)
    WHERE k.id = told.id AND k.key_status NOT IN ('revoked', 'compromised')
"""
DESTROY_KEYS: Final = """
    UPDATE cryptography.keys AS k
    SET destroyed_at = told.at, encrypted_private_key = ''
    FROM unnest(%(subjects)s::uuid[], %(moments)s::timestamptz[]) AS told (id, at)
    WHERE k.id = told.id AND k.destroyed_at IS NULL
"""
REVOKE_CERTIFICATES: Final = """
    UPDATE cryptography.certificates AS c
    SET revocation_status = 'revoked', revoked_at = told.at, revocation_reason = 0
    FROM unnest(%(subjects)s::uuid[], %(moments)s::timestamptz[]) AS told (id, at)
    WHERE c.id = told.id AND c.revocation_status <> 'revoked'
"""
# Locked and not deleted: whoever disabled the user can enable him again.
DISABLE_USERS: Final = """
    UPDATE authentication.users AS u
    SET locked_until = '9999-12-31 00:00:00+00', version = version + 1
    FROM unnest(%(subjects)s::uuid[], %(moments)s::timestamptz[]) AS told (id, at)
    WHERE u.id = told.id AND (u.locked_until < '9999-12-31 00:00:00+00') IS NOT FALSE
"""
_REPLAYS: Final[dict[Event, LiteralString]] = {
    Event.KEY_REVOKED: REVOKE_KEYS,
    Event.KEY_COMPROMISED: COMPROMISE_KEYS,
    Event.KEY_DESTROYED: DESTROY_KEYS,
    Event.CERTIFICATE_REVOKED: REVOKE_CERTIFICATES,
    Event.USER_DISABLED: DISABLE_USERS,
}


class Cause(StrEnum):
    """Why an epoch began. MOVED: the operator says that nothing was lost (a promoted standby, an upgraded cluster)."""

    FIRST_START = "FIRST_START"
    RESTORED = "RESTORED"
    RECOVERED = "RECOVERED"
    MOVED = "MOVED"


@dataclass(frozen=True, slots=True)
class Epoch:
    """The newest epoch of a database. `is_here`: the database lies where it says."""

    number: int
    cause: str
    begun_at: datetime
    is_here: bool


@dataclass(frozen=True, slots=True)
class UnconfirmedKey:
    """A restored key that waits for an administrator to state how often it was used."""

    key_id: UUID
    user_id: UUID
    epoch: int


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the beginning of an epoch did. `replayed` counts the rows that the journal changed, by event.

    `invalid` are keys whose records were not as the service had left them: they stay refused (RECORD_INVALID). `superseded` are
    keys that were rotated since, as the journal says: they have their names again. `lost_successors` are keys that such rotations
    made, as far as the journal names them: the database does not have them.
    """

    number: int
    replayed: Mapping[Event, int]
    emptied: tuple[str, ...]
    unconfirmed: int
    deactivated: int
    invalid: tuple[UUID, ...]
    superseded: tuple[UUID, ...]
    lost_successors: tuple[UUID, ...]


async def check_epoch(pool: Pool, records: Records, *, was_served: bool = False) -> tuple[int, UUID]:
    """Return number and id of the epoch, or raise STORE_UNAVAILABLE, saying what to run, for a database that lies elsewhere.

    *was_served*: something outside the database knows that it has an epoch.

    A database without an epoch was never served; its first begins. Raises RECORD_INVALID for an epoch that nobody with the token
    began: it would excuse a history that was put back.
    """
    found = await pool.fetch(AS_JOB, CURRENT)
    if not found and was_served:
        raise unavailable("the database has no epoch, and it was served before: rows were removed. Find out who, then restore it")
    if not found:
        here = (await pool.fetch(AS_JOB, HERE))[0]
        first = {**here, "number": 1, "cause": Cause.FIRST_START.value, "backup_created_at": None}
        first["record_mac"] = await records.mac(epoch_bytes(first))
        async with pool.transaction(AS_JOB) as connection:
            await connection.execute(BEGIN_FIRST, first)
        found = await pool.fetch(AS_JOB, CURRENT)
    if found:
        await _prove(records, found[0])
    if not found or not found[0]["is_here"]:
        raise unavailable(
            "the database is not where it was served last: it was restored, recovered to a point in time, or moved. "
            "Run `kms epoch begin` if it may have lost anything, `kms epoch continue` only if it has lost nothing"
        )
    return found[0]["number"], UUID(bytes=sha256(epoch_bytes(found[0])).digest()[:16])


async def current_epoch(pool: Pool) -> Epoch | None:
    """Return the newest epoch, or None for a database that was never served."""
    rows = await pool.fetch(AS_ADMINISTRATOR, CURRENT)
    return _epoch(rows[0]) if rows else None


async def unconfirmed_keys(pool: Pool) -> Sequence[UnconfirmedKey]:
    """Return the restored keys that wait for a confirmation."""
    return [UnconfirmedKey(**row) for row in await pool.fetch(AS_ADMINISTRATOR, UNCONFIRMED)]


async def confirm_key(
    pool: Pool, records: Records, key_id: UUID, count: int, *, knowledge: JournalKnowledge | None = None
) -> bool:
    """State that a restored key was used *count* times; return whether it is what it was before, and not at its limit.

    Raises KEY_NOT_FOUND for a key that waits for nothing, MALFORMED for a count below that of the backup or above the limit,
    RECORD_INVALID for a key that is not as the service left it, or is older than *knowledge* of the journal; STALE for one that
    was changed at this moment.
    """
    rows = await pool.fetch(AS_ADMINISTRATOR, RESTORED_KEY, {"key": key_id})
    if not rows:
        raise _waits_for_nothing()
    await records.prove_key(rows[0])
    if knowledge is not None:
        knowledge.check(key_record(rows[0], records.judged_at(rows[0]["now"])))
    epochs = await pool.fetch(AS_ADMINISTRATOR, BEGUN_AT, {"moment": rows[0]["deactivated_at"]})
    for epoch in epochs:
        await _prove(records, epoch)
    after = confirmed(rows[0], by_restore=bool(epochs))
    parameters = {
        "key": key_id,
        "count": count,
        "version": rows[0]["version"],
        "mac": await records.mac_of_key(after),
    }
    async with pool.transaction(AS_ADMINISTRATOR) as connection:
        try:
            row = await (await connection.execute(CONFIRM, parameters)).fetchone()
        except pg.NoDataFound:
            raise _waits_for_nothing() from None
        except pg.SerializationFailure:
            raise KmsError(Reason.STALE, "the key was changed meanwhile: run the command again") from None
        except pg.InvalidParameterValue as error:
            raise malformed("count", error.diag.message_primary or "") from None
        except pg.NumericValueOutOfRange:
            raise malformed("count", "expected a number of uses") from None
    assert row is not None  # noqa: S101  # a function that returns no set gives a row or raises
    # A key that was rotated while it waited has a successor, and stays superseded.
    return bool(row["is_active"]) and after["superseded_at"] is None


def read_epoch(connection: psycopg.Connection[Any]) -> Epoch | None:
    """Return the newest epoch, as the login that owns the schema sees it."""
    row = connection.cursor(row_factory=dict_row).execute(CURRENT).fetchone()
    return None if row is None else _epoch(row)


def begin_epoch(
    connection: psycopg.Connection[Any],
    cause: Cause,
    journal: Sequence[Entry],
    *,
    is_complete: bool,
    mac: TokenMac,
    backup_created_at: str | None = None,
) -> Beginning:
    """Begin an epoch, all of it or nothing: replay *journal*, empty what must not come back, deactivate what is in doubt.

    A destruction that is due by then, and not in the journal, is put off for seven days.

    Unless the journal *is_complete*, every key is in doubt; else those of which it says that they were changed, and those whose
    uses are counted: with a limit, and AES keys. *mac* is that of the token.
    The connection's login sees every row. Raises STORE_UNAVAILABLE.
    """
    with connection.transaction():
        number, begun_at = _begin(connection, cause, backup_created_at, mac)
        told = {event: _told(event, journal) for event in _REPLAYS}
        changed = [entry.subject for entry in journal if entry.event is Event.KEY_CHANGED]
        restoring = Restoring(
            begun_at,
            not is_complete,
            told[Event.KEY_REVOKED],
            told[Event.KEY_COMPROMISED],
            told[Event.KEY_DESTROYED],
            frozenset(changed),
        )
        with renewed_macs(connection, restoring, mac) as invalid:
            connection.execute(BECAUSE_RESTORED)
            replayed = {event: _replay(connection, event, told[event]) for event in _REPLAYS}
            emptied = _empty_tables(connection)
            connection.execute(POSTPONE, {"begun_at": begun_at})
            parameters = {"every_key": not is_complete, "changed": changed, "epoch": number, "begun_at": begun_at}
            row = connection.execute(DEACTIVATE, parameters).fetchone()
        superseded, lost = _undone_rotations(connection, journal)
    assert row is not None  # noqa: S101  # a SELECT without FROM gives a row
    unconfirmed, deactivated = row
    return Beginning(number, replayed, emptied, unconfirmed, deactivated, tuple(invalid), superseded, lost)


def continue_epoch(connection: psycopg.Connection[Any], mac: TokenMac) -> int:
    """Begin an epoch in which nothing is in doubt, and return its number: the operator says that nothing was lost."""
    with connection.transaction():
        return _begin(connection, Cause.MOVED, None, mac)[0]


def _begin(
    connection: psycopg.Connection[Any], cause: Cause, backup_created_at: str | None, mac: TokenMac
) -> tuple[int, datetime]:
    # First of all: what the epoch's own beginning writes into the trail comes after everything that is there.
    connection.execute(RAISE_ORDER)
    parameters = {"cause": cause.value, "backup_created_at": backup_created_at}
    row = connection.cursor(row_factory=dict_row).execute(NEXT, parameters).fetchone()
    assert row is not None  # noqa: S101  # a SELECT of one row
    connection.execute(BEGIN, {**row, "record_mac": mac(epoch_bytes(row))})
    return row["number"], row["begun_at"]


def _told(event: Event, journal: Sequence[Entry]) -> dict[UUID, datetime]:
    """Return the moment at which each subject of *event* was told of first; a join with two tellings would take either."""
    told: dict[UUID, datetime] = {}
    for entry in journal:
        if entry.event is event:
            told.setdefault(entry.subject, entry.occurred_at)
    return told


def _replay(connection: psycopg.Connection[Any], event: Event, told: Mapping[UUID, datetime]) -> int:
    parameters = {"subjects": list(told.keys()), "moments": list(told.values())}
    return connection.execute(_REPLAYS[event], parameters).rowcount


def _undone_rotations(connection: psycopg.Connection[Any], journal: Sequence[Entry]) -> tuple[tuple[UUID, ...], tuple[UUID, ...]]:
    """Return the keys that *journal* knows as superseded and the database does not, and the successors that it does not have."""
    told: dict[UUID, UUID | None] = {}
    for entry in filter(is_superseded, journal):
        told[entry.subject] = successor_in(entry) or told.get(entry.subject)  # another machine's line may not name it
    successors = [successor for successor in told.values() if successor is not None]
    held: dict[UUID, bool] = dict(connection.execute(SUPERSEDED, {"ids": [*told, *successors]}).fetchall())
    return (
        tuple(key for key in told if held.get(key) is False),
        tuple(successor for successor in successors if successor not in held),
    )


def _empty_tables(connection: psycopg.Connection[Any]) -> tuple[str, ...]:
    found = connection.execute(TO_BE_EMPTIED).fetchall()
    if found:
        names = sql.SQL(", ").join(sql.Identifier(schema, name) for schema, name in found)
        connection.execute(sql.SQL("TRUNCATE {}").format(names))
    return tuple(f"{schema}.{name}" for schema, name in found)


def _epoch(row: Row) -> Epoch:
    return Epoch(row["number"], row["cause"], row["begun_at"], row["is_here"])


async def _prove(records: Records, row: Row) -> None:
    try:
        await records.prove_epoch(row)
    except KmsError as error:
        if error.reason is not Reason.RECORD_INVALID:
            raise
        message = (
            f"epoch {row['number']} of the database was begun without the token: somebody has written it, or its MAC is still to "
            "be made (`kms records adopt`). Nothing is served until `kms epoch begin`"
        )
        raise KmsError(Reason.RECORD_INVALID, message) from None


def _waits_for_nothing() -> KmsError:
    return KmsError(Reason.KEY_NOT_FOUND, "no restored key of that id waits for a confirmation")
