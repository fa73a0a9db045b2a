"""The search for due rotations among many finished ones reads few rows: 20,000 in each run, a million in the slow one."""

import re
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from kms.rotation import leases as rotation_leases
from kms.rotation import postgres
from kms.rotation.usage_postgres import USES
from kms.store.pool import ACT_AS
from kms.store.trail import IN_ORDER
from tests.fixtures.postgres import Database
from tests.jobs.rotations import ALICE, OLD
from tests.store.test_plans import WATCH, nested_plans, scanned_whole
from tests.store.test_statements import numbered

# Without the checks of references, which would take most of the time.
FINISHED: Final = """
    SET session_replication_role = replica;
    INSERT INTO cryptography.key_rotations (
        user_id, old_key_id, new_key_id, rotation_reason, migration_status, created_at, completed_at
    )
        SELECT CASE n % 2 WHEN 0 THEN '{user}'::uuid ELSE md5((n % 100)::text)::uuid END, '{key}', gen_random_uuid(), 'age',
            'completed', now() - n * interval '1 minute', now()
        FROM generate_series(1, {finished}) AS n;
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason, migration_status)
        SELECT '{user}', '{key}', 'age', 'failed' FROM generate_series(1, 1000);
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason)
        SELECT '{user}', gen_random_uuid(), 'age' FROM generate_series(1, 50);
    SET session_replication_role = origin;
    ANALYZE cryptography.key_rotations;
"""


USED: Final = """
    SET session_replication_role = replica;
    INSERT INTO audit.security_events (event_type, severity, user_id, resource_id, action, outcome, source_ip, created_at)
        SELECT 'key.used', 'low', '{user}', '{key}', 'decrypt', 'success', '192.0.2.1', now() - n * interval '5 minutes'
        FROM generate_series(1, {uses}) AS n;
    INSERT INTO audit.security_events (event_type, severity, user_id, resource_id, action, outcome, created_at)
        SELECT 'key.used', 'low', '{user}', gen_random_uuid(), 'decrypt', 'success', now() - n * interval '5 minutes'
        FROM generate_series(1, {uses}) AS n;
    SET session_replication_role = origin;
    ANALYZE audit.security_events;
"""


@pytest.fixture(scope="module", params=[20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def filled(filled_database: Database, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(filled_database.admin_dsn, autocommit=True) as connection:
        connection.execute(FINISHED.format(user=ALICE, key=OLD, finished=request.param).encode())
        connection.execute(WATCH)
        yield connection


def indexes(plan: dict[str, Any]) -> Iterator[str]:
    if "Index Name" in plan:
        yield plan["Index Name"]
    for child in plan.get("Plans", ()):
        yield from indexes(child)


@pytest.mark.parametrize("name", ["CLAIM", "EXTEND", "FINISH_STEP", "COMPLETE", "FAIL", "RELEASE"])
def test_among_many_finished_rotations_nothing_reads_the_table_whole(filled: psycopg.Connection[Any], name: str) -> None:
    plans = nested_plans(filled, "job_runner", getattr(rotation_leases, name))
    own = [plan for plan in plans if "key_rotations" in str(plan)]
    assert len(own) == (2 if name == "CLAIM" else 1)
    assert [table for plan in own for table in scanned_whole(plan)] == []
    searched = {"idx_key_rotations_due"} if name == "CLAIM" else set()
    assert {index for plan in own for index in indexes(plan)} == {"key_rotations_pkey"} | searched


PAGES: Final = ("PAGE", "PAGE_IN_STATUS", "PAGE_OF_ALL", "PAGE_OF_ALL_IN_STATUS")


@pytest.mark.parametrize("first", ["'infinity'", "now() - interval '7 days'"], ids=["the newest", "a later page"])
@pytest.mark.parametrize("name", PAGES)
def test_among_many_finished_rotations_a_page_reads_its_own_rows_alone(
    filled: psycopg.Connection[Any], name: str, first: str
) -> None:
    statement = numbered(getattr(postgres, name))
    values = {"caller": f"'{ALICE}'", "status": "'pending'", "created_at": first, "id": f"'{OLD}'", "limit": "20"}
    arguments = ", ".join(values[parameter] for parameter in parameters(getattr(postgres, name)))
    with filled.transaction(force_rollback=True):
        filled.execute("DEALLOCATE ALL")
        filled.execute(ACT_AS, ("authenticated_users", str(ALICE)))
        filled.execute(f"PREPARE page AS {statement}".encode())
        row = filled.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE page ({arguments})".encode()).fetchone()
        assert row is not None
        # Row security may pass over some: ALICE sees half of them.
        assert [read(node) for node in nodes(row[0][0]["Plan"]) if read(node) > 100] == []


def parameters(statement: str) -> list[str]:
    """Return the names of the parameters in the order in which `numbered` numbers them."""
    return list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))


def read(node: dict[str, Any]) -> int:
    """Return how many rows a node of a plan looked at, also those that its filters removed: an index may be walked to its end."""
    removed = sum(rows for name, rows in node.items() if name.startswith("Rows Removed by"))
    return int(node["Actual Loops"] * (node["Actual Rows"] + removed))


@pytest.mark.parametrize("uses", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_among_many_uses_a_report_reads_the_newest_of_its_keys_by_an_index(filled_database: Database, uses: int) -> None:
    looked_at = 1_000
    # As numbered() numbers them, in a plan for all values, as the service runs it.
    prepare = f"PREPARE used AS {numbered(USES)}"
    arguments = f"NULL, interval '30 days', ARRAY['{OLD}'::uuid], ARRAY['2000-01-01'::timestamptz], {looked_at}"
    with psycopg.connect(filled_database.admin_dsn) as connection:
        connection.execute(USED.format(user=ALICE, key=OLD, uses=uses).encode())
        connection.execute(ACT_AS, ("authenticated_users", str(ALICE)))
        connection.execute(IN_ORDER)
        connection.execute(prepare.encode())
        row = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE used ({arguments})".encode()).fetchone()
        assert row is not None
        scans = [node for node in nodes(row[0][0]["Plan"]) if node["Node Type"].endswith("Scan") and node["Actual Loops"]]
        events = [node for node in scans if "security_events" in node.get("Relation Name", "")]
        assert events
        assert {name for node in events if "resource_id" not in (name := node.get("Index Name", "none"))} == set()
        assert sum(node["Actual Rows"] for node in events) <= looked_at + len(events)
        connection.rollback()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)
