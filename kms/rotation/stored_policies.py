"""Policies in `cryptography.rotation_policies`. A row is believed only with the MAC that the service made of it."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from psycopg import errors as pg
from psycopg.rows import DictRow

from kms.app.keyring import key_not_found
from kms.app.ports import Call
from kms.app.records import Records
from kms.domain.ids import KeyName, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord
from kms.rotation.policy import RotationPolicy, Triggers
from kms.rotation.ports import StoredPolicy
from kms.rotation.rotation import RotationRequest
from kms.store.errors import Refusals
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import AS_JOB, Pool, as_user
from kms.store.proven_keys import ProvenKeys

_COLUMNS: Final = """user_id, key_name, every_seconds, before_expiry_seconds, at_usage_percent, on_compromise, is_paused, version,
    policy_mac, requests"""
FIND: Final = f"SELECT {_COLUMNS} FROM cryptography.rotation_policies WHERE user_id = %(owner)s AND key_name = %(name)s"
SET: Final = """
    SELECT cryptography.set_rotation_policy(
        %(name)s, %(every)s, %(before_expiry)s, %(at_usage)s, %(on_compromise)s, %(paused)s, %(version)s, %(mac)s, %(look_at)s,
        %(user_version)s, %(request_id)s, %(peer)s
    ) AS is_set
"""
CLEAR: Final = """
    SELECT cryptography.clear_rotation_policy(%(name)s, %(user_version)s, %(request_id)s, %(peer)s)
"""
PAGE_MAX: Final = 100
# As text: a moment without end, which an owner of the database may write, is none in Python.
TO_LOOK_AT: Final = f"SELECT {_COLUMNS}, look_at::text AS seen_look_at FROM cryptography.policies_to_look_at(%(limit)s)"
WALKED_MAX: Final = 1_000
REACHED: Final = """
    SELECT (policy).user_id, (policy).key_name, (policy).every_seconds, (policy).before_expiry_seconds, (policy).at_usage_percent,
        (policy).on_compromise, (policy).is_paused, (policy).version, (policy).policy_mac, (policy).requests,
        (policy).look_at::text AS seen_look_at, is_reached, place
    FROM cryptography.policies_reached(%(after_user)s, %(after_name)s, %(limit)s)
"""
LOOK_LATER: Final = """
    SELECT cryptography.look_at_policy_later(
        %(owner)s, %(name)s, %(seen_version)s, %(seen_look_at)s::timestamptz, %(look_at)s, %(is_failure)s
    )
"""
REQUEST_DUE: Final = """
    SELECT cryptography.request_due_rotation(
        %(rotation)s, %(owner)s, %(name)s, %(seen_version)s, %(seen_look_at)s::timestamptz, %(key)s, %(reason)s,
        %(allows_compromised)s, %(moment)s, %(mac)s, %(wait_seconds)s
    ) AS id
