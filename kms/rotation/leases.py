"""The rotations of keys as leased work. `cryptography.key_rotations` is the log and the queue: there is no second queue."""

from typing import Final

from kms.jobs.postgres import LeaseStatements, PostgresLeases
from kms.store.pool import Pool

CLAIM: Final = """
    SELECT id, claim_number, attempts, step, step_state, user_id, old_key_id, new_key_id, rotation_reason,
        initiated_by, allows_compromised, request_mac, created_at
    FROM cryptography.claim_rotations(%(worker)s, %(items_max)s, %(lease_seconds)s, %(attempts_max)s, %(item)s)
"""
EXTEND: Final = "SELECT cryptography.extend_rotation_lease(%(item)s, %(worker)s, %(claim)s, %(lease_seconds)s) AS is_held"
FINISH_STEP: Final = """
    SELECT cryptography.finish_rotation_step(
        %(item)s, %(worker)s, %(claim)s, %(step)s, %(state)s, %(lease_seconds)s
    ) AS is_held
"""
COMPLETE: Final = """
    SELECT cryptography.complete_rotation(%(item)s, %(worker)s, %(claim)s, %(successor)s, %(affected)s) AS is_held
"""
FAIL: Final = """
    SELECT cryptography.fail_rotation(
        %(item)s, %(worker)s, %(claim)s, %(message)s, %(retry_seconds)s, %(attempts_max)s
    ) AS is_held
"""
RELEASE: Final = "SELECT cryptography.release_rotation(%(item)s, %(worker)s, %(claim)s) AS is_held"


def rotation_leases(pool: Pool) -> PostgresLeases:
    """Return the rotations as `LeasedItems`. The result of a rotation is `successor`, the id of the
    new key, and `affected`, the number of dependents."""
    return PostgresLeases(pool, LeaseStatements(CLAIM, EXTEND, FINISH_STEP, COMPLETE, FAIL, RELEASE))
