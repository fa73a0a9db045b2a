"""The trail's own functions: events in the order of their aggregate, and rows that nobody forges or takes back."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors

from tests.fixtures.postgres import Database
from tests.store.acting import acting_for, add_user, run

ALICE: Final = UUID("aaaaaaaa-0000-4000-8000-000000000001")
BOB: Final = UUID("bbbbbbbb-0000-4000-8000-000000000002")
# Roles of the service append through functions of definer roles: here through one for each way, as kms_lifecycle.
ENTRANCES: Final = b"""
    CREATE FUNCTION public.append(aggregate UUID, kind TEXT, expected BIGINT) RETURNS BIGINT
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN RETURN audit.append_event(aggregate, kind, 'changed', '{}', expected); END $$;
    CREATE FUNCTION public.record() RETURNS VOID
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN
        PERFORM audit.record_security_event(
            'sign', 'low', NULL, '192.0.2.1', NULL, 'key', NULL, 'sign', 'success', 0, NULL
        );
    END $$;
    CREATE FUNCTION public.record_access() RETURNS VOID
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN PERFORM audit.record_data_access('keys', 'SELECT', NULL); END $$;
    ALTER FUNCTION public.append OWNER TO kms_lifecycle;
    ALTER FUNCTION public.record OWNER TO kms_lifecycle;
    ALTER FUNCTION public.record_access OWNER TO kms_lifecycle;
    GRANT EXECUTE ON FUNCTION public.append, public.record, public.record_access TO authenticated_users, job_runner;
