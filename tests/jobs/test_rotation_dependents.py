"""What depends on a key, as a worker counts it."""

from datetime import UTC, datetime
from typing import cast
from uuid import uuid4

from kms.app.records import Records
from kms.domain.ids import KeyId, UserId
from kms.jobs.leasing import Lease
from kms.rotation.dependents import Handover, adopt_children
from kms.store.pool import Pool
from kms.store.proven_keys import ProvenKeys
from tests.fixtures.postgres import Database
from tests.jobs.rotations import ALICE, KEY, NEW, OLD, Rotations


async def mac(_: bytes) -> bytes:
    return bytes(32)


async def test_a_child_that_was_destroyed_is_not_counted(store: Pool, database: Database) -> None:
    """An earlier attempt has adopted both children."""
    rotations = Rotations(database)
    for name in ("lives", "gone"):
        rotations.run(KEY, (uuid4(), ALICE, name))
    rotations.run("UPDATE cryptography.keys SET parent_key_id = %s WHERE key_name IN ('lives', 'gone')", (NEW,))
    rotations.run("UPDATE cryptography.keys SET destroyed_at = now(), encrypted_private_key = '' WHERE key_name = 'gone'")
    handover = Handover(cast(Lease, None), UserId(ALICE), KeyId(OLD), KeyId(NEW))  # no child is left to adopt
    keys = ProvenKeys(store, Records(mac, lambda: datetime.now(UTC)))
    assert await adopt_children(keys, handover) == 1
