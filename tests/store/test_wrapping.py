"""The token's keys as the database knows them."""

import asyncio
from uuid import UUID, uuid4

import psycopg
import pytest

from kms.domain.errors import KmsError, Reason
from kms.store.pool import Pool
from kms.store.wrapping import StoredWrappingKeys, TokenKey
from tests.fixtures.postgres import Database

KEK = TokenKey(UUID(int=1), "kek", 1)
SEALING = TokenKey(UUID(int=2), "sealing", 1)


@pytest.fixture
def wrapping(store: Pool) -> StoredWrappingKeys:
    return StoredWrappingKeys(store)


async def test_what_the_token_has_is_known_and_not_yet_backed_up(wrapping: StoredWrappingKeys) -> None:
    await wrapping.register([SEALING, KEK], "serial-1")
    known = await wrapping.read()
    assert [(key.key_id, key.kind, key.generation) for key in known] == [(UUID(int=1), "kek", 1), (UUID(int=2), "sealing", 1)]
    assert {(key.token_serial, key.backup_confirmed_at) for key in known} == {("serial-1", None)}


async def test_a_clone_with_another_serial_is_recorded(wrapping: StoredWrappingKeys) -> None:
    await wrapping.register([KEK], "serial-1")
    before = await wrapping.read()
    await wrapping.register([KEK], "serial-2")
    after = await wrapping.read()
    assert [key.token_serial for key in after] == ["serial-2"]
    assert [key.created_at for key in after] == [key.created_at for key in before]


async def test_another_token_is_refused_and_nothing_is_recorded(wrapping: StoredWrappingKeys) -> None:
    await wrapping.register([KEK, SEALING], "serial-1")
    with pytest.raises(KmsError, match=r"another token.*Configure the token .*\(hsm\.module, hsm\.token_label\)") as caught:
        await wrapping.register([TokenKey(uuid4(), "kek", 2), TokenKey(uuid4(), "sealing", 1)], "serial-2")
    assert caught.value.reason is Reason.HSM_KEK_MISSING
    assert [(key.kind, key.generation, key.token_serial) for key in await wrapping.read()] == [
        ("kek", 1, "serial-1"),
        ("sealing", 1, "serial-1"),
    ]


async def test_a_confirmed_backup_holds_for_the_generations_known_by_then(wrapping: StoredWrappingKeys) -> None:
    await wrapping.register([KEK, SEALING], "serial-1")
    assert await wrapping.confirm_backup() == 2
    await wrapping.register([KEK, SEALING, TokenKey(uuid4(), "kek", 2)], "serial-1")
    assert [(key.generation, key.backup_confirmed_at is not None) for key in await wrapping.read()] == [
        (1, True),
        (2, False),
        (1, True),
    ]


async def test_there_is_nothing_to_confirm_before_the_token_is_known(wrapping: StoredWrappingKeys) -> None:
    with pytest.raises(KmsError, match="kms hsm init"):
        await wrapping.confirm_backup()


async def test_keys_that_have_not_changed_are_left_alone(wrapping: StoredWrappingKeys, database: Database) -> None:
    await wrapping.register([SEALING, KEK], "serial-1")
    with psycopg.connect(database.admin_dsn) as holder:
        holder.execute("SELECT FROM cryptography.wrapping_keys FOR SHARE")
        await asyncio.wait_for(wrapping.register([SEALING, KEK], "serial-1"), 10)
