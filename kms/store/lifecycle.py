"""The port `Lifecycle`: moves of keys between states, each with its event and its line of the trail in one transaction."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.access import credentials_invalid
from kms.app.keyring import key_not_found
from kms.app.ports import Call, Change, DestroyedKey
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Move, State, check_move
from kms.store.keys import FIND_BY_ID, key_record
from kms.store.pool import AS_JOB, Pool, as_user

MOVE: Final = """
    SELECT verdict, field
    FROM cryptography.move_key(
        %(key)s, %(move)s, %(change)s, %(user_version)s, %(version)s, %(request_id)s, %(peer)s
    )
"""
DESTROY_DUE: Final = "SELECT destroyed_id AS id, clock_timestamp() AS at FROM cryptography.destroy_due_keys()"
DESTROYED_OBJECTS: Final = "SELECT o AS token_object FROM cryptography.destroyed_objects(%(objects)s) AS o"
_EXPECTED: Final = {
    "occurred_at": "expected a moment that has passed",
    "pending_days": "expected 7 to 90 days",
    "max_usage_count": "expected no more than the limit now, no fewer than the uses so far, and at least 1",
    "expires_at": "expected a moment ahead, and not behind the expiry now",
}
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class StoredLifecycle:
    """`Lifecycle` in `cryptography.keys`."""

    pool: Pool

    async def move(self, call: Call, key_id: KeyId, move: Move, change: Change, *, version: int | None) -> KeyRecord:
        """Make the move and return the key as it is then.

        Raises KEY_NOT_FOUND, CREDENTIALS_INVALID, STALE, the state's reason, USAGE_LIMIT_REACHED or MALFORMED: then nothing has
        changed.
        """
        caller = call.user.user_id
        parameters = {
            "key": key_id,
            "move": move,
            "change": Jsonb(_told(change)),
            "user_version": call.user.version,
            "version": version,
            "request_id": call.request_id,
            "peer": call.peer,
        }
        try:
            # Not `transaction`, which would hold the key's lock until we have answered: others move and use it too.
            (verdict,), after = await self.pool.fetch_each(
                as_user(caller), (MOVE, parameters), (FIND_BY_ID, {"caller": caller, "ref": key_id})
            )
        except pg.SerializationFailure:
            raise _stale() from None
        if verdict["verdict"] != "OK":
            raise _refusal(verdict["verdict"], verdict["field"], move)
        return key_record(after[0])

    async def destroy_due(self) -> Sequence[DestroyedKey]:
        """Destroy at most 100 keys whose time has come and return them: their envelopes are gone, the rows stay.

        One that cannot be destroyed is logged with the reason, and is tried again by the next call.
        """
        async with self.pool.transaction(AS_JOB) as connection:
            with _warnings_logged(connection):
                rows = await (await connection.execute(DESTROY_DUE)).fetchall()
        return [DestroyedKey(KeyId(row["id"]), row["at"]) for row in rows]

    async def destroyed_objects(self, hsm_key_ids: Collection[str]) -> Collection[str]:
        """Return which of *hsm_key_ids* are those of destroyed keys."""
        if not hsm_key_ids:
            return ()
        rows = await self.pool.fetch(AS_JOB, DESTROYED_OBJECTS, {"objects": list(hsm_key_ids)})
        return [row["token_object"] for row in rows]


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
