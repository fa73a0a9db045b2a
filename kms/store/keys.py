"""The port `Keys`: stored keys, as the calling user sees them."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString
from uuid import UUID

from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.ports import Call, KeyPage, NewKey, Repeat
from kms.app.records import Records
from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.key_row import AUTHENTICATED, record_invalid, state_of
from kms.domain.keys import Custody, HeldKey, KeyFilter, KeyIdentity, KeyMaterial, KeyRecord, Origin, UsableKey
from kms.domain.lifecycle import State
from kms.store.pool import Pool, as_user

_STATE: Final = """cryptography.effective_status(
        key_status, activated_at, deactivated_at, superseded_at, expires_at, destruction_scheduled_at, destroyed_at,
        clock_timestamp(), usage_counter >= cryptography.usage_limit(key_type, max_usage_count)
    )"""
# All that a reader sees, and what proves it. The state is not asked of the database: it follows from these and the clock.
COLUMNS: Final[LiteralString] = ", ".join((*AUTHENTICATED, "usage_counter", "last_used_at", "record_mac"))
_RECORD: Final = f"{COLUMNS}, clock_timestamp() AS now"

FIND_BY_ID: Final = f"SELECT {_RECORD} FROM cryptography.keys WHERE user_id = %(caller)s AND id = %(ref)s"
FIND_BY_NAME: Final = f"SELECT {_RECORD} FROM cryptography.keys WHERE user_id = %(caller)s AND key_name = %(ref)s"
FIND_USABLE_BY_ID: Final = f"""
    SELECT {_RECORD}, encrypted_private_key FROM cryptography.keys WHERE user_id = %(caller)s AND id = %(ref)s
"""
FIND_USABLE_BY_NAME: Final = f"""
    SELECT {_RECORD}, encrypted_private_key FROM cryptography.keys WHERE user_id = %(caller)s AND key_name = %(ref)s
"""
INSERT: Final = f"""
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, key_curve, key_strength, bound_to, origin, custody, public_key,
        encrypted_private_key, hsm_key_id, metadata, max_usage_count, created_at, activated_at, expires_at, key_status, record_mac
    ) VALUES (
        %(id)s, %(user_id)s, %(key_name)s, %(key_type)s, %(key_purpose)s, %(key_curve)s, %(key_strength)s, %(bound_to)s,
        %(origin)s, %(custody)s, %(public_key)s, %(encrypted_private_key)s, %(hsm_key_id)s, %(metadata)s, %(max_usage_count)s,
        %(created_at)s, %(activated_at)s, %(expires_at)s, %(key_status)s, %(record_mac)s
    )
    RETURNING {_RECORD}
"""
# What the trigger that writes the trail says of the call.
FOR_CALL: Final = "SELECT set_config('app.request_id', %(request_id)s, true), set_config('app.peer', %(peer)s, true)"
NOW: Final = "SELECT clock_timestamp() AS now"
KEEP_ANSWER: Final = "SELECT cryptography.keep_answer(%(rpc)s, %(request_id)s, %(body_mac)s, %(result)s) AS is_kept"
# '@' is behind every character of a name that it may follow and before 'A', so this is a range of the index.
PREDECESSORS: Final = """
    SELECT count(*) AS predecessors FROM cryptography.keys
    WHERE user_id = %(caller)s AND key_name > %(name)s || '@' AND key_name < %(name)s || 'A'
"""
WALKED_MAX: Final = 1_000
# One call looks at so many keys, or a filter that few fit would take it through all of them: the last of them tells where to
# go on, whether it fits or not. Names are ASCII and compared byte by byte: DEL is behind every character of a name, so the
# prefix is a range of the index.
_WALK: Final = f"""
        SELECT {_RECORD}, {_STATE} AS state
        FROM cryptography.keys
        WHERE user_id = %(caller)s AND key_name > %(after)s
            AND key_name >= %(prefix)s AND key_name < %(prefix)s || chr(127)
"""
_IN_ORDER: Final = "ORDER BY key_name LIMIT %(walked_max)s"
_FITTING: Final = """
    CROSS JOIN LATERAL (
        SELECT (%(type)s::text IS NULL OR key_type = %(type)s)
            AND (%(purpose)s::text IS NULL OR key_purpose = %(purpose)s)
            AND (%(state)s::text IS NULL OR state = %(state)s)
    ) AS judged (fits)
    WHERE fits OR place = %(walked_max)s
    ORDER BY key_name
    LIMIT %(rows_max)s
