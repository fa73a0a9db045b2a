"""Rotations in `cryptography.key_rotations`, and the switch of a key to its successor."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString
from uuid import UUID

from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.keyring import key_not_found
from kms.app.ports import Call, Repeat, User
from kms.app.records import Records
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.key_row import AUTHENTICATED, record_invalid
from kms.domain.keys import KeyMaterial, KeyRecord
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease
from kms.rotation.dependents import DEPENDENTS, Dependent, Handover
from kms.rotation.ports import OldKey
from kms.rotation.rotation import (
    Rotation,
    RotationFilter,
    RotationPlace,
    RotationRequest,
    RotationStatus,
    check_rotatable,
    check_still_wanted,
    is_successor,
    predecessor_name,
    rotates_any,
    rotation_not_found,
    successor,
    superseded,
)
from kms.store.errors import Refusals
from kms.store.journal import Journal, superseded_line
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.journaled import write_line
from kms.store.keys import FIND_BY_ID, PREDECESSORS, keep_answer
from kms.store.pool import AS_JOB, Pool, as_user
from kms.store.proven_keys import ProvenKeys

_COLUMNS: Final = """id, user_id, old_key_id, new_key_id, rotation_reason, initiated_by, allows_compromised, migration_status,
    affected_records_count, error_message, created_at, completed_at, attempts"""
NOW: Final = "SELECT clock_timestamp() AS now"
REQUEST: Final = """
    SELECT cryptography.request_rotation(
        %(rotation)s, %(key)s, %(reason)s, %(allows_compromised)s, %(moment)s, %(mac)s, %(user_version)s, %(request_id)s, %(peer)s
    ) AS id
"""
RETRY: Final = "SELECT cryptography.retry_rotation(%(rotation)s, %(user_version)s, %(request_id)s, %(peer)s) AS is_due"
OWNER: Final = "SELECT cryptography.owner_for_rotation(%(key)s) AS owner"
# Row security shows a caller the rotations of their own keys, and a rotator those of all keys.
FIND: Final = f"SELECT {_COLUMNS} FROM cryptography.key_rotations WHERE id = %(id)s"


_OWN: Final = "user_id = %(caller)s"
# Statements of their own for a status: an index leads to the place where the page begins, and the page is read and no more.
_STATUS: Final = "migration_status = %(status)s"
# The rotations of one key are few: the index of the key finds them.
_KEY: Final = "(old_key_id = %(key)s OR new_key_id = %(key)s) AND (%(status)s::text IS NULL OR migration_status = %(status)s)"


def _page(which: LiteralString) -> LiteralString:
    return f"""
    SELECT {_COLUMNS}
    FROM cryptography.key_rotations
    WHERE {which} AND (created_at, id) < (%(created_at)s::timestamptz, %(id)s::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)s
"""


PAGE: Final = _page(_OWN)
PAGE_IN_STATUS: Final = _page(f"{_OWN} AND {_STATUS}")
PAGE_OF_KEY: Final = _page(f"{_OWN} AND {_KEY}")
PAGE_OF_ALL: Final = _page("TRUE")
PAGE_OF_ALL_IN_STATUS: Final = _page(_STATUS)
PAGE_OF_ANY_KEY: Final = _page(_KEY)
SWITCH: Final = """
    SELECT cryptography.switch_key(
        %(rotation)s, %(worker)s, %(claim)s, %(version)s, %(name)s, %(mac)s, %(successor)s, %(moment)s, %(policy_version)s
    ) AS verdict
