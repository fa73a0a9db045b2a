"""`Envelopes` in PostgreSQL, and the slices of `cryptography.rewrapping` as leased work."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from psycopg.rows import DictRow

from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.ids import KeyId, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial, Origin
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease
from kms.jobs.postgres import LeaseStatements, PostgresLeases
from kms.rotation.rewrapping import Batch, Moved
from kms.store.pool import AS_JOB, Pool

PLAN: Final = "SELECT cryptography.plan_rewrapping(%(newest)s)"
BATCH: Final = """
    SELECT id, user_id, key_type, key_purpose, key_strength, bound_to, origin, custody, public_key, hsm_key_id, version,
        encrypted_private_key
    FROM cryptography.envelopes_to_move(%(sealing_key)s, %(slice)s, %(after)s, %(size)s)
"""
STORE: Final = """
    SELECT cryptography.store_rewrapped(
        %(item)s, %(worker)s, %(claim)s, %(keys)s::uuid[], %(before)s::text[], %(after)s::text[]
    ) AS moved
"""
CLAIM: Final = """
    SELECT id, claim_number, attempts, step, step_state, sealing_key_id, slice
    FROM cryptography.claim_rewrapping(%(worker)s, %(items_max)s, %(lease_seconds)s, %(item)s, %(leavable)s::uuid[])
"""
EXTEND: Final = "SELECT cryptography.extend_rewrapping_lease(%(item)s, %(worker)s, %(claim)s, %(lease_seconds)s) AS is_held"
FINISH_STEP: Final = """
    SELECT cryptography.finish_rewrapping_step(
        %(item)s, %(worker)s, %(claim)s, %(step)s, %(state)s, %(lease_seconds)s
    ) AS is_held
"""
COMPLETE: Final = """
    SELECT cryptography.complete_rewrapping(%(item)s, %(worker)s, %(claim)s, %(not_opened)s, %(retry_seconds)s) AS is_held
"""
FAIL: Final = """
    SELECT cryptography.fail_rewrapping(%(item)s, %(worker)s, %(claim)s, %(message)s, %(retry_seconds)s) AS is_held
"""
RELEASE: Final = "SELECT cryptography.release_rewrapping(%(item)s, %(worker)s, %(claim)s) AS is_held"


def rewrapping_leases(pool: Pool, leavable: Callable[[], Collection[UUID]]) -> PostgresLeases:
    """Return the slices as `LeasedItems`. The result of a slice is `not_opened` and `retry_seconds`.

    Only slices of the sealing keys that *leavable* returns at that moment are claimed.
    """
    statements = LeaseStatements(CLAIM, EXTEND, FINISH_STEP, COMPLETE, FAIL, RELEASE)
    return PostgresLeases(pool, statements, lambda: {"leavable": list(leavable())})


@dataclass(frozen=True, slots=True)
class StoredEnvelopes:
    """See `Envelopes`."""

    pool: Pool

    async def plan(self, newest: int) -> None:
        """See `Envelopes.plan`."""
        await self.pool.fetch(AS_JOB, PLAN, {"newest": newest})

    async def batch(self, sealing_key: UUID, part: int, after: UUID | None, size: int) -> Batch:
        """See `Envelopes.batch`."""
        parameters = {"sealing_key": sealing_key, "slice": part, "after": after, "size": size}
        rows = await self.pool.fetch(AS_JOB, BATCH, parameters)
        held = {row["id"]: _held(row) for row in rows}
        return Batch(
            keys=[key for key in held.values() if key is not None],
            unreadable=[key_id for key_id, key in held.items() if key is None],
            last=rows[-1]["id"] if rows else None,
        )

    async def store(self, lease: Lease, moved: Sequence[Moved]) -> int:
        """See `Envelopes.store`."""
        parameters = {
            "item": lease.claim.item_id,
            "worker": lease.worker,
            "claim": lease.claim.number,
            "keys": [one.key.identity.key_id for one in moved],
            "before": [one.key.material.envelope for one in moved],
            "after": [one.envelope for one in moved],
        }
        stored = (await self.pool.fetch(AS_JOB, STORE, parameters))[0]["moved"]
        if stored is None:
            raise LeaseLostError
        if not isinstance(stored, int):
            raise record_invalid()
        return stored


def _held(row: DictRow) -> HeldKey | None:
    """Return the key in a row, or None for a row that none of ours can be. That it is ours is shown by its envelope."""
    try:
        spec = KeySpec(KeyType(row["key_type"]), Purpose(row["key_purpose"]), row["key_strength"])
        identity = KeyIdentity(KeyId(row["id"]), UserId(row["user_id"]), spec, row["bound_to"], Origin(row["origin"]))
        material = KeyMaterial(Custody(row["custody"]), row["public_key"], row["encrypted_private_key"], row["hsm_key_id"])
    except ValueError:
        return None
    return HeldKey(identity, material, row["version"])
