"""What happens before there is a caller: users by name, sessions by token, and attempts to log in."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors

from tests.fixtures.postgres import Database
from tests.store.acting import Rows, run

ALICE: Final = UUID("aaaaaaaa-0000-4000-8000-000000000001")
SERVICE: Final = UUID("bbbbbbbb-0000-4000-8000-000000000002")
HASH: Final = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA"
TOKEN: Final = sha256(b"token of alice").hexdigest()
ATTEMPTS_MAX: Final = 5
FIND: Final = "SELECT * FROM authentication.find_user_by_name(%s)"
SESSION: Final = "SELECT id, username, version, permissions FROM authentication.find_session(%s, %s)"
ATTEMPT: Final = "SELECT authentication.record_attempt(%s, 'password', %s, %s, '10.0.0.1', 'client')"
STANDING: Final = b"SELECT failed_login_attempts, locked_until, last_login_at, version FROM authentication.users WHERE id = %s"
HISTORY: Final = b"SELECT user_id, success, failure_reason FROM authentication.login_history ORDER BY created_at"


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A superuser, on a database with a person, who has a session, and a service."""
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        insert = b"INSERT INTO authentication.users (id, username, email, password_hash, salt) VALUES (%s, %s, %s, %s, '!')"
        connection.execute(insert, (ALICE, "alice", "alice@example.org", HASH))
        connection.execute(insert, (SERVICE, "signer", "signer@service.invalid", "!"))
        connection.execute(
            b"INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, expires_at)"
            b" VALUES (%s, %s, repeat('1', 64), now() + interval '1 hour')",
            (ALICE, TOKEN),
        )
        yield connection


def find(database: Database, name: str) -> Rows:
    return run(database.dsn, "none", "", FIND, (name,))


def session(database: Database, user: UUID = ALICE, token: str = TOKEN) -> Rows:
    return run(database.dsn, "none", "", SESSION, (user, token))


def attempt(database: Database, user: UUID | None, *, success: bool, reason: str | None = None) -> bool:
    ((is_let_in,),) = run(database.dsn, "none", "", ATTEMPT, (user, success, reason))
    assert isinstance(is_let_in, bool)
    return is_let_in


def fail(database: Database, times: int) -> None:
    for _ in range(times):
        assert attempt(database, ALICE, success=False, reason="password") is False


def standing(admin: psycopg.Connection[Any]) -> tuple[int, datetime | None, datetime | None, int]:
    row = admin.execute(STANDING, (ALICE,)).fetchone()
    assert row is not None
    return row[0], row[1], row[2], row[3]


def end_lock(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"UPDATE authentication.users SET locked_until = now() - interval '1 second'")


