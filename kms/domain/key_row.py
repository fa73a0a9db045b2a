"""A row of `cryptography.keys` as the bytes that its MAC covers, and what a move makes of it.

The MAC is HMAC-SHA-256 under the token's MAC key, kept in `record_mac` and renewed by every move. `docs/formats.md` gives the
bytes. Four columns are left out: the envelope, which has a seal of its own; the counter and the time of the last use, which a
charge changes and which the trail proves; and the MAC itself.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, LiteralString
from uuid import UUID

from kms.domain.envelope import lengths_prefixed
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.keys import usage_limit
from kms.domain.lifecycle import Change, Move, Standing, State, effective_state

FORMAT_VERSION: Final = 1
# Literals, since queries are made of them. The order is that of the bytes.
AUTHENTICATED: Final[tuple[LiteralString, ...]] = (
    "id",
    "user_id",
    "key_name",
    "key_type",
    "key_purpose",
    "key_curve",
    "public_key",
    "key_derivation_path",
    "parent_key_id",
    "hsm_key_id",
    "key_status",
    "encryption_algorithm",
    "key_strength",
    "max_usage_count",
    "created_at",
    "activated_at",
    "expires_at",
    "compromised_at",
    "revoked_at",
    "metadata",
    "custody",
    "origin",
    "bound_to",
    "version",
    "deactivated_at",
    "superseded_at",
    "destruction_scheduled_at",
    "destroyed_at",
    "compromise_occurred_at",
)
_EPOCH_COLUMNS: Final = ("number", "cause", "begun_at", "backup_created_at", "system_identifier", "timeline", "database_oid")
PENDING_DAYS_DEFAULT: Final = 30
_DAYS_MAX: Final = 1000
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Row = Mapping[str, Any]


def record_invalid(key_id: UUID | None = None) -> KmsError:
    """Return the one error for a record that is not as the service left it, whatever the difference."""
    metadata = {} if key_id is None else {"key_id": str(key_id)}
    message = "the key's record is not as the service left it; it was altered or put back: see docs/operations.md, RECORD_INVALID"
    error = KmsError(Reason.RECORD_INVALID, message, **metadata)
    error.key_id = key_id
    return error


def key_bytes(row: Row) -> bytes:
    """Return the bytes of a key's row that its MAC covers. Raises RECORD_INVALID for a value that no row of ours has."""
    return _bytes(b"key record", row, AUTHENTICATED)


def epoch_bytes(row: Row) -> bytes:
    """Return the bytes of a row of `cryptography.epochs` that its MAC covers. Raises RECORD_INVALID as `key_bytes` does."""
    return _bytes(b"epoch record", row, _EPOCH_COLUMNS)


def state_of(row: Row, now: datetime) -> State:
    """Return the state of the key in *row* at *now*."""
    limit = usage_limit(row["key_type"], row["max_usage_count"])
    # The one column that decides and is not authenticated.
    if not isinstance(row["usage_counter"], int) or row["usage_counter"] < 0:
        raise record_invalid(row["id"])
    return effective_state(
        Standing(
            row["key_status"],
            row["activated_at"],
            row["deactivated_at"],
            row["superseded_at"],
            row["expires_at"],
            row["destruction_scheduled_at"],
            row["destroyed_at"],
            is_spent=limit is not None and row["usage_counter"] >= limit,
        ),
        now,
    )


def moved(row: Row, move: Move, change: Change, moment: datetime) -> Row:
    """Return *row* as *move* leaves it at *moment*: the mirror of `cryptography.move_key`, which checks whether it may be."""
    return {**row, **_changed(row, move, change, moment), "version": row["version"] + 1}


