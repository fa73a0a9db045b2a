"""The search for policies that are due, and what two workers that find the same one do."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, cast
from uuid import uuid4

import psycopg
import pytest

from kms.app.ports import Hsm
from kms.app.records import Records
from kms.domain.ids import KeyId, KeyName, UserId
from kms.rotation import stored_policies as statements
from kms.rotation.policy import RotationPolicy
from kms.rotation.ports import StoredPolicy
from kms.rotation.postgres import StoredRotations
from kms.rotation.rotation import RotationRequest
from kms.rotation.scheduling import PolicyRounds
from kms.rotation.stored_policies import StoredPolicies
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.jobs.rotations import ALICE, OLD, Rotations
from tests.jobs.test_rotation_plans import indexes
from tests.store.test_plans import WATCH, nested_plans, scanned_whole

POLICY: Final = """
    INSERT INTO cryptography.rotation_policies
        (user_id, key_name, at_usage_percent, on_compromise, is_paused, version, policy_mac, look_at)
    VALUES (%s, 'old', 50, FALSE, FALSE, 1, decode(repeat('00', 32), 'hex'), now())
"""
CHANGES: Final = {
    "key": "UPDATE cryptography.keys SET key_status = 'compromised', compromised_at = now() WHERE key_name = 'old'",
    "policy": "UPDATE cryptography.rotation_policies SET version = 2, look_at = now()",
}
# Without the checks of references and the triggers, which would take most of the time. One in a hundred looks at uses.
FILLED: Final = """
    SET session_replication_role = replica;
    INSERT INTO cryptography.rotation_policies (
        user_id, key_name, every_seconds, at_usage_percent, on_compromise, is_paused, version, policy_mac, look_at
    ) SELECT '{user}', 'key-' || n, 86400, CASE WHEN n % 100 = 0 THEN 50 END, FALSE, FALSE, 1,
        decode(repeat('00', 32), 'hex'), now() + CASE WHEN n % 10000 = 0 THEN interval '-1 day' ELSE interval '1 day' END
    FROM generate_series(1, {count}) AS n;
    INSERT INTO cryptography.keys (
        user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    ) SELECT '{user}', 'key-' || n, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED'
    FROM generate_series(1, {count}) AS n;
    SET session_replication_role = origin;
    ANALYZE cryptography.rotation_policies, cryptography.keys;
"""


async def mac(_: bytes) -> bytes:
    return bytes(32)


def policies(pool: Pool) -> StoredPolicies:
    return StoredPolicies(pool, Records(mac, lambda: datetime.now(UTC)))


async def seen(found: StoredPolicies) -> StoredPolicy:
    """Return the policy of the key `old` as a worker reads it."""
    return next(stored for stored in [each async for each in found.to_look_at()] if stored.name == "old")


def request() -> RotationRequest:
    now = datetime.now(UTC)
    return RotationRequest(uuid4(), UserId(ALICE), KeyId(OLD), "policy: every 1 day", None, False, now)


async def test_workers_that_find_the_same_key_due_make_one_rotation(store: Pool, database: Database) -> None:
    rotations = Rotations(database)
    rotations.run(POLICY, (ALICE,))
    found = policies(store)
    stored = await seen(found)
    asked = await asyncio.gather(*(found.request(request(), stored, 300) for _ in range(4)))
    assert sorted(asked) == [False, False, False, True]
    assert rotations.run("SELECT requests FROM cryptography.rotation_policies") == [(1,)], "one was asked for"
    assert rotations.run("SELECT old_key_id, initiated_by, rotation_reason FROM cryptography.key_rotations") == [
        (OLD, None, "policy: every 1 day")
    ]


async def test_a_key_that_has_a_successor_meanwhile_is_not_asked_for(store: Pool, database: Database) -> None:
    rotations = Rotations(database)
    rotations.run(POLICY, (ALICE,))
    found = policies(store)
    rotations.run("UPDATE cryptography.keys SET key_name = 'old@1', superseded_at = now() WHERE id = %s", (OLD,))
    stored = await seen(found)
    assert not await found.request(request(), stored, 300)
    assert not await found.request(request(), replace(stored, name=KeyName("new")), 300), "another key has the name"
    assert rotations.run("SELECT FROM cryptography.key_rotations") == []


async def test_a_rotation_that_is_under_way_is_not_counted_as_asked_for(store: Pool, database: Database) -> None:
    rotations = Rotations(database)
    rotations.add()
    rotations.run(POLICY, (ALICE,))
    found = policies(store)
    assert not await found.request(request(), await seen(found), 300)
    assert rotations.run("SELECT requests, look_at > now() FROM cryptography.rotation_policies") == [(0, True)]


@pytest.mark.parametrize("change", ["key", "policy"])
async def test_what_changes_while_a_worker_looks_is_looked_at_again(store: Pool, database: Database, change: str) -> None:
    """The worker has read the policy and the key, and says afterwards what follows from what it has read."""
    rotations = Rotations(database)
    rotations.run(POLICY, (ALICE,))
    found = policies(store)
    stored = await seen(found)
    rotations.run(CHANGES[change])
    await found.look_later(stored, None)
    assert not await found.request(request(), stored, 300)
    rows = rotations.run("SELECT look_at <= clock_timestamp(), requests FROM cryptography.rotation_policies")
    assert rows == [(True, 0)]
    await found.look_later(await seen(found), None)
    assert rotations.run("SELECT look_at FROM cryptography.rotation_policies") == [(None,)]


async def test_a_moment_without_end_holds_up_no_search(store: Pool, database: Database) -> None:
    rotations = Rotations(database)
    rotations.run(POLICY, (ALICE,))
    rotations.run("UPDATE cryptography.rotation_policies SET look_at = '-infinity'")
    found = policies(store)
    await found.look_later(await seen(found), None)
    assert rotations.run("SELECT look_at FROM cryptography.rotation_policies") == [(None,)]


async def test_a_bug_that_one_policy_meets_holds_up_no_other(store: Pool, database: Database) -> None:
    rotations = Rotations(database)
    for name in ("met", "other"):
        rotations.run(POLICY.replace("'old'", "%s"), (ALICE, name))

    class Policies(StoredPolicies):
        async def proven(self, stored: StoredPolicy) -> RotationPolicy:
            if stored.name == "met":
                raise OverflowError
            return await StoredPolicies.proven(self, stored)

    records = Records(mac, lambda: datetime.now(UTC))
    hsm = cast(Hsm, None)  # nothing is due
    assert await PolicyRounds(Policies(store, records), StoredRotations(store, records), hsm).ask_for_due() == 0
    found = rotations.run("SELECT look_at > now(), requests FROM cryptography.rotation_policies ORDER BY key_name")
    assert found == [(True, 1), (None, 0)], "the one is looked at later, the other has no key"


async def test_uses_are_found_page_by_page(store: Pool, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of two among five policies: those whose keys have reached their share are found, wherever they are."""
    monkeypatch.setattr(statements, "WALKED_MAX", 2)
    rotations = Rotations(database)
    for number, uses in enumerate((5, 4, 0, 9, 10)):
        rotations.run(
            """INSERT INTO cryptography.keys (
                user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin,
                usage_counter, max_usage_count
            ) VALUES (%s, %s, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED', %s, 10)""",
            (ALICE, f"k{number}", uses),
        )
        rotations.run(POLICY.replace("'old'", "%s"), (ALICE, f"k{number}"))
    rotations.run("UPDATE cryptography.rotation_policies SET look_at = NULL")
    assert [stored.name async for stored in policies(store).to_look_at()] == ["k0", "k3", "k4"]
    rotations.run("UPDATE cryptography.keys SET deactivated_at = now(), key_status = 'inactive' WHERE key_name = 'k0'")
    rotations.run("UPDATE cryptography.rotation_policies SET is_paused = TRUE WHERE key_name = 'k3'")
    rotations.run("UPDATE cryptography.rotation_policies SET look_at = NULL")
    assert [stored.name async for stored in policies(store).to_look_at()] == ["k4"]


