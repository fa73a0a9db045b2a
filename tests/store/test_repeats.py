"""Repeats: one request is charged once and has one answer, for 24 hours."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kms.app.ports import Call, User
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move
from kms.store.ledger import StoredLedger, open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool
from kms.store.repeats import StoredRepeats
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS
from tests.store.uses import a_call, a_repeat, charges, counter, make_key, make_user, reason, rows, sign


@pytest.fixture
async def ledger(database: Database, store: Pool) -> AsyncIterator[StoredLedger]:
    async with open_ledger(database.dsn, store) as opened:
        yield opened


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


@pytest.fixture
async def key(store: Pool, alice: User) -> KeyRecord:
    return await make_key(store, alice)


async def test_what_was_kept_is_found_by_its_user_its_rpc_and_its_id(
    store: Pool, ledger: StoredLedger, alice: User, key: KeyRecord
) -> None:
    kept = a_repeat("order-1", bytes(range(256)))
    await ledger.settle(sign(alice, key, repeat=kept))
    assert await ledger.earlier(alice.user_id, "Sign", "order-1") == kept
    assert await ledger.earlier(alice.user_id, "Sign", "order-2") is None
    assert await ledger.earlier(alice.user_id, "Encrypt", "order-1") is None
    assert await ledger.earlier((await make_user(store, "bob")).user_id, "Sign", "order-1") is None


@pytest.mark.parametrize("planted", [None, "text", 1])
async def test_what_is_no_bytes_is_an_answer_that_proves_nothing(alice: User, planted: object) -> None:
    """A database owner replaced the function that finds answers."""

    class Planted:
        async def fetch(self, *_: object) -> list[dict[str, object]]:
            return [{"body_mac": planted, "result": planted}]

    found = await StoredRepeats(Planted()).earlier(alice.user_id, "Sign", "order-1")  # type: ignore[arg-type]
    assert found is not None
    assert (found.body_mac, found.result) == (b"", b"")


async def test_of_many_at_once_one_is_charged_and_the_others_begin_again(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, key: KeyRecord
) -> None:
    async with open_ledger(database.dsn, store) as other:
        tried = [
            (ledger, other)[number % 2].settle(sign(alice, key, repeat=a_repeat("order-1", b"%d" % number)))
            for number in range(20)
        ]
        outcomes = await asyncio.gather(*tried, return_exceptions=True)
    assert sorted(map(reason, outcomes)) == ["OK"] + ["STALE"] * 19
    winner = outcomes.index(None)
    assert await ledger.earlier(alice.user_id, "Sign", "order-1") == a_repeat("order-1", b"%d" % winner)
    assert (counter(database, key), charges(database, key)) == (1, 1)


async def test_another_body_under_the_same_id_is_refused(
    database: Database, ledger: StoredLedger, alice: User, key: KeyRecord
) -> None:
    entries = [sign(alice, key, repeat=a_repeat("order-1", body_mac=mac)) for mac in (b"one", b"two")]
    outcomes = await asyncio.gather(*map(ledger.settle, entries), return_exceptions=True)
    assert list(map(reason, outcomes)) == ["OK", "REQUEST_ID_REUSED"]
    assert counter(database, key) == 1


async def test_a_repeat_whose_key_has_reached_its_limit_begins_again_and_is_found(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    key = await make_key(store, alice, max_usage_count=1)
    entry = sign(alice, key, repeat=a_repeat("order-1"))
    others = [sign(alice, key, repeat=a_repeat("order-2")), entry, sign(alice, key)]
    outcomes = await asyncio.gather(*map(ledger.settle, [entry, *others]), return_exceptions=True)
    assert list(map(reason, outcomes)) == ["OK", "USAGE_LIMIT_REACHED", "STALE", "USAGE_LIMIT_REACHED"]
    outcomes = await asyncio.gather(*map(ledger.settle, [entry, *others]), return_exceptions=True)
    assert list(map(reason, outcomes)) == ["STALE", "USAGE_LIMIT_REACHED", "STALE", "USAGE_LIMIT_REACHED"]
    assert await ledger.earlier(alice.user_id, "Sign", "order-2") is None
    assert rows(database, "SELECT request_id FROM cryptography.request_records") == [{"request_id": "order-1"}]
    assert counter(database, key) == 1


@pytest.mark.parametrize("move", [Move.REVOKE, Move.COMPROMISE])
async def test_a_repeat_on_a_revoked_or_compromised_key_is_refused(
    store: Pool, ledger: StoredLedger, alice: User, key: KeyRecord, move: Move
) -> None:
    entry = sign(alice, key, repeat=a_repeat("order-1"))
    await ledger.settle(entry)
    await StoredLifecycle(store, RECORDS).move(a_call(alice), key.identity.key_id, move, Change(), version=None)
    outcomes = await asyncio.gather(ledger.settle(entry), return_exceptions=True)
    assert reason(outcomes[0]) == f"KEY_{move.upper()}D"


async def test_what_is_refused_is_not_kept(database: Database, ledger: StoredLedger, alice: User, key: KeyRecord) -> None:
    entry = replace(sign(alice, key, repeat=a_repeat("order-1")), version=7)
    assert list(map(reason, await asyncio.gather(ledger.settle(entry), return_exceptions=True))) == ["STALE"]
    assert rows(database, "SELECT 1 FROM cryptography.request_records") == []


async def test_after_24_hours_the_id_is_free(
    database: Database, store: Pool, ledger: StoredLedger, alice: User, key: KeyRecord
) -> None:
    await ledger.settle(sign(alice, key, repeat=a_repeat("order-1", b"first")))
    rows(database, "UPDATE cryptography.request_records SET created_at = created_at - interval '24 h'")
    assert await ledger.earlier(alice.user_id, "Sign", "order-1") is None
    second = a_repeat("order-1", b"second", b"other body")
    await ledger.settle(sign(alice, key, repeat=second))
    assert await ledger.earlier(alice.user_id, "Sign", "order-1") == second
    assert counter(database, key) == 2
    rows(database, "UPDATE cryptography.request_records SET created_at = created_at - interval '23 h'")
    assert await StoredRepeats(store).forget() == 0
    rows(database, "UPDATE cryptography.request_records SET created_at = created_at - interval '1 h'")
    assert await StoredRepeats(store).forget() == 1
    assert rows(database, "SELECT 1 FROM cryptography.request_records") == []


async def test_batches_with_the_same_ids_in_opposite_orders_do_not_wait_for_each_other(
    database: Database, store: Pool, ledger: StoredLedger, alice: User
) -> None:
    keys = [await make_key(store, alice) for _ in range(4)]
    async with open_ledger(database.dsn, store) as other:
        for number in range(20):
            ids = [f"a-{number}", f"b-{number}"]
            there = [ledger.settle(sign(alice, key, repeat=a_repeat(i))) for key, i in zip(keys[:2], ids, strict=True)]
            back = [other.settle(sign(alice, key, repeat=a_repeat(i))) for key, i in zip(keys[2:], reversed(ids), strict=True)]
            words = sorted(map(reason, await asyncio.gather(*there, *back, return_exceptions=True)))
            assert words == ["OK", "OK", "STALE", "STALE"]
        assert ledger.status().batches + other.status().batches == 40


async def test_an_answer_is_kept_with_the_line_of_the_trail_that_was_written_with_it(
    database: Database, ledger: StoredLedger, alice: User, key: KeyRecord
) -> None:
    call = Call(alice, "rpc-77", "192.0.2.1")
    await ledger.settle(replace(sign(alice, key, repeat=a_repeat("order-1")), call=call))
    query = """
        SELECT e.event_details ->> 'request_id' AS id
        FROM cryptography.request_records AS r JOIN audit.security_events AS e ON e.id = r.event_id
    """
    assert rows(database, query) == [{"id": "rpc-77"}]
