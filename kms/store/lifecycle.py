"""The port `Lifecycle`: moves of keys between states, each with its event and its line of the trail in one transaction."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.access import credentials_invalid
from kms.app.keyring import key_not_found
from kms.app.ports import Call, DestroyedKey
from kms.app.records import Records
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId, UserId
from kms.domain.key_row import check_change, destroyed, key_bytes, moved, record_invalid, state_of
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move, State, check_move
from kms.store.errors import unavailable
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.keys import COLUMNS, FIND_BY_ID, key_record
from kms.store.pool import AS_ADMINISTRATOR, AS_JOB, Pool, as_user

MOVE: Final = """
    SELECT verdict, field
    FROM cryptography.move_key(
        %(key)s, %(move)s, %(change)s, %(user_version)s, %(version)s, %(moment)s, %(mac)s, %(request_id)s, %(peer)s
    )
"""
# By the index of what is due: a bare clock_timestamp() is volatile and no condition of an index. So many are looked at that a few
# which cannot be destroyed keep no other waiting.
DUE: Final = f"""
    SELECT {COLUMNS}, clock_timestamp() AS now
    FROM cryptography.keys
    WHERE destroyed_at IS NULL AND destruction_scheduled_at <= (SELECT clock_timestamp())
    ORDER BY destruction_scheduled_at
    LIMIT 1000
"""
DESTROY: Final = "SELECT d AS id FROM cryptography.destroy_keys(%(ids)s, %(versions)s, %(moment)s, %(macs)s) AS d"
OF_DESTROYED_KEYS: Final = f"""
    SELECT {COLUMNS}
    FROM cryptography.keys AS k
    WHERE hsm_key_id = ANY (%(objects)s) AND hsm_key_id IS NOT NULL AND destroyed_at IS NOT NULL
        AND NOT EXISTS (SELECT FROM cryptography.keys AS l WHERE l.hsm_key_id = k.hsm_key_id AND l.destroyed_at IS NULL)
"""
OF_KEYS: Final = f"SELECT {COLUMNS} FROM cryptography.keys WHERE id = ANY (%(ids)s)"
# How far ahead a move is dated: the key's lock is had before that moment, so that every use is recorded earlier.
_MARGINS: Final = (timedelta(milliseconds=20), timedelta(milliseconds=100), timedelta(milliseconds=500), timedelta(seconds=2))
_DESTROYED_MAX: Final = 100
_EXPECTED: Final = {
    "occurred_at": "expected a moment that has passed",
    "pending_days": "expected 7 to 90 days",
    "max_usage_count": "expected no more than the limit now, no fewer than the uses so far, and at least 1",
    "expires_at": "expected a moment ahead, and not behind the expiry now",
}
_CLOCKS_APART: Final = timedelta(minutes=1)
_CLOCKS_APART_MAX: Final = timedelta(hours=1)
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class StoredLifecycle:
    """`Lifecycle` in `cryptography.keys`.

    A move reads the key and proves it, makes the MAC of the row as it will be, and writes both where the key is still at the
    version that was read. No lock is held meanwhile.
    """

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move and return the key as it is then.

        Raises KEY_NOT_FOUND, CREDENTIALS_INVALID, STALE, the state's reason, USAGE_LIMIT_REACHED or MALFORMED: then nothing has
        changed.
        """
        for margin in _MARGINS:
            try:
                return await self._move(call, key_id, move, change, version, margin)
            except _BusyError:
                if margin == _MARGINS[-1]:
                    raise unavailable("the key is in use all the time: nothing was changed, try again") from None
            except KmsError as error:
                # Another move came between; a caller who named the version is told so. It may have told the journal first.
                is_past = error.reason is Reason.RECORD_INVALID or (error.reason is Reason.STALE and version is None)
                if not is_past or margin == _MARGINS[-1]:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _move(  # those of `move`
        self, call: Call, key_id: KeyId, move: Move, change: Change, version: int | None, margin: timedelta
    ) -> KeyRecord:
        caller, which = call.user.user_id, {"caller": call.user.user_id, "ref": key_id}
        rows = await self.pool.fetch(as_user(caller), FIND_BY_ID, which)
        if not rows:
            raise key_not_found()
        before = rows[0]
        await self._prove(before, caller, key_id)
        moment = before["now"] + margin
        if version is not None and before["version"] != version:
            raise _stale()
        check_move(state_of(before, self.records.judged_at(moment)), move)
        check_change(before, move, change, self.records.judged_at(moment))
        _check_clocks(moment, self.records.clock())
        expected = moved(before, move, change, moment)
        parameters = {
            "key": key_id,
            "move": move,
            "change": Jsonb(_told(change)),
            "user_version": call.user.version,
            "version": before["version"],
            "moment": moment,
            "mac": await self.records.mac_of_key(expected),
            "request_id": call.request_id,
            "peer": call.peer,
        }
        # Not `transaction`, which would hold the key's lock until we have answered: others move and use it too.
        (verdict,), after = await self.pool.fetch_each(as_user(caller), (MOVE, parameters), (FIND_BY_ID, which))
        if verdict["verdict"] == "BUSY":
            raise _BusyError
        if verdict["verdict"] != "OK":
            raise _refusal(verdict["verdict"], verdict["field"], move)
        if not after or key_bytes(after[0]) != key_bytes(expected):
            raise record_invalid(key_id)
        await self._prove(after[0], caller, key_id)
        return key_record(after[0], self.records.judged_at(after[0]["now"]))

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy at most 100 keys whose time has come and return them: their envelopes are gone, the rows stay.

        One that cannot be destroyed, or whose record is not as we left it, is logged with the reason, and is tried again by the
        next call.
        """
        done = list[DestroyedKey]()
        due = await self.pool.fetch(AS_ADMINISTRATOR, DUE)
        while due and len(done) < _DESTROYED_MAX:
            done += await self._destroy(due[:_DESTROYED_MAX])
            due = due[_DESTROYED_MAX:]
        return done

    async def _destroy(self, due: Sequence[DictRow]) -> Sequence[DestroyedKey]:
        moment = max(row["now"] for row in due)
        rows = [row for row in due if row["destroyed_at"] is None and await self._is_due(row)]
        if not rows:
            return []
        parameters = {
            "ids": [row["id"] for row in rows],
            "versions": [row["version"] for row in rows],
            "moment": moment,
            "macs": [await self.records.mac_of_key(destroyed(row, moment)) for row in rows],
        }
        async with self.pool.transaction(AS_JOB) as connection:
            with _warnings_logged(connection):
                found = await (await connection.execute(DESTROY, parameters)).fetchall()
        # What the journal is told is for ever, so the function's word is not enough.
        gone = [row["id"] for row in rows if row["id"] in {each["id"] for each in found}]
        after = await self.pool.fetch(AS_ADMINISTRATOR, OF_KEYS, {"ids": gone})
        return [DestroyedKey(KeyId(row["id"]), row["destroyed_at"]) for row in after if await self._is_destroyed(row)]

    async def _is_due(self, row: DictRow) -> bool:
        """Whether the key in *row* is ours, and its destruction is due by the host's clock: the database's is its owner's."""
        try:
            await self.records.prove_key(row)
            self._ask_journal(row)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            _LOG.error("key not destroyed", key=str(row["id"]), reason=error.reason, message=error.message)
            return False
        due_at = row["destruction_scheduled_at"]
        return due_at is not None and due_at <= self.records.clock() + _CLOCKS_APART

    async def _is_destroyed(self, row: DictRow) -> bool:
        return row["destroyed_at"] is not None and await self._is_due(row)

    async def removable_objects(self, hsm_key_ids: Collection[str]) -> Collection[str]:
        """Return which of *hsm_key_ids* are those of keys that we destroyed when their time had come."""
        if not hsm_key_ids:
            return ()
        rows = await self.pool.fetch(AS_ADMINISTRATOR, OF_DESTROYED_KEYS, {"objects": list(hsm_key_ids)})
        return [row["hsm_key_id"] for row in rows if await self._is_removable(row)]

    async def _is_removable(self, row: DictRow) -> bool:
        # The service's own keys end by an operator's command alone.
        return not row["bound_to"] and await self._is_destroyed(row)

    async def _prove(self, row: DictRow, caller: UserId, key_id: KeyId) -> None:
        if row["id"] != key_id or row["user_id"] != caller:
            raise record_invalid(key_id)
        await self.records.prove_key(row)
        self._ask_journal(row)

    def _ask_journal(self, row: DictRow) -> None:
        """Raise RECORD_INVALID for a row that is ours and older than what the journal knows of the key."""
        if self.knowledge is not None:
            self.knowledge.check(key_record(row, self.records.judged_at(self.records.clock())))