"""
_SECOND: Final = timedelta(seconds=1)
_FIRST_USER: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class StoredPolicies:
    """`Policies` in PostgreSQL."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None

    async def find(self, owner: UserId, name: KeyName) -> RotationPolicy | None:
        """See `Policies.find`."""
        rows = await self.pool.fetch(as_user(owner), FIND, {"owner": owner, "name": str(name)})
        if not rows:
            return None
        if rows[0]["user_id"] != owner or rows[0]["key_name"] != str(name):
            raise record_invalid()
        return await self.proven(StoredPolicy(owner, name, rows[0]))

    async def version(self, owner: UserId, name: KeyName) -> int | None:
        """See `Policies.version`."""
        rows = await self.pool.fetch(as_user(owner), FIND, {"owner": owner, "name": str(name)})
        return _number(rows[0]["version"]) if rows else None

    async def set(self, call: Call, policy: RotationPolicy, look_at: datetime | None) -> bool:
        """See `Policies.set`."""
        triggers = policy.triggers
        parameters = {
            "name": str(policy.name),
            "every": _seconds(triggers.every),
            "before_expiry": _seconds(triggers.before_expiry),
            "at_usage": triggers.at_usage_percent,
            "on_compromise": triggers.on_compromise,
            "paused": policy.is_paused,
            "version": policy.version,
            "mac": await self.records.mac(policy.authenticated_bytes()),
            "look_at": look_at,
        }
        refusals: Refusals = {pg.NoDataFound: key_not_found}
        rows = await self.pool.fetch(as_user(call.user.user_id), SET, {**parameters, **_of(call)}, refusals=refusals)
        return rows[0]["is_set"] is True

    async def clear(self, call: Call, name: KeyName) -> None:
        """See `Policies.clear`."""
        await self.pool.fetch(as_user(call.user.user_id), CLEAR, {"name": str(name), **_of(call)})

    async def to_look_at(self) -> AsyncIterator[StoredPolicy]:
        """See `Policies.to_look_at`."""
        while rows := await self.pool.fetch(AS_JOB, TO_LOOK_AT, {"limit": PAGE_MAX}):
            for row in rows:
                yield _stored(row)
            if len(rows) < PAGE_MAX:
                break
        after_user, after_name = _FIRST_USER, ""
        while True:
            parameters = {"after_user": after_user, "after_name": after_name, "limit": WALKED_MAX}
            rows = await self.pool.fetch(AS_JOB, REACHED, parameters)
            for row in rows:
                if row["is_reached"]:
                    yield _stored(row)
            if not rows or rows[-1]["place"] != WALKED_MAX:
                break
            after_user, after_name = rows[-1]["user_id"], rows[-1]["key_name"]

    async def proven(self, stored: StoredPolicy) -> RotationPolicy:
        """See `Policies.proven`."""
        row = stored.row
        policy = RotationPolicy(
            owner_id=stored.owner_id,
            name=stored.name,
            triggers=Triggers(
                every=_span(row["every_seconds"]),
                before_expiry=_span(row["before_expiry_seconds"]),
                at_usage_percent=None if row["at_usage_percent"] is None else _number(row["at_usage_percent"]),
                on_compromise=row["on_compromise"] is True,
            ),
            is_paused=row["is_paused"] is True,
            version=_number(row["version"]),
        )
        await self.records.prove(policy.authenticated_bytes(), row["policy_mac"], None)
        return policy

    async def key(self, policy: RotationPolicy) -> tuple[KeyRecord, datetime] | None:
        """See `Policies.key`."""
        key = await ProvenKeys(self.pool, self.records, self.knowledge).find(policy.owner_id, policy.name)
        return None if key is None else (key.record, key.read_at)

    async def look_later(self, stored: StoredPolicy, look_at: datetime | None, *, is_failure: bool = False) -> None:
        """See `Policies.look_later`."""
        parameters = {**_seen(stored), "look_at": look_at, "is_failure": is_failure}
        await self.pool.fetch(AS_JOB, LOOK_LATER, parameters)

    async def request(self, request: RotationRequest, stored: StoredPolicy, wait_seconds: float) -> bool:
        """See `Policies.request`."""
        parameters = {
            **_seen(stored),
            "rotation": request.rotation_id,
            "owner": request.owner_id,
            "key": request.key_id,
            "reason": request.reason,
            "allows_compromised": request.allows_compromised,
            "moment": request.created_at,
            "mac": await self.records.mac(request.authenticated_bytes()),
            "wait_seconds": wait_seconds,
        }
        rotation_id: UUID | None = (await self.pool.fetch(AS_JOB, REQUEST_DUE, parameters))[0]["id"]
        return rotation_id == request.rotation_id


def _stored(row: DictRow) -> StoredPolicy:
    owner, name = row["user_id"], row["key_name"]
    if not isinstance(owner, UUID) or not isinstance(name, str):
        raise record_invalid()
    return StoredPolicy(UserId(owner), KeyName(name), row)


def _seen(stored: StoredPolicy) -> dict[str, Any]:
    """Return what tells the database which policy a worker has read, and when it was to be looked at."""
    row = stored.row
    return {
        "owner": stored.owner_id,
        "name": str(stored.name),
        "seen_version": row["version"],
        "seen_look_at": row["seen_look_at"],
    }


def _of(call: Call) -> dict[str, Any]:
    return {"user_version": call.user.version, "request_id": call.request_id, "peer": call.peer}


def _seconds(span: timedelta | None) -> int | None:
    return None if span is None else span // _SECOND


def _span(seconds: object) -> timedelta | None:
    if seconds is None:
        return None
    try:
        return timedelta(seconds=_number(seconds))
    except OverflowError:
        raise record_invalid() from None


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise record_invalid()
    return value