def test_a_person_is_found_by_name_with_what_a_login_is_checked_against(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    assert find(database, "alice") == [(ALICE, HASH, False, None, 0, False)]
    admin.execute(b"UPDATE authentication.users SET mfa_enabled = true, mfa_secret = 'envelope', version = 3")
    assert find(database, "alice") == [(ALICE, HASH, True, "envelope", 3, False)]


def test_a_name_that_is_not_there_and_a_service_and_a_deleted_user_are_alike(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    admin.execute(b"UPDATE authentication.users SET deleted_at = now() WHERE id = %s", (ALICE,))
    assert [find(database, name) for name in ("alice", "signer", "bob", "ALICE", "")] == [[]] * 5


def test_of_a_locked_user_it_is_told_until_the_lock_ends(database: Database, admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"UPDATE authentication.users SET locked_until = 'infinity'")
    assert [row[-1] for row in find(database, "alice")] == [True]
    end_lock(admin)
    assert [row[-1] for row in find(database, "alice")] == [False]


def test_failures_in_a_row_lock_for_a_quarter_of_an_hour_and_advance_the_version(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    fail(database, ATTEMPTS_MAX - 1)
    assert standing(admin) == (ATTEMPTS_MAX - 1, None, None, 0)
    assert len(session(database)) == 1
    fail(database, 1)
    failures, locked_until, _, version = standing(admin)
    assert (failures, version) == (ATTEMPTS_MAX, 1)
    assert locked_until is not None
    assert timedelta(minutes=14) < locked_until - datetime.now(UTC) <= timedelta(minutes=15)


def test_a_locked_user_is_not_let_in_and_what_is_tried_changes_nothing_but_the_history(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    fail(database, ATTEMPTS_MAX)
    before = standing(admin)
    assert attempt(database, ALICE, success=True) is False
    fail(database, 1)
    assert standing(admin) == before
    assert [row[1:] for row in admin.execute(HISTORY).fetchall()[-2:]] == [(False, "locked"), (False, "locked")]


def test_after_a_lock_one_failure_locks_again_and_a_success_ends_the_row(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    fail(database, ATTEMPTS_MAX)
    end_lock(admin)
    fail(database, 1)
    assert attempt(database, ALICE, success=True) is False
    end_lock(admin)
    assert attempt(database, ALICE, success=True) is True
    failures, locked_until, last_login_at, version = standing(admin)
    assert (failures, locked_until, version) == (0, None, 2)
    assert last_login_at is not None
    fail(database, ATTEMPTS_MAX - 1)
    assert attempt(database, ALICE, success=True) is True


def test_every_attempt_is_in_the_history_with_where_from_and_why(database: Database, admin: psycopg.Connection[Any]) -> None:
    assert attempt(database, ALICE, success=False, reason="code") is False
    assert attempt(database, ALICE, success=True) is True
    assert attempt(database, None, success=False) is False
    assert admin.execute(HISTORY).fetchall() == [(ALICE, False, "code"), (ALICE, True, None), (None, False, "unknown")]
    query = b"SELECT DISTINCT login_method, host(ip_address), user_agent, created_at < now() FROM authentication.login_history"
    assert admin.execute(query).fetchall() == [("password", "10.0.0.1", "client", True)]


def test_nobody_is_let_in_without_a_name_or_after_he_was_deleted(database: Database, admin: psycopg.Connection[Any]) -> None:
    assert attempt(database, None, success=True) is False
    admin.execute(b"UPDATE authentication.users SET deleted_at = now() WHERE id = %s", (ALICE,))
    assert attempt(database, ALICE, success=True) is False
    assert admin.execute(HISTORY).fetchall() == [(None, False, "unknown"), (ALICE, False, "deleted")]


@pytest.mark.parametrize("user", [SERVICE, uuid4()])
def test_attempts_at_a_service_lock_nobody(database: Database, admin: psycopg.Connection[Any], user: UUID) -> None:
    for _ in range(ATTEMPTS_MAX + 1):
        with pytest.raises(errors.NoDataFound):
            attempt(database, user, success=False)
    assert admin.execute(b"SELECT count(*) FROM authentication.login_history").fetchone() == (0,)
    assert run(database.dsn, "none", "", "SELECT username FROM authentication.find_user_by_uri(%s)", (SERVICE,)) == [("signer",)]


def test_of_many_attempts_at_once_no_more_than_the_limit_are_judged(database: Database, admin: psycopg.Connection[Any]) -> None:
    """All of them have begun when the first is judged: the row is held until then."""
    waiting = b"SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(16) as pool, psycopg.connect(database.admin_dsn) as holder:
        holder.execute(b"SELECT FROM authentication.users WHERE id = %s FOR UPDATE", (ALICE,))
        tried = [pool.submit(attempt, database, ALICE, success=False, reason="password") for _ in range(16)]
        while admin.execute(waiting).fetchone() != (16,):
            time.sleep(0.01)
        holder.rollback()
        assert not any(each.result() for each in tried)
    reasons = [reason for _, _, reason in admin.execute(HISTORY).fetchall()]
    assert sorted(reasons) == ["locked"] * (16 - ATTEMPTS_MAX) + ["password"] * ATTEMPTS_MAX
    assert (standing(admin)[0], standing(admin)[3]) == (ATTEMPTS_MAX, 1)


def test_a_session_is_found_by_its_user_and_token_with_what_the_user_may(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    assert session(database) == [(ALICE, "alice", 0, [])]
    admin.execute(b"SELECT authentication.assign_role(%s, 'auditor')", (ALICE,))
    admin.execute(b"UPDATE authentication.users SET version = 7")
    assert session(database) == [(ALICE, "alice", 7, ["audit:read"])]
    assert session(database, SERVICE) == []
    assert session(database, token=sha256(b"another").hexdigest()) == []
    assert session(database, token="") == []


@pytest.mark.parametrize(
    "change",
    [
        "authentication.user_sessions SET is_active = false",
        "authentication.user_sessions SET is_active = NULL",
        "authentication.user_sessions SET expires_at = now() - interval '1 millisecond'",
        "authentication.users SET locked_until = now() + interval '1 minute'",
        "authentication.users SET deleted_at = now()",
    ],
)
def test_a_session_that_ended_or_ran_out_or_whose_user_may_not_is_none(
    database: Database, admin: psycopg.Connection[Any], change: str
) -> None:
    admin.execute(f"UPDATE {change}".encode())
    assert session(database) == []


def test_only_the_login_of_the_service_asks_and_only_before_it_takes_a_role(database: Database) -> None:
    for role in ("authenticated_users", "admin_users", "auditor_users", "job_runner"):
        for query, parameters in ((FIND, ("alice",)), (SESSION, (ALICE, TOKEN)), (ATTEMPT, (ALICE, True, None))):
            with pytest.raises(errors.InsufficientPrivilege):
                run(database.dsn, role, ALICE, query, parameters)


def test_the_owner_of_these_functions_can_do_nothing_else(admin: psycopg.Connection[Any]) -> None:
    rights = b"""
        SELECT privilege_type || ' ' || table_name, array_agg(column_name::text ORDER BY column_name)
        FROM information_schema.column_privileges WHERE grantee = 'kms_login' GROUP BY 1
    """
    assert dict(admin.execute(rights).fetchall()) == {
        "INSERT login_history": [
            *("created_at", "failure_reason", "ip_address", "login_method", "success", "user_agent", "user_id"),
        ],
        "SELECT roles": ["id", "permissions"],
        "SELECT user_roles": ["expires_at", "role_id", "user_id"],
        "SELECT user_sessions": ["expires_at", "id", "is_active", "session_token", "user_id"],
        "SELECT users": [
            *(
                "deleted_at",
                "failed_login_attempts",
                "id",
                "last_login_at",
                "locked_until",
                "mfa_enabled",
                "mfa_secret",
                "password_hash",
            ),
            *("username", "version"),
        ],
        "UPDATE users": ["failed_login_attempts", "last_login_at", "locked_until", "version"],
    }
    tables = b"SELECT table_name FROM information_schema.table_privileges WHERE grantee = 'kms_login'"
    assert admin.execute(tables).fetchall() == []
    functions = b"""
        SELECT p.oid::regproc::text FROM pg_proc AS p
        WHERE has_function_privilege('kms_login', p.oid, 'EXECUTE')
            AND p.pronamespace::regnamespace::text !~ '^(pg_|information_schema)'
            AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = p.oid AND deptype = 'e')
        ORDER BY 1
    """
    names = ("find_session", "find_user_by_name", "find_user_by_uri", "record_attempt")
    assert [name for (name,) in admin.execute(functions)] == [f"authentication.{name}" for name in names]
