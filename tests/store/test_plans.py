"""Every SQL constant of the service finds its rows by an index, in plans that PostgreSQL makes for a table with rows.

The constants are found, and so are the statements inside the functions that they call: what is added later is checked too.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from tests.fixtures.postgres import Database
from tests.store.test_statements import numbered, statements

# Tables that stay small, whatever the service does: read whole.
SMALL_ROWS_MAX: Final = 100
# What an operator's command does, now and then, with every envelope.
READ_ALL: Final = {"kms.store.wrapping.COUNT", "kms.store.wrapping.RETIRE"}
ROLES: Final = ("authenticated_users", "admin_users", "auditor_users", "job_runner")
ROWS: Final = b"""
    INSERT INTO authentication.users (id, username, email, password_hash, salt)
        SELECT gen_random_uuid(), 'user' || n, n || '@example.org', '!', '!' FROM generate_series(1, 500) AS n;
    INSERT INTO cryptography.keys (
        user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    )
        SELECT id, 'key' || n, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED'
        FROM authentication.users CROSS JOIN generate_series(1, 20) AS n;
    INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, expires_at)
        SELECT id, encode(sha256(id::text::bytea), 'hex'), encode(sha256(('r' || id)::bytea), 'hex'), now()
        FROM authentication.users CROSS JOIN generate_series(1, 1);
    INSERT INTO authentication.login_history (user_id, login_method, success)
        SELECT id, 'password', true FROM authentication.users CROSS JOIN generate_series(1, 4);
    INSERT INTO audit.security_events (event_type, severity, user_id, created_at)
        SELECT 'sign', 'low', id, now() - n * interval '3 days' FROM authentication.users CROSS JOIN generate_series(1, 10) AS n;
    INSERT INTO audit.aggregate_heads SELECT id, 'key', 1, user_id FROM cryptography.keys ON CONFLICT DO NOTHING;
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data)
        SELECT id, 'key', 1, 'created', '{}' FROM cryptography.keys;
    INSERT INTO blockchain.transactions (network_id, tx_hash, user_id)
        SELECT n.id, u.id::text, u.id FROM blockchain.networks AS n CROSS JOIN authentication.users AS u;
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason, migration_status)
        SELECT user_id, id, 'age', 'failed' FROM cryptography.keys;
    INSERT INTO cryptography.request_records (user_id, rpc, request_id, body_mac, result, event_id, created_at)
        SELECT id, 'Sign', gen_random_uuid()::text, 'm', 'r', gen_random_uuid(), now() - n * interval '1 hour'
        FROM authentication.users CROSS JOIN generate_series(1, 20) AS n;
    INSERT INTO cryptography.epochs (number, cause, system_identifier, timeline, database_oid)
        SELECT 1, 'FIRST_START', here.system_identifier, here.timeline, here.database_oid FROM cryptography.location() AS here;
    INSERT INTO cryptography.restored_keys (
        key_id, user_id, epoch, status_before, deactivated_by_restore, confirmed_at, confirmed_count
    )
        SELECT id, user_id, 1, 'active', true, now(), 0 FROM cryptography.keys;
    ANALYZE;
"""
WATCH: Final = b"""
    LOAD 'auto_explain';
    SET auto_explain.log_min_duration = 0;
    SET auto_explain.log_nested_statements = on;
    SET auto_explain.log_format = 'json';
    SET auto_explain.log_level = 'notice';
    SET plan_cache_mode = force_generic_plan;
"""
CHARGE: Final = b"""
    UPDATE cryptography.keys SET usage_counter = usage_counter + 1, last_used_at = now()
    WHERE id IN (SELECT id FROM cryptography.keys ORDER BY id LIMIT 100)