"""
APPEND: Final = "SELECT public.append(%s, %s, %s)"
RECORD: Final = "SELECT public.record()"
BY_HIMSELF: Final = (
    b"SELECT audit.append_event(gen_random_uuid(), 'key', 'key.revoked', '{}', 0)",
    b"SELECT audit.record_security_event('key.used', 'low', NULL, NULL, NULL, 'key', NULL, 'Sign', 'success', 0, '{}')",
    b"SELECT audit.record_data_access('keys', 'DELETE', gen_random_uuid())",
)
ROLES: Final = ("authenticated_users", "admin_users", "auditor_users", "job_runner")


@pytest.fixture(autouse=True)
def _users_and_entrances(database: Database) -> None:
    add_user(database.admin_dsn, ALICE, "alice")
    add_user(database.admin_dsn, BOB, "bob")
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(ENTRANCES)


def append(database: Database, user: object, aggregate: UUID, expected: int | None, kind: str = "key") -> int:
    role = "authenticated_users" if user else "job_runner"
    return int(run(database.dsn, role, user or "", APPEND, (aggregate, kind, expected))[0][0])


def stored(database: Database, query: bytes) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.admin_dsn) as connection:
        return connection.execute(query).fetchall()


def test_events_of_an_aggregate_are_numbered_from_one_without_gaps(database: Database) -> None:
    aggregate = uuid4()
    assert [append(database, ALICE, aggregate, version) for version in range(3)] == [1, 2, 3]
    found = stored(
        database, b"SELECT aggregate_version, initiated_by, event_version FROM audit.domain_events ORDER BY aggregate_version"
    )
    assert found == [(version, str(ALICE), 1) for version in (1, 2, 3)]
    assert stored(database, b"SELECT aggregate_version, user_id FROM audit.aggregate_heads") == [(3, ALICE)]


@pytest.mark.parametrize("expected", [-1, 0, 1, 3, None])
def test_an_event_that_does_not_follow_the_last_is_refused_and_leaves_nothing(database: Database, expected: int | None) -> None:
    aggregate = uuid4()
    append(database, ALICE, aggregate, 0)
    append(database, ALICE, aggregate, 1)
    with pytest.raises(errors.SerializationFailure, match="is not at version"):
        append(database, ALICE, aggregate, expected)
    assert stored(database, b"SELECT count(*) FROM audit.domain_events") == [(2,)]


@pytest.mark.parametrize("expected", [1, 5])
def test_a_first_version_is_one(database: Database, expected: int) -> None:
    with pytest.raises(errors.SerializationFailure):
        append(database, ALICE, uuid4(), expected)
    assert stored(database, b"SELECT count(*) FROM audit.aggregate_heads") == [(0,)]


def test_an_aggregate_keeps_its_type(database: Database) -> None:
    aggregate = uuid4()
    append(database, ALICE, aggregate, 0)
    with pytest.raises(errors.SerializationFailure):
        append(database, ALICE, aggregate, 1, kind="user")


def test_nobody_appends_to_another_users_aggregate_but_the_service_does(database: Database) -> None:
    aggregate = uuid4()
    append(database, ALICE, aggregate, 0)
    with pytest.raises(errors.SerializationFailure):
        append(database, BOB, aggregate, 1)
    assert append(database, None, aggregate, 1) == 2
    assert stored(database, b"SELECT initiated_by FROM audit.domain_events WHERE aggregate_version = 2") == [("job_runner",)]


def test_without_a_user_nothing_is_appended_in_a_users_role(database: Database) -> None:
    with pytest.raises(errors.InsufficientPrivilege, match="nobody is named"):
        run(database.dsn, "authenticated_users", "", APPEND, (uuid4(), "key", 0))


def test_of_two_who_append_at_once_one_wins(database: Database) -> None:
    aggregate = uuid4()
    append(database, ALICE, aggregate, 0)

    def attempt(_: int) -> bool:
        try:
            append(database, ALICE, aggregate, 1)
        except errors.SerializationFailure:
            return False
        return True

    with ThreadPoolExecutor(8) as executor:
        assert sum(executor.map(attempt, range(8))) == 1
    assert stored(database, b"SELECT max(aggregate_version), count(*) FROM audit.domain_events") == [(2, 2)]


@pytest.mark.parametrize("role", ["none", *ROLES])
def test_nobody_writes_lines_of_his_own_into_the_trail(database: Database, role: str) -> None:
    for statement in BY_HIMSELF:
        with acting_for(database.dsn, role, ALICE) as connection, pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement)


def test_nobody_inserts_events_past_the_function(database: Database) -> None:
    insert = (
        "INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data)"
        " VALUES (gen_random_uuid(), 'key', 1, 'forged', '{}')"
    )
    for role in ROLES:
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, role, ALICE, insert)


def test_what_is_recorded_is_recorded_for_him_who_acts(database: Database) -> None:
    run(database.dsn, "authenticated_users", ALICE, RECORD)
    run(database.dsn, "job_runner", "", RECORD)
    run(database.dsn, "authenticated_users", ALICE, "SELECT public.record_access()")
    assert stored(database, b"SELECT user_id, event_details FROM audit.security_events ORDER BY user_id NULLS LAST") == [
        (ALICE, {}),
        (None, {}),
    ]
    assert stored(database, b"SELECT user_id, operation FROM audit.data_access_log") == [(ALICE, "SELECT")]
    seen = "SELECT count(*) FROM audit.security_events"
    assert [run(database.dsn, "authenticated_users", user, seen)[0][0] for user in (ALICE, BOB)] == [1, 0]
    assert run(database.dsn, "auditor_users", "", seen) == [(2,)]


@pytest.mark.parametrize(
    "table", ["aggregate_heads", "domain_events", "aggregate_snapshots", "security_events", "data_access_log"]
)
def test_nobody_takes_a_row_of_the_trail_back(database: Database, table: str) -> None:
    statements = [f"DELETE FROM audit.{table}", f"TRUNCATE audit.{table}"]
    if table != "aggregate_snapshots":
        statements.append(f"UPDATE audit.{table} SET {'event_type' if 'events' in table else 'user_id'} = NULL")
    for role in ROLES:
        for statement in statements:
            with acting_for(database.dsn, role, ALICE) as connection, pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_the_service_notes_that_an_event_was_processed_and_nothing_else(database: Database) -> None:
    append(database, ALICE, uuid4(), 0)
    run(database.dsn, "job_runner", "", "UPDATE audit.domain_events SET processing_status = 'processed', processed_at = now()")
    assert stored(database, b"SELECT processing_status FROM audit.domain_events") == [("processed",)]
    for column in ("event_data", "aggregate_version", "occurred_at", "initiated_by"):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, "job_runner", "", f"UPDATE audit.domain_events SET {column} = DEFAULT")


@pytest.mark.parametrize(
    ("event", "details"),
    [
        ("audit.history_refused", '{"found": "' + "x" * 8_000 + '"}'),
        ("audit.history_refused", None),
        ("audit.history_refused", '"a text"'),
        (None, "{}"),
        ("key.revoked", "{}"),
    ],
)
def test_an_event_about_the_history_is_a_few_words_of_a_known_kind(
    database: Database, event: str | None, details: str | None
) -> None:
    query = "SELECT audit.record_history_event(%s, %s)"
    with pytest.raises(errors.InvalidParameterValue):
        run(database.dsn, "job_runner", "", query, (event, details))
    run(database.dsn, "job_runner", "", query, ("audit.history_refused", '{"found": "' + "x" * 7_900 + '"}'))
    assert len(stored(database, b"SELECT FROM audit.security_events")) == 1