def _check_clocks(moment: datetime, host: datetime) -> None:
    """Raise STORE_UNAVAILABLE where a move would be dated by a clock of the database that is wrong."""
    if abs(moment - host) > _CLOCKS_APART_MAX:
        raise unavailable("the clocks of the database and of the host differ by over an hour: nothing is dated by them")


class _BusyError(Exception):
    """The key's lock was not had before the moment of the move."""


@contextmanager
def _warnings_logged(connection: AsyncConnection[DictRow]) -> Iterator[None]:
    def log(notice: pg.Diagnostic) -> None:
        _LOG.warning("key not destroyed", reason=notice.message_primary)

    connection.add_notice_handler(log)
    try:
        yield
    finally:
        connection.remove_notice_handler(log)


def _told(change: Change) -> dict[str, Any]:
    """Return the fields that are set, as JSON has them."""
    told = {
        "reason": change.reason,
        "occurred_at": None if change.occurred_at is None else change.occurred_at.isoformat(),
        "pending_days": change.pending_days,
        "max_usage_count": change.max_usage_count,
        "expires_at": None if change.expires_at is None else change.expires_at.isoformat(),
        "metadata": None if change.metadata is None else dict(change.metadata),
    }
    return {name: value for name, value in told.items() if value is not None}


def _stale() -> KmsError:
    return KmsError(Reason.STALE, "the key was changed meanwhile")


def _refusal(verdict: str, field: str | None, move: Move) -> KmsError:
    """Return the error that a verdict of `cryptography.move_key` stands for."""
    match verdict:
        case "CREDENTIALS_INVALID":
            return credentials_invalid()
        case "KEY_NOT_FOUND":
            return key_not_found()
        case "STALE":
            return _stale()
        case "USAGE_LIMIT_REACHED":
            return KmsError(Reason.USAGE_LIMIT_REACHED, "the key has been used as often as it may be")
        case "MALFORMED" if field is not None:
            return malformed(field, _EXPECTED[field])
    try:
        check_move(State(verdict.removeprefix("KEY_").lower()), move)
    except KmsError as refusal:
        return refusal
    return KmsError(Reason(verdict), "a key that was superseded stays inactive")