"""
UPDATES: Final = b"SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relid = 'cryptography.keys'::regclass"
_DUMMIES: Final = {"uuid": str(uuid.UUID(int=1)), "timestamptz": "2030-01-01", "jsonb": "{}", "interval": "1 day", "bool": "true"}


@pytest.fixture(scope="module")
def filled(filled_database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(filled_database.admin_dsn, autocommit=True) as connection:
        connection.execute(b"SET random_page_cost = 1.1")  # as for solid-state disks
        connection.execute(ROWS)
        yield connection


def scanned_whole(plan: dict[str, Any]) -> Iterator[str]:
    if plan["Node Type"] == "Seq Scan":
        yield plan["Relation Name"]
    for child in plan.get("Plans", ()):
        yield from scanned_whole(child)


def large(connection: psycopg.Connection[Any], relations: Iterator[str]) -> list[str]:
    """Return those of our tables that have many rows."""
    query = b"SELECT count(*) FROM pg_class WHERE relname = %s AND relnamespace > 16383 AND reltuples > %s"
    found = []
    for name in set(relations):
        row = connection.execute(query, (name, SMALL_ROWS_MAX)).fetchone()
        if row != (0,):
            found.append(name)
    return found


def plan_of(connection: psycopg.Connection[Any], statement: str) -> tuple[str, dict[str, Any]] | None:
    """Return the generic plan in the first role that has the rights, with row security; None if only the owner has."""
    for role in (*ROLES, "kms_service"):
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(
                    "SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)", (role, str(uuid.UUID(int=1)))
                )
                explained = connection.execute(f"EXPLAIN (GENERIC_PLAN, VERBOSE, FORMAT JSON) {numbered(statement)}".encode())
                row = explained.fetchone()
                assert row is not None
                return role, row[0][0]["Plan"]
        except (
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.UndefinedTable,
        ):  # a temporary table of an operator's command
            continue
    return None


def nested_plans(connection: psycopg.Connection[Any], role: str, statement: str) -> list[dict[str, Any]]:
    """Run the statement with values that find nothing, roll it back, and return the plans of all that ran for it."""
    said: list[str] = []
    prepared = connection.pgconn.prepare(b"", numbered(statement).encode())
    assert prepared.status == psycopg.pq.ExecStatus.COMMAND_OK, prepared.error_message
    described = connection.pgconn.describe_prepared(b"")
    types = [connection.adapters.types.get(described.param_type(number)) for number in range(described.nparams)]
    values = [_DUMMIES.get(found.name if found else "", "1") for found in types]
    call = numbered(statement).encode()
    handler = lambda notice: said.append(notice.message_primary or "")  # noqa: E731
    connection.add_notice_handler(handler)
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(
                "SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)", (role, str(uuid.UUID(int=1)))
            )
            psycopg.RawCursor(connection).execute(call, values)
    except psycopg.Error:
        pass  # a function that finds nothing may say so; its plans are there
    finally:
        connection.remove_notice_handler(handler)
    return [json.loads(text.partition("plan:\n")[2])["Plan"] for text in said if "plan:\n" in text]


def test_every_statement_uses_an_index(filled: psycopg.Connection[Any]) -> None:
    wrong, checked = [], 0
    for name, statement in statements():
        planned = plan_of(filled, statement)
        if planned is None:
            continue
        checked += 1
        wrong += [f"{name} reads all of {table}" for table in large(filled, scanned_whole(planned[1]))]
    assert wrong == []
    assert checked >= 10


def test_every_statement_within_a_called_function_uses_an_index(filled: psycopg.Connection[Any]) -> None:
    filled.execute(WATCH)
    wrong, nested = [], 0
    for name, statement in statements():
        planned = plan_of(filled, statement)
        if planned is None or planned[1]["Node Type"] not in ("Function Scan", "Result"):
            continue
        for plan in nested_plans(filled, planned[0], statement):
            nested += 1
            wrong += [f"{name} reads all of {table}" for table in large(filled, scanned_whole(plan)) if name not in READ_ALL]
    assert wrong == []
    assert nested >= 2


def test_a_charge_writes_no_index(filled: psycopg.Connection[Any]) -> None:
    with filled.transaction(force_rollback=True):
        filled.execute(CHARGE)
        row = filled.execute(UPDATES).fetchone()
    assert row == (100, 100)


def test_a_statement_without_an_index_would_be_found(filled: psycopg.Connection[Any]) -> None:
    planned = plan_of(filled, "SELECT id FROM audit.domain_events WHERE event_version = %(version)s")
    assert planned is not None
    assert len(large(filled, scanned_whole(planned[1]))) == 1
