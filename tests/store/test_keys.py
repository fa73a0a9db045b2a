"""Stored keys: what goes in comes out, for its owner alone."""

import asyncio
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from kms.app.ports import KeyPage, NewKey
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyFilter, KeyIdentity, KeyMaterial
from kms.domain.lifecycle import State
from kms.store.keys import StoredKeys
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS, renew_macs

PEM = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
COPIES = b"""
    SET session_replication_role = replica;
    INSERT INTO cryptography.keys (
        user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin, key_status,
        revoked_at
    )
        SELECT user_id, 'n' || lpad(n::text, 4, '0'), key_type, key_purpose, public_key, encrypted_private_key, key_strength,
            custody, origin, CASE WHEN n IN (1000, 1999) THEN 'revoked' ELSE 'active' END,
            CASE WHEN n IN (1000, 1999) THEN now() END
        FROM cryptography.keys CROSS JOIN generate_series(1, 2499) AS n
        WHERE key_name = 'n0000'
"""


@pytest.fixture
def keys(store: Pool) -> StoredKeys:
    return StoredKeys(store, RECORDS)


@pytest.fixture
async def alice(store: Pool) -> UserId:
    return await StoredUsers(store).create_service("alice")


@pytest.fixture
async def bob(store: Pool) -> UserId:
    return await StoredUsers(store).create_service("bob")


def new_key(owner: UserId, name: str, key_type: KeyType = KeyType.SECP256R1, custody: Custody = Custody.WRAPPED) -> NewKey:
    purpose = Purpose.ENCRYPTION if key_type is KeyType.AES else Purpose.SIGNING
    public_key = "kcv:0a1b2c" if key_type is KeyType.AES else PEM
    material = KeyMaterial(custody, public_key, "ZW52ZWxvcGU=", uuid4().hex if custody is Custody.RESIDENT else None)
    identity = KeyIdentity(KeyId(uuid4()), owner, key_spec(key_type, purpose, None))
    return NewKey(identity, KeyName(name), material, {"of": name})


def as_superuser(database: Database, query: bytes) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(query)
        renew_macs(connection)


@pytest.mark.parametrize("custody", list(Custody))
async def test_what_is_stored_is_found_by_id_and_by_name(keys: StoredKeys, alice: UserId, custody: Custody) -> None:
    for key_type in KeyType:
        await check_what_is_stored(keys, alice, new_key(alice, f"team/{key_type}.key-1", key_type, custody))


async def check_what_is_stored(keys: StoredKeys, alice: UserId, key: NewKey) -> None:
    record = await keys.insert(alice, key)
    assert (record.identity, record.name, record.custody) == (key.identity, key.name, key.material.custody)
    assert (record.public_key, record.hsm_key_id) == (key.material.public_key, key.material.hsm_key_id)
    assert (record.state, record.version, record.usage_counter) == (State.ACTIVE, 1, 0)
    assert record.metadata == {"of": key.name}
    assert record.created_at.utcoffset() == timedelta(0)
    assert await keys.find(alice, key.identity.key_id) == record
    assert await keys.find(alice, key.name) == record
    for ref in (key.identity.key_id, key.name):
        usable = await keys.find_usable(alice, ref)
        assert usable is not None
        assert usable.record == record
        assert (usable.held.identity, usable.held.material, usable.held.version) == (key.identity, key.material, 1)


async def test_another_users_key_is_not_there(keys: StoredKeys, alice: UserId, bob: UserId) -> None:
    key = new_key(alice, "hers")
    await keys.insert(alice, key)
    for ref in (key.identity.key_id, key.name):
        assert await keys.find(bob, ref) is None
        assert await keys.find_usable(bob, ref) is None
    assert await keys.page(bob, KeyFilter(), after="", limit=10) == KeyPage([], None)
    assert (await keys.insert(bob, new_key(bob, "hers"))).name == "hers"


async def test_an_unknown_key_is_none(keys: StoredKeys, alice: UserId) -> None:
    assert await keys.find(alice, KeyId(uuid4())) is None
    assert await keys.find_usable(alice, KeyName("nothing")) is None


async def test_a_name_is_taken_once_however_many_try(keys: StoredKeys, alice: UserId) -> None:
    tried = [keys.insert(alice, new_key(alice, "one")) for _ in range(8)]
    outcomes = await asyncio.gather(*tried, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, KmsError)]
    assert len(refused) == 7
    assert {error.reason for error in refused} == {Reason.NAME_TAKEN}
    assert len((await keys.page(alice, KeyFilter(), after="", limit=10)).keys) == 1


async def test_a_key_cannot_be_stored_for_another_user(keys: StoredKeys, alice: UserId, bob: UserId) -> None:
    await keys.insert(alice, new_key(bob, "mine"))
    found = await keys.find(alice, KeyName("mine"))
    assert found is not None
    assert found.identity.owner_id == alice


async def test_text_that_the_database_cannot_hold_is_malformed(keys: StoredKeys, alice: UserId) -> None:
    with pytest.raises(KmsError) as caught:
        await keys.find(alice, KeyName("a\0b"))
    assert caught.value.reason is Reason.MALFORMED