"""
# How far ahead we date a switch. SQL takes the key's lock before that moment, so every use of the key has an earlier date. It
# holds the lock until then: at most half of the second for which a batch of uses waits for it, or uses would fail.
_MARGINS: Final = tuple(timedelta(milliseconds=milliseconds) for milliseconds in (20, 100, 500, 500, 500))


@dataclass(frozen=True, slots=True)
class StoredRotations:
    """`Rotations` in PostgreSQL. No row decides what is rotated: the request and the key are proven by their MACs."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None
    journal: Journal | None = None
    dependents: Sequence[Dependent] = DEPENDENTS

    @property
    def kinds(self) -> Sequence[str]:
        """See `Rotations.kinds`."""
        return [dependent.name for dependent in self.dependents]

    async def now(self) -> datetime:
        """See `Rotations.now`."""
        moment: datetime = (await self.pool.fetch(AS_JOB, NOW))[0]["now"]
        return moment

    async def request(self, call: Call, request: RotationRequest, repeat_of: Callable[[UUID], Repeat] | None) -> UUID:
        """See `Rotations.request`."""
        parameters = {
            "rotation": request.rotation_id,
            "key": request.key_id,
            "reason": request.reason,
            "allows_compromised": request.allows_compromised,
            "moment": request.created_at,
            "mac": await self.records.mac(request.authenticated_bytes()),
            "user_version": call.user.version,
            "request_id": call.request_id,
            "peer": call.peer,
        }
        async with self.pool.transaction(as_user(call.user.user_id)) as connection:
            try:
                row = await (await connection.execute(REQUEST, parameters)).fetchone()
            except pg.NoDataFound:
                raise key_not_found() from None
            if row is None or not isinstance(row["id"], UUID):
                raise record_invalid(request.key_id)
            if repeat_of is not None:
                await keep_answer(connection, repeat_of(row["id"]))
        rotation_id: UUID = row["id"]
        return rotation_id

    async def owner_of(self, caller: User, key_id: KeyId) -> UserId | None:
        """See `Rotations.owner_of`."""
        owner = (await self.pool.fetch(as_user(caller.user_id), OWNER, {"key": key_id}))[0]["owner"]
        return None if owner is None else UserId(_uuid(owner))

    async def retry(self, call: Call, rotation_id: UUID) -> bool:
        """See `Rotations.retry`."""
        parameters = {
            "rotation": rotation_id,
            "user_version": call.user.version,
            "request_id": call.request_id,
            "peer": call.peer,
        }
        refusals: Refusals = {pg.NoDataFound: rotation_not_found}
        rows = await self.pool.fetch(as_user(call.user.user_id), RETRY, parameters, refusals=refusals)
        return rows[0]["is_due"] is True

    async def find(self, caller: User, rotation_id: UUID) -> Rotation | None:
        """See `Rotations.find`."""
        rows = await self.pool.fetch(as_user(caller.user_id), FIND, {"id": rotation_id})
        return _rotation(rows[0], caller) if rows and rows[0]["id"] == rotation_id else None

    async def page(self, caller: User, which: RotationFilter, *, after: RotationPlace | None, limit: int) -> Sequence[Rotation]:
        """See `Rotations.page`."""
        parameters = {
            "caller": caller.user_id,
            "created_at": "infinity" if after is None else after.created_at,
            "id": None if after is None else after.rotation_id,
            "status": None if which.status is None else str(which.status),
            "key": which.key_id,
            "limit": limit,
        }
        query = _query(which, is_of_all=rotates_any(caller))
        return [_rotation(row, caller) for row in await self.pool.fetch(as_user(caller.user_id), query, parameters)]

    async def proven_request(self, lease: Lease) -> RotationRequest:
        """See `Rotations.proven_request`."""
        row = lease.claim.item
        request = RotationRequest(
            rotation_id=lease.claim.item_id,
            owner_id=UserId(_uuid(row["user_id"])),
            key_id=KeyId(_uuid(row["old_key_id"])),
            reason=str(row["rotation_reason"]),
            initiated_by=None if row["initiated_by"] is None else UserId(_uuid(row["initiated_by"])),
            allows_compromised=row["allows_compromised"] is True,
            created_at=_moment(row["created_at"]),
        )
        await self.records.prove(request.authenticated_bytes(), row["request_mac"], request.key_id)
        return request

    async def old_key(self, request: RotationRequest) -> OldKey:
        """See `Rotations.old_key`."""
        owner = request.owner_id
        key = await self._keys.find(owner, request.key_id)
        if key is None:
            raise key_not_found()
        record = key.record
        check_rotatable(record, allow_compromised=request.allows_compromised, by=request.initiated_by)
        check_still_wanted(record, request.created_at, self.records.judged_at(key.read_at))
        counted = await self.pool.fetch(as_user(owner), PREDECESSORS, {"caller": owner, "name": str(record.name)})
        return OldKey(record.identity, key.row, int(counted[0]["predecessors"]))

    async def switch(self, lease: Lease, old: OldKey, key_id: KeyId, material: KeyMaterial, policy_version: int | None) -> None:
        """See `Rotations.switch`."""
        for margin in _MARGINS:
            verdict = await self._switch(lease, old, key_id, material, policy_version, margin)
            match verdict:
                case "OK":
                    return
                case "BUSY":
                    continue
                case "STALE":
                    raise KmsError(Reason.STALE, "the key, or the policy that asked, was changed meanwhile")
                case "LEASE_LOST":
                    raise LeaseLostError
                case _:
                    raise record_invalid(key_id)
        raise KmsError(Reason.STALE, "the key is in use all the time: nothing was changed")

    async def _switch(
        self, lease: Lease, old: OldKey, key_id: KeyId, material: KeyMaterial, policy_version: int | None, margin: timedelta
    ) -> object:
        moment = await self.now() + margin
        before: dict[str, Any] = {column: old.row[column] for column in AUTHENTICATED}
        name = predecessor_name(KeyName(before["key_name"]), old.predecessors)
        new = successor(before, key_id, material, moment)
        columns = {
            **{column: _json(value) for column, value in new.items()},
            "encrypted_private_key": material.envelope,
            "record_mac": "\\x" + (await self.records.mac_of_key(new)).hex(),
        }
        parameters = {
            "rotation": lease.claim.item_id,
            "worker": lease.worker,
            "claim": lease.claim.number,
            "version": before["version"],
            "name": name,
            "mac": await self.records.mac_of_key(superseded(before, name, moment)),
            "successor": Jsonb(columns),
            "moment": moment,
            "policy_version": policy_version,
        }
        try:
            rows = await self.pool.fetch(AS_JOB, SWITCH, parameters)
        except KmsError as error:
            if error.reason is not Reason.NAME_TAKEN:
                raise
            raise KmsError(Reason.STALE, "another key has the name of the predecessor meanwhile") from None
        return rows[0]["verdict"]

    async def proven_successor(self, owner: UserId, old_id: KeyId, key_id: KeyId) -> KeyRecord:
        """See `Rotations.proven_successor`."""
        found, predecessor = await self._keys.find(owner, key_id), await self._keys.find(owner, old_id)
        if found is None or predecessor is None or not is_successor(found.record, predecessor.record):
            raise record_invalid(old_id)
        key, old = found.record, predecessor.record
        if self.journal is not None and not (self.knowledge is not None and self.knowledge.knows(old_id, old.version)):
            # From here on no earlier row of the predecessor is believed, and no restore makes it active.
            await write_line(self.journal, superseded_line(old_id, old.version, key_id, occurred_at=self.records.clock()))
        return key

    async def has_key(self, owner: UserId, key_id: KeyId) -> bool:
        """See `Rotations.has_key`."""
        return bool(await self.pool.fetch(as_user(owner), FIND_BY_ID, {"caller": owner, "ref": key_id}))

    async def take_along(self, kind: str, lease: Lease, request: RotationRequest, key_id: KeyId) -> int:
        """See `Rotations.take_along`."""
        handover = Handover(lease, request.owner_id, request.key_id, key_id)
        [dependent] = (each for each in self.dependents if each.name == kind)
        return await dependent.take_along(self._keys, handover)

    @property
    def _keys(self) -> ProvenKeys:
        return ProvenKeys(self.pool, self.records, self.knowledge)


