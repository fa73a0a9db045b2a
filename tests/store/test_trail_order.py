"""The order of the trail: that of the transactions, and nothing appears below the horizon."""

import json
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest

from kms.domain.merkle import Frontier, leaf_hash
from tests.fixtures.postgres import Database
from tests.store.acting import ensure_partitions

EVENT: Final = (
    b"INSERT INTO audit.security_events (event_type, severity, created_at) VALUES ('sign', 'low', %s) RETURNING commit_order"
)
DOMAIN_EVENT: Final = b"""
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data, occurred_at)
    VALUES (gen_random_uuid(), 'key', 1, 'created', '{}', %s) RETURNING commit_order
"""
NOW: Final = "2026-01-01"
HORIZON: Final = b"SELECT audit.order_horizon()"


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def number(connection: psycopg.Connection[Any], query: bytes, *parameters: str) -> int:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])


def test_the_rows_of_a_transaction_have_one_place_and_those_of_the_next_a_later_one(admin: psycopg.Connection[Any]) -> None:
    with admin.transaction():
        first = {number(admin, EVENT, NOW), number(admin, DOMAIN_EVENT, NOW), number(admin, EVENT, "1999-01-01")}
    assert len(first) == 1
    assert number(admin, EVENT, NOW) > max(first)


def test_the_horizon_waits_for_a_transaction_that_can_still_write(database: Database, admin: psycopg.Connection[Any]) -> None:
    with psycopg.connect(database.admin_dsn) as slow:
        held = number(slow, EVENT, NOW)
        later = number(admin, EVENT, NOW)
        assert later > held
        assert number(admin, HORIZON) <= held
        slow.commit()
    assert number(admin, HORIZON) > later


def test_a_row_keeps_its_place_when_it_leaves_the_default_partition(admin: psycopg.Connection[Any]) -> None:
    held = number(admin, EVENT, "1999-01-01")
    number(admin, EVENT, NOW)
    assert number(admin, b"SELECT audit.drain_default()") == 1
    assert number(admin, b"SELECT commit_order FROM audit.security_events_1999_01") == held


def test_partitions_made_later_have_the_order_and_its_index(database: Database, admin: psycopg.Connection[Any]) -> None:
    made = ensure_partitions(database.dsn, "5 years")
    assert len(made) > 12
    query = b"""
        SELECT count(*) FROM pg_index AS i JOIN pg_inherits AS h ON h.inhrelid = i.indexrelid
        WHERE i.indrelid = ANY (%s::regclass[]) AND pg_get_indexdef(i.indexrelid) LIKE '%%(commit_order, id)'
    """
    found = admin.execute(query, (made,)).fetchone()
    assert found == (len(made),)


def test_a_forged_order_does_not_keep_the_order_from_being_raised(admin: psycopg.Connection[Any]) -> None:
    number(admin, EVENT, NOW)
    admin.execute("ALTER TABLE audit.security_events DROP CONSTRAINT commit_order_of_a_transaction")
    admin.execute("UPDATE audit.security_events SET commit_order = 9223372036854775807")
    assert number(admin, b"SELECT audit.raise_order()") == 0


def test_the_lines_and_the_root_of_the_formats_page(admin: psycopg.Connection[Any]) -> None:
    # Whatever the session's settings are.
    admin.execute("SET timezone = 'Pacific/Auckland'")
    admin.execute("SET datestyle = 'German'")
    admin.execute(r"""
        INSERT INTO audit.security_events (
            id, event_type, severity, source_ip, resource_type, action, outcome, risk_score, event_details, created_at,
            commit_order
        ) VALUES (
            '00000000-0000-4000-8000-000000000011', 'key.used', 'low', '192.0.2.1', 'key', 'sign', 'success', 0,
            '{"use_number": 1, "n": "\u00e9\u0001\""}', '2026-01-01 00:00:00.25+00', 7
        );
        INSERT INTO audit.domain_events (
            id, aggregate_id, aggregate_type, aggregate_version, event_type, event_data, occurred_at, commit_order
        ) VALUES (
            '00000000-0000-4000-8000-000000000012', '00000000-0000-4000-8000-0000000000a1', 'key', 1, 'key.created', '{}',
            '2026-01-01 00:00:00+00', 7
        )
    """)
    lines = [
        line.encode()
        for (line,) in admin.execute(
            "SELECT line FROM audit.trail_lines(0, 'audit.security_events', 'ffffffff-ffff-ffff-ffff-ffffffffffff', 100, 9)"
        )
    ]
    assert [leaf_hash(line).hex() for line in lines] == [
        "cb27aa6dab0161d717ec36a79b3f595f03237d329543d3c0479bf2db586dec0e",
        "b22c33816a2e5fd2ce15b58db597b6937bc64b0fd299c872ebb33d5b3e98c63a",
    ]
    root = Frontier().extended(map(leaf_hash, lines)).root().hex()
    assert root == "9c18af3b5861801b57957a9405b282d37cfd47045807ccf52a1297b67bb7a952"
    # RFC 8785: what any other program makes of the same values.
    again = [json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() for line in lines]
    assert again == lines
