"""A job of ONE_WORKER: at most one worker of the deployment does its round, and nobody waits for it."""

import asyncio

import psycopg
import pytest

from kms.domain.errors import KmsError, Reason
from kms.jobs.postgres import AdvisoryLocks
from kms.store.pool import connection_settings
from tests.fixtures.postgres import Database

END_HOLDER = b"""
    SELECT pg_terminate_backend(pid, 30000) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
PATIENCE_SECONDS = 30


class Round:
    """A round that goes on until `may_end` is set."""

    def __init__(self) -> None:
        self.began, self.may_end = asyncio.Event(), asyncio.Event()
        self.is_over = False

    async def work(self) -> None:
        self.began.set()
        try:
            await self.may_end.wait()
        finally:
            self.is_over = True


@pytest.fixture
def locks(database: Database) -> AdvisoryLocks:
    return AdvisoryLocks(connection_settings(database.dsn))


async def test_while_one_worker_is_in_a_round_others_skip_theirs_at_once(locks: AdvisoryLocks) -> None:
    first, other, later = Round(), Round(), Round()
    later.may_end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        working = asyncio.create_task(locks.run_alone("work", first.work))
        await first.began.wait()
        assert await locks.run_alone("work", other.work) is False
        assert not other.began.is_set()
        assert await locks.run_alone("other work", later.work) is True
        first.may_end.set()
        assert await working is True
        assert await locks.run_alone("work", later.work) is True


async def test_a_worker_that_is_gone_frees_the_round_and_one_that_still_runs_ends_it(
    database: Database, locks: AdvisoryLocks
) -> None:
    first, second = Round(), Round()
    second.may_end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        working = asyncio.create_task(locks.run_alone("work", first.work))
        await first.began.wait()
        with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
            admin.execute(END_HOLDER)
        assert await locks.run_alone("work", second.work) is True
        with pytest.raises(KmsError) as caught:
            await working
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert first.is_over


async def test_what_the_work_raises_is_raised_and_the_lock_is_free_again(locks: AdvisoryLocks) -> None:
    async def fail() -> None:
        raise LookupError

    after = Round()
    after.may_end.set()
    with pytest.raises(LookupError):
        await locks.run_alone("work", fail)
    assert await locks.run_alone("work", after.work) is True


async def test_a_round_that_is_cancelled_ends_its_work_and_frees_the_lock(locks: AdvisoryLocks) -> None:
    first, after = Round(), Round()
    after.may_end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        working = asyncio.create_task(locks.run_alone("work", first.work))
        await first.began.wait()
        working.cancel()
        await asyncio.wait({working})
        assert first.is_over
        assert await locks.run_alone("work", after.work) is True