"""
_NUMBERED: Final = f"SELECT {COLUMNS}, now, state, row_number() OVER (ORDER BY key_name) AS place"
PAGE: Final = f"""
    SELECT {COLUMNS}, now, fits, place
    FROM ({_NUMBERED} FROM ({_WALK} {_IN_ORDER}) AS walk) AS walked {_FITTING}
"""
# A lineage is two ranges of the index: names such as `k-2` stand between `k` and `k@1`.
PAGE_OF_LINEAGE: Final = f"""
    SELECT {COLUMNS}, now, fits, place
    FROM (
        {_NUMBERED}
        FROM (
            ({_WALK} AND key_name = %(lineage)s)
            UNION ALL
            ({_WALK} AND key_name > %(lineage)s || '@' AND key_name < %(lineage)s || 'A' {_IN_ORDER})
            {_IN_ORDER}
        ) AS walk
    ) AS walked {_FITTING}
"""


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """`Keys` in `cryptography.keys`. Nothing is remembered here: *recent* makes no difference.

    No answer of the database says who owns a key or which it is: each row is held against what was asked for, and is proven.
    """

    pool: Pool
    records: Records

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        """Store a key: see `Keys.insert`."""
        # Before a connection is held: the token may be slow.
        row = _new_row(caller, key, (await self.pool.fetch(as_user(caller), NOW))[0]["now"])
        parameters = {
            **row,
            "metadata": Jsonb(row["metadata"]),
            "encrypted_private_key": key.material.envelope,
            "record_mac": await self.records.mac_of_key(row),
        }
        async with self.pool.transaction(as_user(caller)) as connection:
            if call is not None:
                await connection.execute(FOR_CALL, {"request_id": call.request_id, "peer": call.peer})
            try:
                stored = await (await connection.execute(INSERT, parameters)).fetchone()
            except pg.CheckViolation as error:
                if error.diag.constraint_name != "key_expiration_logic":
                    raise
                raise malformed("expires_at", "expected a moment ahead") from None
            assert stored is not None  # noqa: S101  # INSERT … RETURNING gives a row or raises
            record = await self._proven(stored, caller, key.identity.key_id)
            if repeat is not None:
                await keep_answer(connection, repeat)
        return record

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key, or None where the caller has none by that id or name."""
        query = FIND_BY_ID if isinstance(ref, UUID) else FIND_BY_NAME
        rows = await self.pool.fetch(as_user(caller), query, {"caller": caller, "ref": ref})
        return await self._proven(rows[0], caller, ref) if rows else None

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope, or None. A destroyed key is found by `find` only."""
        query = FIND_USABLE_BY_ID if isinstance(ref, UUID) else FIND_USABLE_BY_NAME
        rows = await self.pool.fetch(as_user(caller), query, {"caller": caller, "ref": ref})
        if not rows:
            return None
        record = await self._proven(rows[0], caller, ref)
        if record.state is State.DESTROYED:
            return None
        material = KeyMaterial(record.custody, record.public_key, rows[0]["encrypted_private_key"], record.hsm_key_id)
        return UsableKey(record, HeldKey(record.identity, material, record.version))

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        """See `Keys.predecessors`."""
        rows = await self.pool.fetch(as_user(caller), PREDECESSORS, {"caller": caller, "name": str(name)})
        return int(rows[0]["predecessors"])

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return those of the next 1,000 keys after the name *after* that fit, at most *limit*, in the order of their names."""
        parameters = {
            "caller": caller,
            "after": after,
            "prefix": which.name_prefix or "",
            "lineage": which.lineage,
            "type": which.key_type,
            "purpose": which.purpose,
            "state": which.status,
            "walked_max": WALKED_MAX,
            "rows_max": limit + 1,
        }
        query = PAGE if which.lineage is None else PAGE_OF_LINEAGE
        rows = await self.pool.fetch(as_user(caller), query, parameters)
        fitting = [row for row in rows if row["fits"]]
        found, invalid = await self._listed(caller, fitting[:limit])
        if len(fitting) > limit:
            return KeyPage(found, KeyName(fitting[limit - 1]["key_name"]), invalid)
        is_cut = bool(rows) and rows[-1]["place"] == WALKED_MAX
        return KeyPage(found, KeyName(rows[-1]["key_name"]) if is_cut else None, invalid)

    async def _listed(self, caller: UserId, rows: Sequence[DictRow]) -> tuple[list[KeyRecord], tuple[KeyId, ...]]:
        """Return the keys in *rows*, and the ids of those that are not as the service left them."""
        found, invalid = list[KeyRecord](), list[KeyId]()
        for row in rows:
            try:
                found.append(await self._proven(row, caller, KeyId(row["id"])))
            except KmsError as error:
                if error.reason is not Reason.RECORD_INVALID:
                    raise
                invalid.append(KeyId(row["id"]))
        return found, tuple(invalid)

    async def _proven(self, row: DictRow, caller: UserId, ref: KeyRef) -> KeyRecord:
        """Return the key in *row*, or raise RECORD_INVALID unless it is the one that *caller* asked for, as we left it."""
        if row["user_id"] != caller or row["id" if isinstance(ref, UUID) else "key_name"] != ref:
            raise record_invalid()
        await self.records.prove_key(row)
        return key_record(row, self.records.judged_at(row["now"]))


