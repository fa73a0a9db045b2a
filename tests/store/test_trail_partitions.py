"""Partitions of the trail: rows of any year land, new partitions come without stopping writers, DEFAULT is told and drained."""

import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
import pytest
from psycopg import errors

from kms.dev.postgres import EmbeddedPostgres
from tests.fixtures.postgres import Database
from tests.store.acting import ensure_partitions, run

EVENT: Final = b"INSERT INTO audit.security_events (event_type, severity, created_at) VALUES ('sign', 'low', %s)"
DOMAIN_EVENT: Final = b"""
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data, occurred_at)
    VALUES (gen_random_uuid(), 'key', 1, 'created', '{}', %s)
"""
PARTITIONS: Final = b"""
    SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s::regclass ORDER BY 1
"""
YEARS: Final = ("0001-01-01", "1970-01-01", "1999-12-31 23:59:59+00", "2123-06-01", "9999-12-31", "12345-01-01")


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def partitions(admin: psycopg.Connection[Any], parent: str) -> list[str]:
    return [name for (name,) in admin.execute(PARTITIONS, (parent,))]


def in_default(database: Database) -> dict[str, int]:
    rows = run(database.dsn, "auditor_users", "", "SELECT parent::text, row_count FROM audit.default_partition_rows()")
    return dict(rows)


def test_partitions_reach_from_2024_to_the_year_after_next(admin: psycopg.Connection[Any]) -> None:
    last = datetime.now(UTC).year + 2
    months = {f"audit.security_events_{year}_{month:02}" for year in range(2024, last + 1) for month in range(1, 13)}
    assert set(partitions(admin, "audit.security_events")) == {*months, "audit.security_events_default"}
    years = {f"audit.domain_events_{year}" for year in range(2024, last + 1)}
    assert set(partitions(admin, "audit.domain_events")) == {*years, "audit.domain_events_default"}


def test_bounds_are_utc_wherever_the_session_is(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"SET timezone = 'Pacific/Auckland'")
    admin.execute(b"SET datestyle = 'German'")
    while admin.execute(b"SELECT audit.ensure_partitions('4 years')").fetchone():
        pass
    admin.execute(b"SET timezone = 'UTC'")
    admin.execute(b"SET datestyle = 'ISO'")
    bounds = admin.execute(
        b"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname ~ '^security_events_[0-9]+_[0-9]+$' AND relkind = 'r'"
    ).fetchall()
    assert len(bounds) >= 60
    month = r"\('\d{4}-\d\d-01 00:00:00\+00'\)"
    assert [text for (text,) in bounds if not re.fullmatch(f"FOR VALUES FROM {month} TO {month}", text)] == []


def test_a_row_of_any_year_lands(admin: psycopg.Connection[Any]) -> None:
    for moment in (*YEARS, "2025-07-15"):
        admin.execute(EVENT, (moment,))
        admin.execute(DOMAIN_EVENT, (moment,))
    query = b"SELECT tableoid::regclass::text FROM audit.security_events ORDER BY created_at"
    found = [name for (name,) in admin.execute(query)]
    assert found.count("audit.security_events_default") == len(YEARS)
    assert "audit.security_events_2025_07" in found
    for moment in ("infinity", "-infinity", "0044-03-15 BC"):
        with pytest.raises(errors.CheckViolation):
            admin.execute(EVENT, (moment,))


def test_what_lies_in_a_default_partition_is_reported_and_can_be_drained(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    assert in_default(database) == {}
    for moment in YEARS:
        admin.execute(EVENT, (moment,))
        admin.execute(DOMAIN_EVENT, (moment,))
    assert in_default(database) == {"audit.security_events": len(YEARS), "audit.domain_events": len(YEARS)}
    contents = b"SELECT id, created_at::text FROM audit.security_events ORDER BY id"
    before = admin.execute(contents).fetchall()
    assert run(database.dsn, "job_runner", "", "SELECT audit.drain_default()") == [(2 * len(YEARS),)]
    assert in_default(database) == {}
    assert admin.execute(contents).fetchall() == before
    assert {"audit.security_events_1999_12", "audit.security_events_12345_01"} <= set(partitions(admin, "audit.security_events"))
    assert "audit.domain_events_0001" in partitions(admin, "audit.domain_events")
    assert run(database.dsn, "job_runner", "", "SELECT audit.drain_default()") == [(0,)]
    admin.execute(EVENT, ("2123-06-30 23:59:59.999999+00",))
    assert in_default(database) == {}


def test_a_drained_partition_keeps_users_apart_as_its_parent_does(database: Database, admin: psycopg.Connection[Any]) -> None:
    admin.execute(EVENT, ("1999-12-31",))
    run(database.dsn, "job_runner", "", "SELECT audit.drain_default()")
    query = b"""
        SELECT c.relrowsecurity AND c.relforcerowsecurity, pg_get_userbyid(c.relowner)::text,
            (SELECT count(*) FROM pg_policy WHERE polrelid = c.oid), (SELECT count(*) FROM pg_index WHERE indrelid = c.oid),
            (SELECT count(*) FROM pg_constraint WHERE conrelid = c.oid AND contype = 'f')
        FROM pg_class AS c WHERE c.oid = %s::regclass
    """
    made = admin.execute(query, ("audit.security_events_1999_12",)).fetchone()
    assert made == (True, "kms_partitions", 4, 5, 1)
    assert made == admin.execute(query, ("audit.security_events_2025_01",)).fetchone()
    assert made == admin.execute(query, ("audit.security_events_default",)).fetchone()


def test_partitions_are_made_ahead_once(database: Database, admin: psycopg.Connection[Any]) -> None:
    made = ensure_partitions(database.dsn, "4 years")
    assert len(made) >= 24
    year = datetime.now(UTC).year + 4
    assert f"audit.domain_events_{year}" in partitions(admin, "audit.domain_events")
    assert ensure_partitions(database.dsn, "4 years") == []


def test_a_call_makes_one_partition_so_that_its_locks_last_for_one(database: Database, admin: psycopg.Connection[Any]) -> None:
    before = len(partitions(admin, "audit.security_events"))
    assert len(run(database.dsn, "job_runner", "", "SELECT audit.ensure_partitions('9 years')")) == 1
    assert len(partitions(admin, "audit.security_events")) == before + 1


@pytest.mark.parametrize("ahead", ["-1 day", "11 years", None])
def test_an_unreasonable_distance_is_refused(database: Database, ahead: str | None) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="expected an interval from 0 to 10 years"):
        run(database.dsn, "job_runner", "", "SELECT audit.ensure_partitions(%s)", (ahead,))


