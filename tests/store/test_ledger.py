"""The ledger: what is charged is recorded, what is recorded was allowed, and limits are exact."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product
from uuid import uuid4

import psycopg
import pytest

from kms.app.ports import Entry, User
from kms.domain.algorithms import KeyType
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move, State, Use, check_use
from kms.domain.permissions import needed_for
from kms.store.batches import BatchConnection, connect, encoded
from kms.store.keys import StoredKeys
from kms.store.ledger import StoredLedger, open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, connection_settings
from kms.store.repeats import StoredRepeats
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS
from tests.store.uses import a_call, charges, counter, decrypt, make_key, make_user, reason, rows, sign


@pytest.fixture
async def ledger(database: Database, store: Pool) -> AsyncIterator[StoredLedger]:
    async with open_ledger(database.dsn, store) as opened:
        yield opened


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


@pytest.fixture
async def bob(store: Pool) -> User:
    return await make_user(store, "bob")


async def settle_all(ledger: StoredLedger, entries: list[Entry]) -> list[str]:
    """Settle all at once and return a word for each."""
    return [reason(outcome) for outcome in await asyncio.gather(*map(ledger.settle, entries), return_exceptions=True)]


async def test_keys_are_locked_in_the_order_of_their_ids(database: Database, store: Pool, alice: User) -> None:
    keys = sorted([await make_key(store, alice) for _ in range(9)], key=lambda key: key.identity.key_id)
    ids = [key.identity.key_id for key in keys]
    free = "SELECT id FROM cryptography.keys WHERE id = ANY (%s) FOR UPDATE SKIP LOCKED"
    waits = """
        SELECT count(*) AS number FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE %s AND wait_event_type = 'Lock'
    """
    direct = await connect(connection_settings(database.dsn), seconds=5)
    await direct.ask("SELECT set_config('lock_timeout', '0', false)", {}, seconds=5)
    batches = BatchConnection(direct)
    with psycopg.connect(database.admin_dsn) as holder:
        for held in (4, 7, 1):
            holder.execute("SELECT FROM cryptography.keys WHERE id = %s FOR UPDATE", (ids[held],))
            texts = [encoded(sign(alice, keys[place])) for place in (3, 8, 1, 6, 0, 7, 4, 2, 5)]
            settling = asyncio.create_task(batches.settle(texts, seconds=5))
            while not rows(database, waits, "%cryptography.settle%")[0]["number"]:  # noqa: ASYNC110  # no event here
                await asyncio.sleep(0.01)
            # It has all that come before the one that it waits for, and none behind: so no two batches wait for each other.
            assert {row["id"] for row in rows(database, free, ids)} == set(ids[held + 1 :])
            holder.rollback()
            assert await settling == ["OK"] * 9
    await direct.close()


async def test_no_statement_or_transaction_of_the_ledger_goes_on_without_end(database: Database) -> None:
    connection = await connect(connection_settings(database.dsn), seconds=5)
    limits = """
        SELECT jsonb_object_agg(name, setting::int) FROM pg_settings
        WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout')
    """
    found = await connection.ask(limits, {}, seconds=5)
    assert found == {"statement_timeout": 4000, "lock_timeout": 1000, "idle_in_transaction_session_timeout": 4000}
    await connection.close()


async def test_a_use_is_charged_and_recorded(database: Database, store: Pool, ledger: StoredLedger, alice: User) -> None:
    key = await make_key(store, alice)
    entry = sign(alice, key)
    await ledger.settle(entry)
    after = await StoredKeys(store, RECORDS).find(alice.user_id, key.identity.key_id)
    assert after is not None
    assert (after.usage_counter, after.version, after.state) == (1, key.version, State.ACTIVE)
    assert after.last_used_at is not None
    query = """
        SELECT event_type, severity, user_id, host(source_ip) AS peer, resource_type, resource_id, action, outcome, event_details
        FROM audit.security_events WHERE action = 'sign'
    """
    assert rows(database, query) == [
        {
            "event_type": "key.used",
            "severity": "low",
            "user_id": alice.user_id,
            "peer": "192.0.2.7",
            "resource_type": "key",
            "resource_id": key.identity.key_id,
            "action": "sign",
            "outcome": "success",
            "event_details": {
                "algorithm": "ECDSA_SHA256",
                "message_bytes": 3,
                "request_id": entry.call.request_id,
                "key_version": 1,
                "charged": True,
                "use_number": 1,
            },
        }
    ]


async def test_a_use_that_is_not_charged_is_recorded(database: Database, store: Pool, ledger: StoredLedger, alice: User) -> None:
    key = await make_key(store, alice, KeyType.AES)
    await ledger.settle(decrypt(alice, key))
    assert (counter(database, key), charges(database, key)) == (0, 0)
    assert len(rows(database, "SELECT id FROM audit.security_events WHERE action = 'decrypt'")) == 1


async def test_a_peer_that_is_no_address_is_left_out(database: Database, store: Pool, ledger: StoredLedger, alice: User) -> None:
    entry = sign(alice, await make_key(store, alice))
    await ledger.settle(replace(entry, call=replace(entry.call, peer="unix:")))
    assert rows(database, "SELECT source_ip FROM audit.security_events WHERE action = 'sign'") == [{"source_ip": None}]


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_a_limit_is_reached_and_never_passed(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, limit: int
) -> None:
    key = await make_key(store, alice, max_usage_count=limit)
    async with open_ledger(database.dsn, store) as other:
        tried = [(ledger, other)[number % 2].settle(sign(alice, key)) for number in range(limit + 50)]
        outcomes = Counter(map(reason, await asyncio.gather(*tried, return_exceptions=True)))
    assert outcomes == {"OK": limit, "USAGE_LIMIT_REACHED": 50}
    assert (counter(database, key), charges(database, key)) == (limit, limit)
    numbers = rows(database, "SELECT (event_details ->> 'use_number')::int AS n FROM audit.security_events WHERE action = 'sign'")
    assert sorted(row["n"] for row in numbers) == list(range(1, limit + 1))


async def test_a_key_at_its_limit_is_inactive_with_a_line_of_the_trail_and_no_stored_state(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice, max_usage_count=2)
    await settle_all(ledger, [sign(alice, key), sign(alice, key)])
    after = await StoredKeys(store, RECORDS).find(alice.user_id, key.identity.key_id)
    assert after is not None
    assert (after.state, after.version, after.deactivated_at) == (State.INACTIVE, key.version, None)
    query = """
        SELECT severity, user_id, event_details FROM audit.security_events
        WHERE resource_id = %s AND event_type = 'key.limit_reached'
    """
    line = {"severity": "medium", "user_id": alice.user_id, "event_details": {"usage_counter": 2}}
    assert rows(database, query, key.identity.key_id) == [line]
    assert await settle_all(ledger, [sign(alice, key)]) == ["USAGE_LIMIT_REACHED"]
    assert rows(database, query, key.identity.key_id) == [line]


async def test_an_aes_key_makes_two_to_the_32_ciphertexts(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice, KeyType.AES, max_usage_count=2**40)
    other = await make_key(store, alice, KeyType.RSA)
    rows(database, "UPDATE cryptography.keys SET usage_counter = 4294967295")
    assert await settle_all(ledger, [sign(alice, key), sign(alice, key)]) == ["OK", "USAGE_LIMIT_REACHED"]
    assert await settle_all(ledger, [sign(alice, other), sign(alice, other)]) == ["OK", "OK"]


async def test_every_entry_of_a_mixed_batch_gets_its_own_verdict(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, bob: User
) -> None:
    good, limited, inactive = [await make_key(store, alice, max_usage_count=limit) for limit in (None, 2, None)]
    lifecycle = StoredLifecycle(store, RECORDS)
    inactive = await lifecycle.move(a_call(alice), inactive.identity.key_id, Move.DEACTIVATE, Change(), version=None)
    entries = [
        sign(alice, limited),
        sign(alice, good),
        sign(bob, good),
        sign(alice, limited),
        replace(sign(alice, good), version=2),
        sign(alice, inactive),
        decrypt(alice, inactive),
        sign(alice, limited),
        sign(replace(alice, version=alice.version + 1), good),
        replace(sign(alice, good), key_id=KeyId(uuid4())),
        decrypt(alice, limited),
        sign(alice, good),
    ]
    assert await settle_all(ledger, entries) == [
        "OK",
        "OK",
        "KEY_NOT_FOUND",
        "OK",
        "STALE",
        "KEY_INACTIVE",
        "OK",
        "USAGE_LIMIT_REACHED",
        "CREDENTIALS_INVALID",
        "KEY_NOT_FOUND",
        "OK",
        "OK",
    ]
    assert ledger.status().batches == 1
    assert [counter(database, key) for key in (good, limited, inactive)] == [2, 2, 0]
    assert [charges(database, key) for key in (good, limited, inactive)] == [2, 2, 0]


_MOVES = [
    (Move.REVOKE, Reason.KEY_REVOKED),
    (Move.COMPROMISE, Reason.KEY_COMPROMISED),
    (Move.DEACTIVATE, Reason.KEY_INACTIVE),
]


@pytest.mark.parametrize(("move", "refusal"), _MOVES)
async def test_after_a_move_has_returned_no_use_succeeds(
    store: Pool, ledger: StoredLedger, alice: User, move: Move, refusal: Reason
) -> None:
    key = await make_key(store, alice)
    flood = [asyncio.create_task(settle_all(ledger, [sign(alice, key)] * 3)) for _ in range(20)]
    await asyncio.sleep(0.005)
    await StoredLifecycle(store, RECORDS).move(a_call(alice), key.identity.key_id, move, Change(), version=None)
    assert await settle_all(ledger, [sign(alice, key)] * 20) == [refusal] * 20
    assert {word for words in await asyncio.gather(*flood) for word in words} <= {"OK", refusal}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("UPDATE cryptography.keys SET expires_at = clock_timestamp(), created_at = '2020-01-01'", "KEY_EXPIRED"),
        (
            "UPDATE cryptography.keys SET activated_at = clock_timestamp() + interval '1 h', key_status = 'inactive'",
            "KEY_PRE_ACTIVE",
        ),
        ("UPDATE cryptography.keys SET destruction_scheduled_at = clock_timestamp() + interval '1 h'", "KEY_PENDING_DESTRUCTION"),
        ("UPDATE cryptography.keys SET destruction_scheduled_at = clock_timestamp()", "KEY_DESTROYED"),
        ('UPDATE cryptography.keys SET metadata = \'{"a": "b"}\'', "STALE"),
        ("UPDATE authentication.users SET version = version + 1", "CREDENTIALS_INVALID"),
        ("UPDATE authentication.users SET deleted_at = clock_timestamp()", "CREDENTIALS_INVALID"),
        ("UPDATE authentication.users SET locked_until = clock_timestamp() + interval '1 h'", "CREDENTIALS_INVALID"),
    ],
)
async def test_what_the_database_says_at_that_moment_decides(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, change: str, refusal: str
) -> None:
    key = await make_key(store, alice)
    rows(database, change)
    assert await settle_all(ledger, [sign(alice, key)]) == [refusal]
    assert (counter(database, key), charges(database, key)) == (0, 0)


async def test_the_uses_in_sql_are_the_uses_in_python(database: Database) -> None:
    for state, use in product(State, Use):
        expected = None
        try:
            check_use(state, use)
        except KmsError as error:
            expected = error.reason.value
        assert rows(database, "SELECT cryptography.use_refusal(%s, %s) AS refusal", state, use) == [{"refusal": expected}]
    for use in Use:
        found = rows(database, "SELECT cryptography.use_permission(%s) AS permission", use)
        assert found == [{"permission": needed_for(use)}]


@pytest.mark.parametrize(("status", "use"), [("compromised", Use.PROCESS_COMPROMISED), ("revoked", Use.PROCESS_REVOKED)])
async def test_the_charge_itself_asks_for_the_permission_of_a_use_and_records_it_as_high(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, status: str, use: Use
) -> None:
    key = await make_key(store, alice)
    rows(database, f"UPDATE cryptography.keys SET key_status = '{status}', {status}_at = clock_timestamp()")
    rows(database, "SELECT authentication.assign_role(%s, 'recovery')", alice.user_id)
    may = replace(alice, version=alice.version + 1)
    entry = replace(decrypt(may, key), use=use, version=key.version + 1)
    plain = replace(entry, use=Use.PROCESS)
    assert await settle_all(ledger, [entry, plain]) == ["OK", f"KEY_{status.upper()}"]
    # A role that runs out advances no version.
    rows(database, "UPDATE authentication.user_roles SET expires_at = clock_timestamp()")
    assert await settle_all(ledger, [entry, plain]) == ["PERMISSION_DENIED", f"KEY_{status.upper()}"]
    lines = rows(database, "SELECT severity, risk_score FROM audit.security_events WHERE event_type = 'key.used'")
    assert lines == [{"severity": "high", "risk_score": 60}]


async def test_counter_and_records_agree_whatever_is_cancelled(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice)
    told: Counter[str] = Counter()

    async def settle_with_little_time(seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await ledger.settle(sign(alice, key))
            told["OK"] += 1
        except TimeoutError:
            told["DROPPED"] += 1
        except KmsError as error:
            told[error.reason] += 1

    await asyncio.gather(*(settle_with_little_time(0.0005 * number) for number in range(100)))
    await ledger.settle(sign(alice, key))
    assert set(told) <= {"OK", "DROPPED", "OUTCOME_UNKNOWN"}
    assert told["OK"] + 1 <= counter(database, key) <= told["OK"] + told["OUTCOME_UNKNOWN"] + 1
    assert charges(database, key) == counter(database, key)


async def test_a_caller_who_gave_up_before_it_was_sent_is_not_charged(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice)
    waiting = asyncio.create_task(ledger.settle(sign(alice, key)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await ledger.settle(sign(alice, key))
    assert counter(database, key) == 1


async def test_an_entry_that_the_database_cannot_take_harms_no_other(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice)
    poisoned = replace(sign(alice, key), details={"text": "\x00"})
    outcomes = await asyncio.gather(
        ledger.settle(sign(alice, key)), ledger.settle(poisoned), ledger.settle(sign(alice, key)), return_exceptions=True
    )
    assert (outcomes[0], outcomes[2]) == (None, None)
    assert isinstance(outcomes[1], KmsError)
    assert outcomes[1].reason is Reason.STORE_UNAVAILABLE
    assert (counter(database, key), charges(database, key)) == (2, 2)


async def test_a_key_that_somebody_holds_stops_no_other_for_long(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    held, free = await make_key(store, alice), await make_key(store, alice)
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute("SELECT id FROM cryptography.keys WHERE id = %s FOR UPDATE", (held.identity.key_id,))
        entries = [sign(alice, held), sign(alice, free), sign(alice, held), sign(alice, free)]
        words = await settle_all(ledger, entries)
    assert words == ["STORE_UNAVAILABLE", "OK", "STORE_UNAVAILABLE", "OK"]
    assert (counter(database, held), counter(database, free)) == (0, 2)
    assert await settle_all(ledger, [sign(alice, held)]) == ["OK"]


async def test_more_than_the_queue_holds_is_refused_at_once(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store, queue_max=5) as small:
        words = await settle_all(small, [sign(alice, key)] * 9)
    assert words == ["OK"] * 5 + ["STORE_UNAVAILABLE"] * 4
    assert counter(database, key) == 5


async def test_closing_settles_what_waits_and_takes_no_more(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store) as opened:
        waiting = [asyncio.create_task(opened.settle(sign(alice, key))) for _ in range(300)]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert counter(database, key) == 300
    assert await settle_all(opened, [sign(alice, key)]) == ["STORE_UNAVAILABLE"]


_PROCESS = """
import asyncio, sys
from tests.store.uses import reason, sign
from kms.app.ports import User
from kms.domain.ids import KeyName, UserId
from kms.store.keys import StoredKeys
from kms.store.ledger import open_ledger
from kms.store.pool import open_pool
from tests.store.records import RECORDS
from uuid import UUID