def _query(which: RotationFilter, *, is_of_all: bool) -> LiteralString:
    if which.key_id is not None:
        return PAGE_OF_ANY_KEY if is_of_all else PAGE_OF_KEY
    if which.status is not None:
        return PAGE_OF_ALL_IN_STATUS if is_of_all else PAGE_IN_STATUS
    return PAGE_OF_ALL if is_of_all else PAGE


def _rotation(row: DictRow, caller: User) -> Rotation:
    """Return the rotation in a row. Raises RECORD_INVALID for what no row of ours has, or none that *caller* may see."""
    numbers, moments = (
        (row["affected_records_count"], row["attempts"]),
        (row["created_at"], row["completed_at"] or row["created_at"]),
    )
    is_ours = (
        (row["user_id"] == caller.user_id or rotates_any(caller))
        and row["migration_status"] in set(RotationStatus)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(isinstance(moment, datetime) for moment in moments)
    )
    if not is_ours:
        raise record_invalid()
    return Rotation(
        rotation_id=row["id"],
        owner_id=UserId(row["user_id"]),
        old_key_id=KeyId(row["old_key_id"]),
        new_key_id=None if row["new_key_id"] is None else KeyId(row["new_key_id"]),
        reason=row["rotation_reason"],
        initiated_by=None if row["initiated_by"] is None else UserId(row["initiated_by"]),
        allows_compromised=row["allows_compromised"] is True,
        status=RotationStatus(row["migration_status"]),
        affected_records_count=row["affected_records_count"],
        error_message=row["error_message"] or "",
        created_at=row["created_at"],
        completed_at=row["completed_at"],
        attempts=row["attempts"],
    )


def _json(value: object) -> object:
    """Return a value of a row as JSON has it, to the microsecond."""
    match value:
        case datetime():
            return value.isoformat()
        case UUID():
            return str(value)
        case _:
            return value


def _uuid(value: object) -> UUID:
    if not isinstance(value, UUID):
        raise record_invalid()
    return value


def _moment(value: object) -> datetime:
    if not isinstance(value, datetime):
        raise record_invalid()
    return value
