"""A RESIDENT key and its row: stored together, removed together, and both kept where nobody knows whether the row is stored."""

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest

from kms.app.keyring import Keyring, KeyWish
from kms.app.ports import Call, KeyPage, Keys, NewKey, Repeat, User
from kms.app.residents import Reconciliation
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, KeyFilter, KeyRecord, UsableKey
from kms.domain.residents import Finding, Holdings
from kms.hsm.uninterrupted import uninterrupted
from kms.store.keys import StoredKeys
from kms.store.pool import Pool
from kms.store.resident_rows import StoredResidentRows
from kms.store.users import StoredUsers
from tests.fakes.hsm import FakeHsm
from tests.store.records import RECORDS

WISH = KeyWish(KeyName("k"), key_spec(KeyType.AES, Purpose.ENCRYPTION, None), Custody.RESIDENT, {})


@dataclass(frozen=True, slots=True)
class Troubled:
    """`Keys` whose rows are stored, and whose callers are interrupted or told otherwise.

    `blind`: no name is found to be taken. `stored` and `go_on`: an insertion is done, and waits. `lost`: its answer is lost.
    """

    keys: StoredKeys
    blind: bool = False
    lost: bool = False
    stored: asyncio.Event | None = None
    go_on: asyncio.Event | None = None

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        record = await self.keys.insert(caller, key, call=call, repeat=repeat)
        if self.stored is not None and self.go_on is not None:
            self.stored.set()
            await self.go_on.wait()
        if self.lost:
            raise KmsError(Reason.STORE_UNAVAILABLE, "the database does not answer")
        return record

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        return None if self.blind else await self.keys.find(caller, ref, recent=recent)

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        return await self.keys.find_usable(caller, ref, recent=recent)

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        return 0

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        return await self.keys.page(caller, which, after=after, limit=limit)


@pytest.fixture
async def call(store: Pool) -> Call:
    return Call(User(await StoredUsers(store).create_service("alice"), "alice", 1), "r", "127.0.0.1")


def reconciliation(token: FakeHsm, store: Pool, *, hours_later: float) -> Reconciliation:
    later = timedelta(hours=hours_later)
    return Reconciliation(
        token, StoredResidentRows(store, StoredKeys(store, RECORDS)), token.opens, lambda: datetime.now(UTC) + later
    )


def keyring(keys: Keys, token: FakeHsm) -> Keyring:
    return Keyring(keys, token, uninterrupted)


async def test_a_stored_key_has_no_mark(store: Pool, call: Call) -> None:
    token = FakeHsm()
    record = await keyring(StoredKeys(store, RECORDS), token).create(call, WISH)
    assert await token.holdings() == Holdings({record.identity.key_id: ""}, {})


async def test_a_key_whose_row_is_refused_is_removed(store: Pool, call: Call) -> None:
    token = FakeHsm()
    first = await keyring(StoredKeys(store, RECORDS), token).create(call, WISH)
    with pytest.raises(KmsError) as caught:
        await keyring(Troubled(StoredKeys(store, RECORDS), blind=True), token).create(call, WISH)
    assert caught.value.reason is Reason.NAME_TAKEN
    assert await token.holdings() == Holdings({first.identity.key_id: ""}, {})


async def test_a_key_whose_row_may_be_stored_stays_with_its_mark(store: Pool, call: Call) -> None:
    token = FakeHsm()
    with pytest.raises(KmsError) as caught:
        await keyring(Troubled(StoredKeys(store, RECORDS), lost=True), token).create(call, WISH)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    record = await StoredKeys(store, RECORDS).find(call.user.user_id, WISH.name)
    assert record is not None
    key_id = record.identity.key_id
    assert (await token.holdings()).marks.keys() == {key_id}
    # However old the mark is: the row decides.
    assert await reconciliation(token, store, hours_later=100).run() == {key_id: Finding.STORED_WITH_MARK}
    assert await token.holdings() == Holdings({key_id: ""}, {})


async def test_a_cancelled_caller_waits_until_token_and_row_agree(store: Pool, call: Call) -> None:
    token, keys = FakeHsm(), Troubled(StoredKeys(store, RECORDS), stored=asyncio.Event(), go_on=asyncio.Event())
    assert keys.stored is not None
    assert keys.go_on is not None
    creating = asyncio.create_task(keyring(keys, token).create(call, WISH))
    await keys.stored.wait()
    for _ in range(3):
        creating.cancel()
        await asyncio.sleep(0)
    assert not creating.done()
    keys.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert len((await token.holdings()).objects) == 1
    assert (await token.holdings()).marks == {}


async def test_a_key_that_keeps_its_mark_is_not_answered(store: Pool, call: Call) -> None:
    # Whoever deletes its row would else have a key removed from the token that its owner relies on.
    token, keys = FakeHsm(), Troubled(StoredKeys(store, RECORDS), stored=asyncio.Event(), go_on=asyncio.Event())
    assert keys.stored is not None
    assert keys.go_on is not None
    creating = asyncio.create_task(keyring(keys, token).create(call, WISH))
    await keys.stored.wait()
    token.away.append(True)
    keys.go_on.set()
    with pytest.raises(KmsError) as caught:
        await creating
    assert caught.value.reason is Reason.OUTCOME_UNKNOWN
    token.away.clear()
    found = await reconciliation(token, store, hours_later=0).run()
    assert list(found.values()) == [Finding.STORED_WITH_MARK]
    assert (await token.holdings()).marks == {}


async def test_a_key_without_a_row_is_removed_after_an_hour_and_not_before(store: Pool, call: Call) -> None:
    token = FakeHsm()
    identity = (await keyring(StoredKeys(store, RECORDS), token).create(call, WISH)).identity
    left = replace(identity, key_id=KeyId(call.user.user_id))
    await token.generate(left, Custody.RESIDENT)
    found = await reconciliation(token, store, hours_later=0.9).run()
    assert found == {left.key_id: Finding.PENDING, identity.key_id: Finding.STORED}
    assert left.key_id in (await token.holdings()).objects
    found = await reconciliation(token, store, hours_later=1.1).run()
    assert found == {left.key_id: Finding.ORPHAN, identity.key_id: Finding.STORED}
    assert await token.holdings() == Holdings({identity.key_id: ""}, {})


async def test_the_envelope_of_another_key_proves_no_row(store: Pool, call: Call) -> None:
    token, other = FakeHsm(), FakeHsm()
    record = await keyring(StoredKeys(store, RECORDS), other).create(call, WISH)  # its envelope is not of this token
    await token.generate(record.identity, Custody.RESIDENT)
    before = await token.holdings()
    assert await reconciliation(token, store, hours_later=100).run() == {record.identity.key_id: Finding.ROW_UNPROVEN}
    assert await token.holdings() == before
    with pytest.raises(KmsError) as caught:
        await reconciliation(token, store, hours_later=100).remove(record.identity.key_id)
    assert caught.value.reason is Reason.WRONG_PURPOSE
    assert await token.holdings() == before
