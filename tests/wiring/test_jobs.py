"""The service's own work: repeated, whatever happens in one round of it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kms.domain.errors import KmsError, Reason
from kms.store.ledger import open_ledger
from kms.store.pool import Pool
from kms.store.repeats import StoredRepeats
from kms.wiring.jobs import forget_answers, repeating
from tests.fixtures.postgres import Database
from tests.store.uses import a_repeat, make_key, make_user, rows, sign


def failing(error: Exception, done: asyncio.Event) -> Callable[[], Awaitable[None]]:
    """Return work that fails the first time."""
    failures = [error]

    async def work() -> None:
        if failures:
            raise failures.pop()
        done.set()

    return work


@pytest.mark.parametrize("error", [KmsError(Reason.STORE_UNAVAILABLE, "away"), ValueError("bug")])
async def test_work_that_failed_is_done_again(error: Exception) -> None:
    done = asyncio.Event()
    async with repeating("work", 0.01, failing(error, done)):
        await asyncio.wait_for(done.wait(), 5)


async def test_work_ends_with_the_block() -> None:
    rounds: list[None] = []
    thrice = asyncio.Event()

    async def work() -> None:
        rounds.append(None)
        if len(rounds) == 3:
            thrice.set()

    async with repeating("work", 0.01, work):
        await asyncio.wait_for(thrice.wait(), 5)
    there = len(rounds)
    await asyncio.sleep(0.05)
    assert len(rounds) == there


async def test_answers_that_are_no_longer_given_are_removed_all_of_them(database: Database, store: Pool) -> None:
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store) as ledger:
        await ledger.settle(sign(alice, key, repeat=a_repeat("order-1")))
    rows(
        database,
        """INSERT INTO cryptography.request_records (user_id, rpc, request_id, body_mac, result, event_id, created_at)
        SELECT user_id, rpc, 'old-' || n, body_mac, result, event_id, created_at - interval '25 h'
        FROM cryptography.request_records, generate_series(1, 20001) AS n""",
    )
    await forget_answers(StoredRepeats(store))
    assert rows(database, "SELECT request_id FROM cryptography.request_records") == [{"request_id": "order-1"}]