def test_a_month_of_which_default_has_rows_is_left_out_and_the_others_are_made(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    year = datetime.now(UTC).year + 3
    admin.execute(EVENT, (f"{year}-02-10",))
    warnings: list[str] = []
    with psycopg.connect(database.dsn) as connection:
        connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
        connection.execute(b"SET ROLE job_runner")
        while connection.execute(b"SELECT audit.ensure_partitions('4 years')").fetchone():
            pass
    assert len(warnings) == 1
    assert f"{year}-02-01" in warnings[0]
    names = partitions(admin, "audit.security_events")
    assert f"audit.security_events_{year}_01" in names
    assert f"audit.security_events_{year}_02" not in names
    run(database.dsn, "job_runner", "", "SELECT audit.drain_default()")
    assert f"audit.security_events_{year}_02" in partitions(admin, "audit.security_events")


def test_writers_are_not_stopped_by_new_partitions(database: Database, admin: psycopg.Connection[Any]) -> None:
    """One transaction that has written stays open, another writes all the time; neither waits, nor is waited for."""
    longest = 0.0
    done = threading.Event()

    def write() -> None:
        nonlocal longest
        with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
            while not done.is_set():
                started = time.monotonic()
                connection.execute(EVENT, ("2026-01-15",))
                longest = max(longest, time.monotonic() - started)

    with psycopg.connect(database.admin_dsn) as opened:
        opened.execute(EVENT, ("2026-01-01",))
        opened.execute(DOMAIN_EVENT, ("2026-01-01",))
        writer = threading.Thread(target=write)
        writer.start()
        try:
            made = ensure_partitions(database.dsn, "5 years")
        finally:
            done.set()
            writer.join()
        opened.execute(EVENT, ("2026-01-02",))
    assert len(made) >= 36
    assert longest < 1.0


def test_who_reads_everything_is_waited_for_and_nobody_queues_behind(database: Database, admin: psycopg.Connection[Any]) -> None:
    """A long reader holds DEFAULT: ATTACH asks briefly and often, and succeeds when the reader has gone."""
    with psycopg.connect(database.admin_dsn) as reader:
        reader.execute(b"SELECT count(*) FROM audit.security_events")
        outcome: list[int] = []
        attempt = threading.Thread(target=lambda: outcome.append(len(ensure_partitions(database.dsn, "3 years"))))
        attempt.start()
        time.sleep(0.3)
        started = time.monotonic()
        admin.execute(b"SELECT count(*) FROM audit.security_events")
        assert time.monotonic() - started < 2
        assert outcome == []
        reader.rollback()
        attempt.join()
    assert outcome[0] >= 12


def test_two_servers_that_start_at_once_make_each_partition_once(database: Database, admin: psycopg.Connection[Any]) -> None:
    made: list[str] = []
    both = [threading.Thread(target=lambda: made.extend(ensure_partitions(database.dsn, "4 years"))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(made) == len(set(made)) >= 24
    assert set(made) <= {*partitions(admin, "audit.security_events"), *partitions(admin, "audit.domain_events")}


def test_nobody_but_the_job_makes_or_drains_partitions(postgres: EmbeddedPostgres, database: Database) -> None:
    for role in ("authenticated_users", "admin_users", "auditor_users", "none"):
        for call in (
            "audit.ensure_partitions('1 month')",
            "audit.drain_default()",
            "audit.make_like('audit.domain_events', 'x')",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                run(database.dsn, role, "", f"SELECT {call}")
