"""The port `Keys`: stored keys, as the calling user sees them."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.ports import Call, KeyPage, NewKey, Repeat
from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, HeldKey, KeyFilter, KeyIdentity, KeyMaterial, KeyRecord, Origin, UsableKey
from kms.domain.lifecycle import State
from kms.store.pool import Pool, as_user

_STATE: Final = """cryptography.effective_status(
        key_status, activated_at, deactivated_at, superseded_at, expires_at, destruction_scheduled_at, destroyed_at,
        clock_timestamp()
    )"""
_STORED: Final = """id, user_id, key_name, key_type, key_purpose, key_strength, bound_to, origin, custody, public_key,
    hsm_key_id, version, usage_counter, max_usage_count, created_at, activated_at, expires_at, last_used_at, deactivated_at,
    superseded_at, compromised_at, compromise_occurred_at, revoked_at, destruction_scheduled_at, destroyed_at, metadata"""
_RECORD: Final = f"{_STORED}, {_STATE} AS state"

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
        encrypted_private_key, hsm_key_id, metadata, max_usage_count, activated_at, expires_at
    ) VALUES (
        %(id)s, %(caller)s, %(name)s, %(type)s, %(purpose)s, %(curve)s, %(strength)s, %(bound_to)s, %(origin)s, %(custody)s,
        %(public_key)s, %(envelope)s, %(hsm_key_id)s, %(metadata)s, %(max_usage_count)s, %(activated_at)s, %(expires_at)s
    )
    RETURNING {_RECORD}
"""
# What the trigger that writes the trail says of the call.
FOR_CALL: Final = "SELECT set_config('app.request_id', %(request_id)s, true), set_config('app.peer', %(peer)s, true)"
KEEP_ANSWER: Final = "SELECT cryptography.keep_answer(%(rpc)s, %(request_id)s, %(body_mac)s, %(result)s) AS is_kept"
WALKED_MAX: Final = 1_000
# One call looks at so many keys, or a filter that few fit would take it through all of them: the last of them tells where to
# go on, whether it fits or not. Names are ASCII and compared byte by byte: DEL is behind every character of a name, so the
# prefix is a range of the index.
PAGE: Final = f"""
    SELECT {_STORED}, state, fits, place
    FROM (
        SELECT {_RECORD}, row_number() OVER (ORDER BY key_name) AS place
        FROM cryptography.keys
        WHERE user_id = %(caller)s AND key_name > %(after)s
            AND key_name >= %(prefix)s AND key_name < %(prefix)s || chr(127)
        ORDER BY key_name
        LIMIT %(walked_max)s
    ) AS walked
    CROSS JOIN LATERAL (
        SELECT (%(type)s::text IS NULL OR key_type = %(type)s)
            AND (%(purpose)s::text IS NULL OR key_purpose = %(purpose)s)
            AND (%(state)s::text IS NULL OR state = %(state)s)
    ) AS judged (fits)
    WHERE fits OR place = %(walked_max)s
    ORDER BY key_name
    LIMIT %(rows_max)s
"""


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """`Keys` in `cryptography.keys`. Nothing is remembered here: *recent* makes no difference."""

    pool: Pool

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        """Store a key, and with it *repeat*; *call* goes into the trail.

        Raises NAME_TAKEN; MALFORMED for an expiry that has passed; REQUEST_ID_REUSED where something is kept under the id of
        *repeat* already.
        """
        try:
            async with self.pool.transaction(as_user(caller)) as connection:
                if call is not None:
                    await connection.execute(FOR_CALL, {"request_id": call.request_id, "peer": call.peer})
                cursor = await connection.execute(INSERT, _columns(caller, key))
                row = await cursor.fetchone()
                if repeat is not None:
                    await _keep(connection, repeat)
        except pg.CheckViolation as error:
            if error.diag.constraint_name != "key_expiration_logic":
                raise
            raise malformed("expires_at", "expected a moment ahead") from None
        assert row is not None  # noqa: S101  # INSERT … RETURNING gives a row or raises
        return key_record(row)

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key, or None where the caller has none by that id or name."""
        query = FIND_BY_ID if isinstance(ref, UUID) else FIND_BY_NAME
        rows = await self.pool.fetch(as_user(caller), query, {"caller": caller, "ref": ref})
        return key_record(rows[0]) if rows else None

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope, or None. A destroyed key is found by `find` only."""
        query = FIND_USABLE_BY_ID if isinstance(ref, UUID) else FIND_USABLE_BY_NAME
        rows = await self.pool.fetch(as_user(caller), query, {"caller": caller, "ref": ref})
        if not rows or rows[0]["state"] == State.DESTROYED:
            return None
        record = key_record(rows[0])
        material = KeyMaterial(record.custody, record.public_key, rows[0]["encrypted_private_key"], record.hsm_key_id)
        return UsableKey(record, HeldKey(record.identity, material, record.version))

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return those of the next 1,000 keys behind the name *after* that fit, at most *limit*, in the order of their names."""
        parameters = {
            "caller": caller,
            "after": after,
            "prefix": which.name_prefix or "",
            "type": which.key_type,
            "purpose": which.purpose,
            "state": which.status,
            "walked_max": WALKED_MAX,
            "rows_max": limit + 1,
        }
        rows = await self.pool.fetch(as_user(caller), PAGE, parameters)
        found = [key_record(row) for row in rows if row["fits"]]
        if len(found) > limit:
            return KeyPage(found[:limit], found[limit - 1].name)
        is_cut = bool(rows) and rows[-1]["place"] == WALKED_MAX
        return KeyPage(found, KeyName(rows[-1]["key_name"]) if is_cut else None)


async def _keep(connection: AsyncConnection[DictRow], repeat: Repeat) -> None:
    kept = {"rpc": repeat.rpc, "request_id": repeat.request_id, "body_mac": repeat.body_mac, "result": repeat.result}
    row = await (await connection.execute(KEEP_ANSWER, kept)).fetchone()
    if row is None or not row["is_kept"]:
        raise KmsError(Reason.REQUEST_ID_REUSED, "this request_id was used before", field="request_id")


def _columns(caller: UserId, key: NewKey) -> dict[str, Any]:
    identity, material = key.identity, key.material
    return {
        "id": identity.key_id,
        "caller": caller,
        "name": key.name,
        "type": identity.spec.key_type,
        "purpose": identity.spec.purpose,
        "curve": identity.spec.curve,
        "strength": identity.spec.strength_bits,
        "bound_to": identity.bound_to,
        "origin": identity.origin,
        "custody": material.custody,
        "public_key": material.public_key,
        "envelope": material.envelope,
        "hsm_key_id": material.hsm_key_id,
        "metadata": Jsonb(key.metadata),
        "max_usage_count": key.max_usage_count,
        "activated_at": key.activated_at,
        "expires_at": key.expires_at,
    }


def key_record(row: DictRow) -> KeyRecord:
    """Return the key in a row of `FIND_BY_ID` and its like."""
    spec = KeySpec(KeyType(row["key_type"]), Purpose(row["key_purpose"]), row["key_strength"])
    identity = KeyIdentity(KeyId(row["id"]), UserId(row["user_id"]), spec, row["bound_to"], Origin(row["origin"]))
    return KeyRecord(
        identity=identity,
        name=KeyName(row["key_name"]),
        state=State(row["state"]),
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