def check_change(row: Row, move: Move, change: Change, moment: datetime) -> None:
    """Raise why *move* cannot be made of *row* with *change*: the mirror of what `cryptography.move_key` says of it.

    MALFORMED names the field; USAGE_LIMIT_REACHED and KEY_INACTIVE for a key that is not reactivated. It comes before the MAC is
    made: the token must not vouch for a row that the database then refuses.
    """
    limit = usage_limit(row["key_type"], row["max_usage_count"])
    if move is Move.REACTIVATE and row["superseded_at"] is not None:
        raise KmsError(Reason.KEY_INACTIVE, "a key that was superseded stays inactive")
    if move is Move.REACTIVATE and limit is not None and row["usage_counter"] >= limit:
        raise KmsError(Reason.USAGE_LIMIT_REACHED, "the key has been used as often as it may be")
    if move is Move.COMPROMISE and change.occurred_at is not None and change.occurred_at > moment:
        raise malformed("occurred_at", "expected a moment that has passed")
    if move is Move.SCHEDULE_DESTRUCTION and change.pending_days is not None and not 7 <= change.pending_days <= 90:
        raise malformed("pending_days", "expected 7 to 90 days")
    if move is Move.UPDATE:
        _check_narrower(row, change, moment)


def _check_narrower(row: Row, change: Change, moment: datetime) -> None:
    count, now_at, expires_at, ends_at = change.max_usage_count, row["max_usage_count"], change.expires_at, row["expires_at"]
    if count is not None and (count < max(row["usage_counter"], 1) or (now_at is not None and count > now_at)):
        raise malformed("max_usage_count", "expected no more than the limit now, no fewer than the uses so far, and at least 1")
    if expires_at is not None and (expires_at <= moment or (ends_at is not None and expires_at > ends_at)):
        raise malformed("expires_at", "expected a moment ahead, and not behind the expiry now")


def destroyed(row: Row, moment: datetime) -> Row:
    """Return *row* as the destruction that has fallen due leaves it at *moment*."""
    return {**row, "destroyed_at": moment, "version": row["version"] + 1}


def _changed(row: Row, move: Move, change: Change, moment: datetime) -> dict[str, Any]:
    match move:
        case Move.ACTIVATE:
            return {"key_status": "active", "activated_at": moment}
        case Move.DEACTIVATE:
            return {"key_status": "inactive", "deactivated_at": moment}
        case Move.REACTIVATE:
            return {"key_status": "active", "deactivated_at": None}
        case Move.REVOKE:
            return {"key_status": "revoked", "revoked_at": moment}
        case Move.COMPROMISE:
            occurred_at = change.occurred_at or moment
            return {"key_status": "compromised", "compromised_at": moment, "compromise_occurred_at": occurred_at}
        case Move.SCHEDULE_DESTRUCTION:
            # More days than there may be are for the database to refuse, and too many for a date.
            days = min(PENDING_DAYS_DEFAULT if change.pending_days is None else change.pending_days, _DAYS_MAX)
            return {"destruction_scheduled_at": moment + timedelta(days=days)}
        case Move.CANCEL_DESTRUCTION:
            return {"destruction_scheduled_at": None}
        case Move.UPDATE:
            return {
                "max_usage_count": change.max_usage_count or row["max_usage_count"],
                "expires_at": change.expires_at or row["expires_at"],
                "metadata": row["metadata"] if change.metadata is None else dict(change.metadata),
            }


def _bytes(kind: bytes, row: Row, columns: tuple[str, ...]) -> bytes:
    return lengths_prefixed(kind, bytes((FORMAT_VERSION,)), *(_value(row[column]) for column in columns))


def _value(value: object) -> bytes:
    """Return a value behind a letter for its type, so that no two values of different types are alike."""
    match value:
        case None:
            return b"-"
        case str():
            return b"s" + value.encode()
        case bool():
            raise record_invalid()
        case int():
            return b"i%d" % value
        case UUID():
            return b"u" + value.bytes
        case datetime() if value.tzinfo is not None:
            return b"m%d" % ((value - _BEGINNING) // _MICROSECOND)
        case dict():
            return b"j" + json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        case _:
            raise record_invalid()