async def main(dsn, user_id, name, tries):
    user = User(UserId(UUID(user_id)), "alice", 0)
    async with open_pool(dsn, 2) as pool, open_ledger(dsn, pool) as ledger:
        key = await StoredKeys(pool, RECORDS).find(user.user_id, KeyName(name))
        outcomes = await asyncio.gather(*(ledger.settle(sign(user, key)) for _ in range(int(tries))), return_exceptions=True)
        print(sum(reason(outcome) == "OK" for outcome in outcomes))

asyncio.run(main(*sys.stdin.read().splitlines()))
"""


def use_in_another_process(database: Database, user: User, key: KeyRecord, tries: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", _PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write("\n".join([database.dsn, str(user.user_id), key.name, str(tries)]))
    process.stdin.close()
    return process


async def test_a_limit_holds_across_processes(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice, max_usage_count=300)
    processes = [use_in_another_process(database, alice, key, 150) for _ in range(3)]
    given = 0
    for process in processes:
        with process:
            assert process.stdout is not None
            given += int(await asyncio.to_thread(process.stdout.read))
    assert given == 300
    assert (counter(database, key), charges(database, key)) == (300, 300)


async def test_a_ledger_that_was_idle_for_a_day_goes_on(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice)
    await ledger.settle(sign(alice, key))
    rows(database, "UPDATE cryptography.ledger_writers SET written_at = written_at - interval '25 h'")
    await StoredRepeats(store).forget()
    assert rows(database, "SELECT batch FROM cryptography.ledger_writers") == []
    assert await settle_all(ledger, [sign(alice, key) for _ in range(5)]) == ["OK"] * 5
    assert (counter(database, key), ledger.status().losses) == (6, 0)


async def test_a_key_whose_history_is_out_of_step_is_used_as_any_other(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, bob: User
) -> None:
    mine, theirs = await make_key(store, alice, max_usage_count=2), await make_key(store, bob)
    query = "UPDATE audit.aggregate_heads SET aggregate_version = aggregate_version + 1 WHERE aggregate_id = %s"
    rows(database, query, mine.identity.key_id)
    uses = [sign(bob, theirs), sign(alice, mine), sign(alice, mine), sign(alice, mine), sign(bob, theirs)]
    assert await settle_all(ledger, uses) == ["OK", "OK", "OK", "USAGE_LIMIT_REACHED", "OK"]
    assert (counter(database, mine), counter(database, theirs)) == (2, 2)