@pytest.fixture(scope="module", params=[20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def filled(filled_database: Database, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(filled_database.admin_dsn, autocommit=True) as connection:
        connection.execute(FILLED.format(user=ALICE, count=request.param).encode())
        connection.execute(WATCH)
        yield connection


@pytest.mark.parametrize(
    ("name", "searched"),
    [("TO_LOOK_AT", {"idx_rotation_policies_look"}), ("REACHED", {"idx_rotation_policies_usage", "keys_user_id_key_name_key"})],
)
def test_the_search_for_due_policies_reads_no_table_whole(filled: psycopg.Connection[Any], name: str, searched: set[str]) -> None:
    plans = [plan for plan in nested_plans(filled, "job_runner", getattr(statements, name)) if "rotation_policies" in str(plan)]
    assert [table for plan in plans for table in scanned_whole(plan)] == []
    assert {index for plan in plans for index in indexes(plan)} == searched


LEASED: Final = """
    UPDATE cryptography.key_rotations
    SET initiated_by = NULL, lease_owner = %s, claim_number = 1, migration_status = 'in_progress', attempts = 1
"""
SWITCH: Final = """
    SELECT cryptography.switch_key(
        %s, %s, 1, 1, 'old@1', decode(repeat('00', 32), 'hex'), to_jsonb(k), clock_timestamp() - interval '1 hour', %s
    ) FROM cryptography.keys AS k WHERE k.key_name = 'old'
"""


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ("SELECT", "BUSY"),  # the moment has passed: nothing else is in the way
        ("UPDATE cryptography.rotation_policies SET is_paused = TRUE", "STALE"),
        ("UPDATE cryptography.rotation_policies SET version = 2", "STALE"),
        ("DELETE FROM cryptography.rotation_policies", "STALE"),
        ("DELETE FROM cryptography.rotation_policies; UPDATE cryptography.key_rotations SET initiated_by = user_id", "BUSY"),
    ],
    ids=["as it was", "paused", "changed", "cleared", "a user asked"],
)
def test_a_policy_that_changes_before_the_switch_has_no_key_switched(database: Database, change: str, verdict: str) -> None:
    rotations, worker = Rotations(database), uuid4()
    [rotation] = rotations.add()
    rotations.run(POLICY, (ALICE,))
    rotations.run(LEASED, (worker,))
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(change.encode())
        row = connection.execute(SWITCH.encode(), (rotation, worker, 1)).fetchone()
    assert row == (verdict,)
