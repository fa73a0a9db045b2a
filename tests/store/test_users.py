"""Users: who may call, found before there is a caller."""

from uuid import uuid4

import psycopg
import pytest

from kms.app.ports import User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database


@pytest.fixture
def users(store: Pool) -> StoredUsers:
    return StoredUsers(store)


async def test_a_service_is_found_by_its_id(users: StoredUsers) -> None:
    user_id = await users.create_service("signer")
    assert await users.find(user_id) == User(user_id, "signer", 0)


async def test_an_unknown_user_is_none(users: StoredUsers) -> None:
    assert await users.find(UserId(uuid4())) is None


@pytest.mark.parametrize("standing", ["deleted_at = now()", "locked_until = now() + interval '1 hour'"])
async def test_a_locked_or_deleted_user_is_none(database: Database, users: StoredUsers, standing: str) -> None:
    user_id = await users.create_service("signer")
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(f"UPDATE authentication.users SET {standing}".encode())
    assert await users.find(user_id) is None


async def test_a_lock_ends_by_itself(database: Database, users: StoredUsers) -> None:
    user_id = await users.create_service("signer")
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(b"UPDATE authentication.users SET locked_until = now() - interval '1 second'")
    assert await users.find(user_id) is not None


async def test_a_service_has_no_password_and_an_address_that_cannot_exist(database: Database, users: StoredUsers) -> None:
    user_id = await users.create_service("signer")
    with psycopg.connect(database.admin_dsn) as connection:
        row = connection.execute(b"SELECT password_hash, email FROM authentication.users").fetchone()
    assert row == ("!", f"{user_id}@service.invalid")


async def test_a_name_is_given_once(users: StoredUsers) -> None:
    await users.create_service("signer")
    with pytest.raises(KmsError) as caught:
        await users.create_service("signer")
    assert caught.value.reason is Reason.NAME_TAKEN


async def test_a_bad_name_is_malformed_and_says_what_was_expected(users: StoredUsers) -> None:
    for name in ("", "ab", "a" * 101, "-ab", "a b c", "naïve", "a\0bc", "abc\n"):
        with pytest.raises(KmsError, match="3 to 100") as caught:
            await users.create_service(name)
        assert caught.value.reason is Reason.MALFORMED
