"""Grants: what an owner lets another user do with a key, made and revoked through functions alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors

from tests.fixtures.postgres import Database
from tests.store.acting import Rows, add_user, run

ALICE: Final = UUID("aaaaaaaa-0000-4000-8000-000000000001")
BOB: Final = UUID("bbbbbbbb-0000-4000-8000-000000000002")
CAROL: Final = UUID("cccccccc-0000-4000-8000-000000000003")
KEY: Final = UUID("aaaaaaaa-0000-4000-8000-0000000000a1")
GRANT: Final = "SELECT cryptography.grant_key(%s, %s, %s, %s, %s)"
REVOKE: Final = "SELECT cryptography.revoke_grant(%s, %s)"
SEEN: Final = "SELECT owner_id, key_id, grantee_id, operations, granted_by FROM cryptography.key_grants"


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A superuser, on a database with three users, the first of whom has a key."""
    for user, name in ((ALICE, "alice"), (BOB, "bob"), (CAROL, "carol")):
        add_user(database.admin_dsn, user, name)
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            b"INSERT INTO cryptography.keys (id, user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key,"
            b" key_strength, custody, origin)"
            b" VALUES (%s, %s, 'key', 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED')",
            (KEY, ALICE),
        )
        yield connection


def grant(
    database: Database,
    *operations: str,
    acting: UUID | str = ALICE,
    key: UUID = KEY,
    to: UUID | None = BOB,
    until: datetime | None = None,
    version: int = 0,
) -> UUID:
    """Grant a key as a user who is at a version; without operations that of decrypting."""
    parameters = (key, to, list(operations or ("decrypt",)), until, version)
    ((made,),) = run(database.dsn, "authenticated_users", acting, GRANT, parameters)
    assert isinstance(made, UUID)
    return made


def revoke(database: Database, granted: UUID, *, acting: UUID | str = ALICE, version: int = 0) -> None:
    run(database.dsn, "authenticated_users", acting, REVOKE, (granted, version))


def seen(database: Database, user: UUID | str, role: str = "authenticated_users") -> Rows:
    return run(database.dsn, role, user, SEEN)


def version(admin: psycopg.Connection[Any], user: UUID) -> int:
    row = admin.execute(b"SELECT version FROM authentication.users WHERE id = %s", (user,)).fetchone()
    assert row is not None
    return int(row[0])