async def test_pages_follow_the_names_byte_by_byte_without_gap_or_repeat(
    database: Database, keys: StoredKeys, alice: UserId
) -> None:
    names = ["B", "a", "a-", "a.", "a/", "a0", "aA", "a_", "aa", "b" * 90, "z@1", "z@10", "z@2"]
    for name in reversed(names):
        await keys.insert(alice, new_key(alice, name.replace("@", "--")))
    as_superuser(database, b"UPDATE cryptography.keys SET key_name = replace(key_name, '--', '@')")
    for size in (1, 2, 5, 13, 20):
        seen: list[str] = []
        after: str | None = ""
        while after is not None:
            page = await keys.page(alice, KeyFilter(), after=after, limit=size)
            assert 1 <= len(page.keys) <= size
            seen += [record.name for record in page.keys]
            after = page.goes_on_after
        assert seen == sorted(names)


async def test_a_page_looks_at_a_thousand_keys_and_goes_on_behind_the_last_of_them(
    database: Database, keys: StoredKeys, alice: UserId
) -> None:
    await keys.insert(alice, new_key(alice, "n0000", KeyType.AES))
    as_superuser(database, COPIES)

    async def page(after: str, limit: int, **which: Any) -> tuple[list[str], str | None]:  # noqa: ANN401
        found = await keys.page(alice, KeyFilter(**which), after=after, limit=limit)
        return [record.name for record in found.keys], found.goes_on_after

    assert await page("", 10, status="revoked") == ([], "n0999")
    assert await page("n0999", 10, status="revoked") == (["n1000", "n1999"], "n1999")
    assert await page("n0999", 2, status="revoked") == (["n1000", "n1999"], "n1999")
    assert await page("n0999", 1, status="revoked") == (["n1000"], "n1000")
    assert await page("n1999", 10, status="revoked") == ([], None)
    assert len((await page("", 200, status="active"))[0]) == 200


async def test_every_filter_restricts_and_all_together(database: Database, keys: StoredKeys, alice: UserId) -> None:
    for name, key_type in [("app/aes", KeyType.AES), ("app/k1", KeyType.SECP256K1), ("apz", KeyType.AES), ("old", KeyType.AES)]:
        await keys.insert(alice, new_key(alice, name, key_type))
    as_superuser(database, b"UPDATE cryptography.keys SET deactivated_at = now() WHERE key_name = 'old'")

    async def names(**which: Any) -> list[str]:  # noqa: ANN401
        return [record.name for record in (await keys.page(alice, KeyFilter(**which), after="", limit=10)).keys]

    assert await names(key_type="aes") == ["app/aes", "apz", "old"]
    assert await names(purpose="signing") == ["app/k1"]
    assert await names(status="inactive") == ["old"]
    assert await names(status="active") == ["app/aes", "app/k1", "apz"]
    assert await names(name_prefix="ap") == ["app/aes", "app/k1", "apz"]
    assert await names(name_prefix="app/") == ["app/aes", "app/k1"]
    assert await names(name_prefix="%") == []
    assert await names(name_prefix="a_") == []
    assert await names(key_type="aes", purpose="encryption", status="active", name_prefix="app") == ["app/aes"]


async def test_a_lineage_is_its_keys_and_no_key_with_a_name_like_theirs(
    database: Database, keys: StoredKeys, alice: UserId
) -> None:
    lineage = ["k", *sorted(f"k@{number}" for number in range(1, 13))]
    for name in ("K", "j", "k-1", "k.1", "k/1", "k1", "kA", "k_", "kk", "k1@1", *lineage):
        await keys.insert(alice, new_key(alice, name.replace("@", "_at_"), KeyType.AES))
    as_superuser(database, b"UPDATE cryptography.keys SET key_name = replace(key_name, '_at_', '@')")

    async def page(after: str, limit: int, **which: Any) -> tuple[list[str], str | None]:  # noqa: ANN401
        found = await keys.page(alice, KeyFilter(**which), after=after, limit=limit)
        return [record.name for record in found.keys], found.goes_on_after

    assert await page("", 100, lineage="k") == (lineage, None)
    assert await page("", 5, lineage="k") == (lineage[:5], lineage[4])
    assert await page(lineage[4], 100, lineage="k") == (lineage[5:], None)
    assert await page("", 100, lineage="k", name_prefix="k@1") == (["k@1", "k@10", "k@11", "k@12"], None)
    assert await page("", 100, lineage="k1") == (["k1", "k1@1"], None)
    assert await page("", 100, lineage="kA") == (["kA"], None)
    assert await page("", 100, lineage="k", key_type="rsa") == ([], None)


async def test_time_changes_the_state_without_any_job(database: Database, keys: StoredKeys, alice: UserId) -> None:
    record = await keys.insert(alice, new_key(alice, "short"))
    as_superuser(database, b"UPDATE cryptography.keys SET expires_at = created_at + interval '1 microsecond'")
    found = await keys.find(alice, record.identity.key_id)
    assert found is not None
    assert (found.state, found.version) == (State.EXPIRED, 2)


async def test_a_destroyed_key_is_found_but_has_nothing_to_use(database: Database, keys: StoredKeys, alice: UserId) -> None:
    await keys.insert(alice, new_key(alice, "due"))
    await keys.insert(alice, new_key(alice, "gone"))
    as_superuser(database, b"UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE key_name = 'due'")
    as_superuser(
        database,
        b"UPDATE cryptography.keys SET destroyed_at = now(), encrypted_private_key = '' WHERE key_name = 'gone'",
    )
    for name in ("due", "gone"):
        assert await keys.find_usable(alice, KeyName(name)) is None
        found = await keys.find(alice, KeyName(name))
        assert found is not None
        assert found.state is State.DESTROYED


async def test_moments_are_aware(keys: StoredKeys, alice: UserId) -> None:
    record = await keys.insert(alice, new_key(alice, "now"))
    assert isinstance(record.created_at, datetime)
    assert record.created_at.tzinfo is not None