async def keep_answer(connection: AsyncConnection[DictRow], repeat: Repeat) -> None:
    """Store an answer for a repeat, in the transaction of what it answers. Raises REQUEST_ID_REUSED."""
    kept = {"rpc": repeat.rpc, "request_id": repeat.request_id, "body_mac": repeat.body_mac, "result": repeat.result}
    row = await (await connection.execute(KEEP_ANSWER, kept)).fetchone()
    if row is None or not row["is_kept"]:
        raise KmsError(Reason.REQUEST_ID_REUSED, "this request_id was used before", field="request_id")


def _new_row(caller: UserId, key: NewKey, now: datetime) -> dict[str, Any]:
    """Return the row of a new key: all of it, as the database will have it."""
    identity, material = key.identity, key.material
    return {
        **dict.fromkeys(AUTHENTICATED),
        "id": identity.key_id,
        "user_id": caller,
        "key_name": str(key.name),
        "key_type": str(identity.spec.key_type),
        "key_purpose": str(identity.spec.purpose),
        "key_curve": identity.spec.curve,
        "key_strength": identity.spec.strength_bits,
        "key_status": "inactive" if key.activated_at is not None and key.activated_at > now else "active",
        "encryption_algorithm": "AES-256-GCM",
        "bound_to": identity.bound_to,
        "origin": str(identity.origin),
        "custody": str(material.custody),
        "public_key": material.public_key,
        "hsm_key_id": material.hsm_key_id,
        "metadata": dict(key.metadata),
        "max_usage_count": key.max_usage_count,
        "created_at": now,
        "activated_at": key.activated_at,
        "expires_at": key.expires_at,
        "version": 1,
    }


def key_record(row: DictRow, moment: datetime) -> KeyRecord:
    """Return the key in a row that has `COLUMNS`, which was proven, as it is at *moment*."""
    spec = KeySpec(KeyType(row["key_type"]), Purpose(row["key_purpose"]), row["key_strength"])
    identity = KeyIdentity(KeyId(row["id"]), UserId(row["user_id"]), spec, row["bound_to"], Origin(row["origin"]))
    return KeyRecord(
        identity=identity,
        name=KeyName(row["key_name"]),
        state=state_of(row, moment),
        custody=Custody(row["custody"]),
        public_key=row["public_key"],
        version=row["version"],
        usage_counter=row["usage_counter"],
        created_at=row["created_at"],
        metadata=row["metadata"],
        hsm_key_id=row["hsm_key_id"],
        max_usage_count=row["max_usage_count"],
        activated_at=row["activated_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
        deactivated_at=row["deactivated_at"],
        superseded_at=row["superseded_at"],
        compromised_at=row["compromised_at"],
        compromise_occurred_at=row["compromise_occurred_at"],
        revoked_at=row["revoked_at"],
        destruction_scheduled_at=row["destruction_scheduled_at"],
        destroyed_at=row["destroyed_at"],
    )