def live(admin: psycopg.Connection[Any]) -> int:
    row = admin.execute(b"SELECT count(*) FROM cryptography.key_grants WHERE revoked_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


def test_owner_and_grantee_see_a_grant_and_no_other_user_does(database: Database, admin: psycopg.Connection[Any]) -> None:
    grant(database, "encrypt", "decrypt", "encrypt")
    row = (ALICE, KEY, BOB, ["decrypt", "encrypt"], ALICE)
    assert seen(database, ALICE) == seen(database, BOB) == seen(database, "", "admin_users") == [row]
    assert seen(database, CAROL) == seen(database, "") == []
    for role in ("auditor_users", "job_runner", "none"):
        with pytest.raises(errors.InsufficientPrivilege):
            seen(database, ALICE, role)


def test_a_grant_and_its_end_advance_the_version_of_the_grantee_alone(database: Database, admin: psycopg.Connection[Any]) -> None:
    granted = grant(database)
    assert [version(admin, user) for user in (ALICE, BOB, CAROL)] == [0, 1, 0]
    revoke(database, granted)
    assert [version(admin, user) for user in (ALICE, BOB, CAROL)] == [0, 2, 0]
    assert live(admin) == 0


def test_a_grant_and_its_end_are_in_the_trail(database: Database, admin: psycopg.Connection[Any]) -> None:
    granted = grant(database, "decrypt", "encrypt")
    revoke(database, granted)
    query = b"""
        SELECT event_type, severity, user_id, resource_id, event_details FROM audit.security_events
        WHERE event_type ~ 'grant' ORDER BY created_at
    """
    what = {"grant": str(granted), "grantee": str(BOB)}
    assert admin.execute(query).fetchall() == [
        ("key.granted", "medium", ALICE, KEY, {**what, "operations": ["decrypt", "encrypt"], "expires_at": None}),
        ("key.grant_revoked", "medium", ALICE, KEY, what),
    ]


@pytest.mark.parametrize(("acting", "to"), [(BOB, CAROL), (BOB, ALICE), (CAROL, BOB)])
def test_a_key_of_another_is_a_key_that_is_not_there(
    database: Database, admin: psycopg.Connection[Any], acting: UUID, to: UUID
) -> None:
    grant(database)
    said = set()
    for key in (KEY, uuid4()):
        with pytest.raises(errors.NoDataFound) as caught:
            grant(database, acting=acting, to=to, key=key, version=version(admin, acting))
        said.add(caught.value.diag.message_primary)
    assert said == {"there is no such key"}
    assert live(admin) == 1


def test_nobody_grants_to_himself_or_for_nobody(database: Database, admin: psycopg.Connection[Any]) -> None:
    for acting, to in ((ALICE, ALICE), (BOB, BOB), ("", BOB)):
        with pytest.raises(errors.InsufficientPrivilege, match="nobody grants"):
            grant(database, acting=acting, to=to)
    assert live(admin) == 0


def test_nobody_grants_to_a_user_who_is_not_there(database: Database, admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"UPDATE authentication.users SET deleted_at = now() WHERE id = %s", (BOB,))
    for to in (BOB, uuid4(), None):
        with pytest.raises(errors.NoDataFound, match="no such user"):
            grant(database, to=to)


def test_a_second_grant_of_a_key_to_a_user_is_refused_while_the_first_is_live(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    first = grant(database)
    with pytest.raises(errors.UniqueViolation, match="one_live"):
        grant(database, "encrypt")
    grant(database, to=CAROL)
    assert version(admin, BOB) == 1
    revoke(database, first)
    grant(database, "encrypt")
    assert live(admin) == 2


def test_a_grant_that_has_run_out_makes_room_for_another(database: Database, admin: psycopg.Connection[Any]) -> None:
    first = grant(database, until=datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(errors.UniqueViolation):
        grant(database)
    admin.execute(
        b"UPDATE cryptography.key_grants SET created_at = now() - interval '1 hour', expires_at = now() - interval '1 minute'"
    )
    second = grant(database)
    query = b"SELECT id FROM cryptography.key_grants WHERE revoked_at IS NULL"
    assert admin.execute(query).fetchall() == [(second,)]
    with pytest.raises(errors.NoDataFound):
        revoke(database, first)


def test_of_grants_at_once_one_is_made(database: Database, admin: psycopg.Connection[Any]) -> None:
    def made(_: int) -> bool:
        try:
            grant(database)
        except errors.UniqueViolation:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(made, range(16))) == [False] * 15 + [True]
    assert (live(admin), version(admin, BOB)) == (1, 1)


def test_only_its_owner_revokes_a_grant_and_once(database: Database, admin: psycopg.Connection[Any]) -> None:
    granted = grant(database)
    for acting in (BOB, CAROL, ""):
        with pytest.raises(errors.NoDataFound):
            revoke(database, granted, acting=acting, version=1 if acting == BOB else 0)
    revoke(database, granted)
    with pytest.raises(errors.NoDataFound):
        revoke(database, granted)
    assert version(admin, BOB) == 2


@pytest.mark.parametrize("change", ["version = 1", "locked_until = 'infinity'", "deleted_at = now()"])
def test_an_owner_who_is_not_as_he_was_admitted_neither_grants_nor_revokes(
    database: Database, admin: psycopg.Connection[Any], change: str
) -> None:
    granted = grant(database)
    admin.execute(f"UPDATE authentication.users SET {change} WHERE id = '{ALICE}'".encode())
    with pytest.raises(errors.InvalidAuthorizationSpecification):
        grant(database, to=CAROL)
    with pytest.raises(errors.InvalidAuthorizationSpecification):
        revoke(database, granted)
    assert (live(admin), version(admin, BOB), version(admin, CAROL)) == (1, 1, 0)


@pytest.mark.parametrize(
    ("operations", "until"),
    [([], None), (["rotate"], None), (["sign", None], None), (["Sign"], None), (["sign"], datetime(2020, 1, 1, tzinfo=UTC))],
)
def test_operations_and_moments_that_are_none_are_refused(
    database: Database, admin: psycopg.Connection[Any], operations: list[str | None], until: datetime | None
) -> None:
    with pytest.raises(errors.CheckViolation):
        run(database.dsn, "authenticated_users", ALICE, GRANT, (KEY, BOB, operations, until, 0))
    assert (live(admin), version(admin, BOB)) == (0, 0)


@pytest.mark.parametrize("role", ["none", "admin_users", "auditor_users", "job_runner"])
def test_no_other_role_grants_or_revokes(database: Database, admin: psycopg.Connection[Any], role: str) -> None:
    granted = grant(database)
    for query, parameters in ((GRANT, (KEY, CAROL, ["sign"], None, 0)), (REVOKE, (granted, 0))):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, role, ALICE, query, parameters)
    assert live(admin) == 1


@pytest.mark.parametrize("user", [ALICE, BOB])
def test_nobody_writes_a_grant_past_the_functions(database: Database, admin: psycopg.Connection[Any], user: UUID) -> None:
    grant(database)
    statements = (
        "INSERT INTO cryptography.key_grants (grantee_id, operations) VALUES (authentication.current_user_id(), '{sign}')",
        "UPDATE cryptography.key_grants SET operations = '{sign}'",
        "UPDATE cryptography.key_grants SET revoked_at = now()",
        "DELETE FROM cryptography.key_grants",
    )
    for role in ("authenticated_users", "admin_users"):
        for statement in statements:
            with pytest.raises(errors.InsufficientPrivilege):
                run(database.dsn, role, user, statement)


def test_the_policies_of_grants_do_not_read_keys(admin: psycopg.Connection[Any]) -> None:
    query = b"""
        SELECT polname FROM pg_policy AS p
        WHERE polrelid = 'cryptography.key_grants'::regclass AND EXISTS (
            SELECT FROM pg_depend
            WHERE classid = 'pg_policy'::regclass AND objid = p.oid AND refobjid = 'cryptography.keys'::regclass
        )
    """
    assert admin.execute(query).fetchall() == []
