"""The search for due rotations among many finished ones reads few rows: 20,000 in each run, a million in the slow one."""

from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from kms.rotation import leases as rotation_leases
from tests.fixtures.postgres import Database
from tests.jobs.rotations import ALICE, OLD
from tests.store.test_plans import WATCH, nested_plans, scanned_whole

# Without the checks of references, which would take most of the time.
FINISHED: Final = """
    SET session_replication_role = replica;
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, new_key_id, rotation_reason, migration_status, completed_at)
        SELECT '{user}', '{key}', gen_random_uuid(), 'age', 'completed', now() FROM generate_series(1, {finished});
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason, migration_status)
        SELECT '{user}', '{key}', 'age', 'failed' FROM generate_series(1, 1000);
    INSERT INTO cryptography.key_rotations (user_id, old_key_id, rotation_reason)
        SELECT '{user}', gen_random_uuid(), 'age' FROM generate_series(1, 50);
    SET session_replication_role = origin;
    ANALYZE cryptography.key_rotations;
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
