"""Users: who may call, found before there is a caller."""

from uuid import uuid4

import psycopg
import pytest
from psycopg import errors

from kms.app.ports import User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.domain.permissions import Permission
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database
from tests.store.acting import run


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


async def test_a_user_made_with_a_role_has_its_permissions_at_another_version(users: StoredUsers) -> None:
    user_id = await users.create_service("inspector", "auditor")
    assert await users.find(user_id) == User(user_id, "inspector", 1, frozenset({Permission.AUDIT_READ}))


async def test_a_role_that_has_run_out_permits_nothing(database: Database, users: StoredUsers) -> None:
    user_id = await users.create_service("inspector", "auditor")
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(b"UPDATE authentication.user_roles SET expires_at = now() - interval '1 second'")
    found = await users.find(user_id)
    assert found is not None
    assert found.permissions == frozenset()


async def test_an_unknown_role_is_malformed_and_leaves_no_user(database: Database, users: StoredUsers) -> None:
    with pytest.raises(KmsError, match="role: expected one of auditor"):
        await users.create_service("inspector", "king")
    with psycopg.connect(database.admin_dsn) as connection:
        assert connection.execute(b"SELECT count(*) FROM authentication.users WHERE username = 'inspector'").fetchone() == (0,)


async def test_nobody_assigns_a_role_to_himself(database: Database, users: StoredUsers) -> None:
    user_id = await users.create_service("signer")
    with pytest.raises(errors.InsufficientPrivilege, match="himself"):
        run(database.dsn, "admin_users", user_id, "SELECT authentication.assign_role(%s, 'auditor')", (user_id,))
