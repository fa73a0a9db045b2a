"""Keys that a job acts on by itself: a change that comes between the read and the look at the journal makes none invalid."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from kms.app.ports import User
from kms.app.records import Records
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move
from kms.jobs.leasing import Lease
from kms.rotation.policy import RotationPolicy, Triggers
from kms.rotation.postgres import StoredRotations
from kms.rotation.rotation import RotationRequest
from kms.rotation.stored_policies import StoredPolicies
from kms.store.journal import Journal, changed_line
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.keys import FIND_BY_ID
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, as_user
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS
from tests.store.uses import a_call, make_key, make_user, rows

Find = Callable[[Pool, Records, JournalKnowledge, KeyRecord], Coroutine[Any, Any, object]]


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal")
    journal.see_epoch(1, uuid4(), at=RECORDS.clock())
    return journal


def request_of(key: KeyRecord) -> RotationRequest:
    owner = key.identity.owner_id
    return RotationRequest(uuid4(), owner, key.identity.key_id, "age", owner, False, RECORDS.clock())


async def as_old_key(pool: Pool, records: Records, knowledge: JournalKnowledge, key: KeyRecord) -> object:
    return (await StoredRotations(pool, records, knowledge).old_key(request_of(key))).row["max_usage_count"]


async def under_policy(pool: Pool, records: Records, knowledge: JournalKnowledge, key: KeyRecord) -> object:
    policy = RotationPolicy(key.identity.owner_id, key.name, Triggers(), is_paused=False, version=1)
    found = await StoredPolicies(pool, records, knowledge).key(policy)
    return found and found[0].max_usage_count


@pytest.mark.parametrize("find", [as_old_key, under_policy])
async def test_a_change_that_comes_after_the_read_is_read_too(store: Pool, alice: User, journal: Journal, find: Find) -> None:
    key, changes = await make_key(store, alice, max_usage_count=9), [8, 7]

    async def changed_meanwhile(data: bytes) -> bytes:
        """The owner lowers the limit while the MAC of the row that was read is made."""
        if changes:
            change = Change(max_usage_count=(limit := changes.pop(0)))
            after = await StoredLifecycle(store, RECORDS).move(
                a_call(alice), key.identity.key_id, Move.UPDATE, change, version=None
            )
            told = f"update : max_usage_count={limit}"
            journal.write(changed_line(key.identity.key_id, after.version, occurred_at=RECORDS.clock(), what=told))
        return await RECORDS.mac(data)

    assert await find(store, Records(changed_meanwhile, RECORDS.clock), JournalKnowledge(journal.path), key) == 7


@pytest.mark.parametrize("find", [as_old_key, under_policy])
async def test_a_row_that_stays_older_than_the_journal_is_invalid(store: Pool, alice: User, journal: Journal, find: Find) -> None:
    key = await make_key(store, alice)
    journal.write(changed_line(key.identity.key_id, 7, occurred_at=RECORDS.clock(), what="deactivate : r"))
    with pytest.raises(KmsError) as caught:
        await find(store, RECORDS, JournalKnowledge(journal.path), key)
    assert caught.value.reason is Reason.RECORD_INVALID


async def test_a_child_that_is_older_than_the_journal_gets_no_mac(
    store: Pool, database: Database, alice: User, journal: Journal
) -> None:
    parent, child = await make_key(store, alice), await make_key(store, alice)
    owner, child_id = alice.user_id, child.identity.key_id
    rows(database, "UPDATE cryptography.keys SET parent_key_id = %s WHERE id = %s", parent.identity.key_id, child_id)
    [row] = await store.fetch(as_user(owner), FIND_BY_ID, {"caller": owner, "ref": child_id})
    rows(database, "UPDATE cryptography.keys SET record_mac = %s WHERE id = %s", await RECORDS.mac_of_key(row), child_id)
    journal.write(changed_line(child_id, 7, occurred_at=RECORDS.clock(), what="deactivate : r"))
    lease = cast(Lease, SimpleNamespace(worker=uuid4(), claim=SimpleNamespace(item_id=uuid4(), number=1)))
    rotations = StoredRotations(store, RECORDS, JournalKnowledge(journal.path))
    with pytest.raises(KmsError) as caught:
        await rotations.take_along("child keys", lease, request_of(parent), parent.identity.key_id)
    assert caught.value.reason is Reason.RECORD_INVALID
