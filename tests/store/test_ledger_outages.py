"""The ledger when the database is killed, stopped or cut off: no result without a record, no charge that an answer denies."""

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from kms.app.ports import User
from kms.dev.postgres import FAST_UNSAFE, EmbeddedPostgres, embedded_postgres
from kms.domain.errors import KmsError
from kms.domain.keys import KeyRecord
from kms.store import ledger as ledgers
from kms.store.batches import BatchConnection
from kms.store.ledger import StoredLedger, open_ledger
from kms.store.pool import Pool, open_pool
from tests.fixtures.clusters import Clusters, passable_directory
from tests.fixtures.postgres import Database, template_of
from tests.store.uses import charges, counter, make_key, make_user, reason, sign

_SETTINGS = {**FAST_UNSAFE, "synchronous_commit": "on"}


@pytest.fixture
def directory(clusters: Clusters) -> Iterator[Path]:
    """That of a migrated cluster, nobody else's."""
    with passable_directory() as own:
        clusters.copy_migrated(own)
        yield own


def postmaster(server: EmbeddedPostgres) -> int:
    return int((server.directory / "data" / "postmaster.pid").read_text().split()[0])


def family(pid: int) -> list[int]:
    """The process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@dataclass(frozen=True, slots=True)
class Told:
    """What callers were told, and the longest that any waited."""

    words: Counter[str]
    seconds_max: float


async def use_until(ledger: StoredLedger, user: User, key: KeyRecord, is_over: Callable[[], bool]) -> Told:
    """32 callers that use the key again and again."""
    words: Counter[str] = Counter()
    seconds_max = 0.0

    async def call() -> None:
        nonlocal seconds_max
        while not is_over():
            began = time.monotonic()
            outcomes = await asyncio.gather(ledger.settle(sign(user, key)), return_exceptions=True)
            seconds_max = max(seconds_max, time.monotonic() - began)
            words[reason(outcomes[0])] += 1
            if outcomes[0] is not None:
                await asyncio.sleep(0.02)

    await asyncio.gather(*(call() for _ in range(32)))
    return Told(words, seconds_max)


def check_what_was_told(database: Database, key: KeyRecord, words: Counter[str]) -> None:
    counted = counter(database, key)
    assert charges(database, key) == counted
    assert words["OK"] <= counted <= words["OK"] + words["OUTCOME_UNKNOWN"]
    assert set(words) <= {"OK", "OUTCOME_UNKNOWN", "STORE_UNAVAILABLE"}


async def test_a_database_that_is_killed_under_load_and_comes_back(directory: Path) -> None:
    over = False
    with embedded_postgres(directory, _SETTINGS) as server:
        database = template_of(server)
        opened = open_pool(database.dsn, 2, wait_seconds=0.5)
        pool = await opened.__aenter__()
        ledger_opened = open_ledger(database.dsn, pool, answer_seconds=2)
        ledger = await ledger_opened.__aenter__()
        alice = await make_user(pool, "alice")
        key = await make_key(pool, alice)
        using = asyncio.create_task(use_until(ledger, alice, key, lambda: over))
        await asyncio.sleep(0.3)
        os.kill(postmaster(server), signal.SIGKILL)
        await asyncio.sleep(0.5)
    try:
        with embedded_postgres(directory, _SETTINGS):
            before = ledger.status().charges
            async with asyncio.timeout(20):
                while ledger.status().charges < before + 100:  # noqa: ASYNC110  # no event here
                    await asyncio.sleep(0.02)
            over = True
            told = await using
            assert told.words["OK"] > 100
            assert told.words["STORE_UNAVAILABLE"] + ledger.status().losses > 0
            await ledger_opened.__aexit__(None, None, None)
            check_what_was_told(database, key, told.words)
    finally:
        await opened.__aexit__(None, None, None)


async def test_a_database_that_is_stopped_under_load_and_goes_on(directory: Path) -> None:
    with embedded_postgres(directory, _SETTINGS) as server:
        database = template_of(server)
        async with open_pool(database.dsn, 2) as pool, open_ledger(database.dsn, pool, answer_seconds=0.5) as ledger:
            alice = await make_user(pool, "alice")
            key = await make_key(pool, alice)
            over = False
            using = asyncio.create_task(use_until(ledger, alice, key, lambda: over))
            await asyncio.sleep(0.3)
            stopped = family(postmaster(server))
            try:
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(1.5)
            finally:
                for pid in stopped:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            before = ledger.status().charges
            async with asyncio.timeout(20):
                while ledger.status().charges < before + 100:  # noqa: ASYNC110  # no event here
                    await asyncio.sleep(0.02)
            over = True
            told = await using
        assert told.words["OUTCOME_UNKNOWN"] > 0
        assert told.seconds_max < 1.5
        check_what_was_told(database, key, told.words)


Cut = Literal["before it arrives", "after it arrived", "and it arrives late"]


class CuttingProxy:
    """A socket in front of the database's. When armed, the next bytes of a client cut its connection."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._armed: Cut | None = None
        self.cuts = 0

    def cut(self, how: Cut) -> None:
        self._armed = how

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._socket_path)
        answers = asyncio.create_task(self._copy(server_reader, writer))
        try:
            while data := await reader.read(1 << 20):
                how, self._armed = self._armed, None
                if how is not None:
                    await self._cut(how, data, answers, writer, server_writer)
                    return
                server_writer.write(data)
        finally:
            answers.cancel()
            server_writer.close()
            writer.close()

    async def _cut(
        self,
        how: Cut,
        data: bytes,
        answers: "asyncio.Task[None]",
        writer: asyncio.StreamWriter,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        self.cuts += 1
        answers.cancel()
        if how == "after it arrived":
            server_writer.write(data)
            await asyncio.sleep(0.1)
        writer.close()
        if how == "and it arrives late":
            await asyncio.sleep(0.3)
            server_writer.write(data)
            await asyncio.sleep(0.3)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            writer.write(data)


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[tuple[CuttingProxy, str]]:
    host = database.dsn.partition("host='")[2].partition("'")[0]
    with tempfile.TemporaryDirectory(prefix="kms-proxy-") as name:
        proxy = CuttingProxy(Path(host) / ".s.PGSQL.5432")
        server = await asyncio.start_unix_server(proxy.serve, Path(name) / ".s.PGSQL.5432")
        async with server:
            yield proxy, database.dsn.replace(host, name)


@asynccontextmanager
async def behind(dsn: str, store: Pool, seconds: float = 3) -> AsyncIterator[StoredLedger]:
    async with open_ledger(dsn, store, answer_seconds=seconds) as ledger:
        yield ledger


@pytest.mark.parametrize("how", ["before it arrives", "after it arrived", "and it arrives late"])
async def test_a_connection_cut_in_a_commit_charges_once_and_says_so(
    database: Database, store: Pool, proxy: tuple[CuttingProxy, str], how: Cut
) -> None:
    cutter, dsn = proxy
    alice = await make_user(store, "alice")
    key = await make_key(store, alice, max_usage_count=25)
    async with behind(dsn, store) as ledger:
        await ledger.settle(sign(alice, key))
        for _ in range(2):
            cutter.cut(how)
            outcomes = await asyncio.gather(*(ledger.settle(sign(alice, key)) for _ in range(10)), return_exceptions=True)
            assert list(map(reason, outcomes)) == ["OK"] * 10
        await asyncio.sleep(0.7)
        outcomes = await asyncio.gather(*(ledger.settle(sign(alice, key)) for _ in range(5)), return_exceptions=True)
        assert list(map(reason, outcomes)) == ["OK"] * 4 + ["USAGE_LIMIT_REACHED"]
        assert ledger.status().losses == 2
    assert cutter.cuts == 2
    assert (counter(database, key), charges(database, key)) == (25, 25)


async def test_cut_again_and_again_under_load_every_answer_is_true(
    database: Database, store: Pool, proxy: tuple[CuttingProxy, str]
) -> None:
    cutter, dsn = proxy
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    over = False
    async with behind(dsn, store) as ledger:
        using = asyncio.create_task(use_until(ledger, alice, key, lambda: over))
        for number in range(12):
            await asyncio.sleep(0.1)
            cutter.cut(("before it arrives", "after it arrived", "and it arrives late")[number % 3])
        await asyncio.sleep(0.7)
        over = True
        told = await using
    assert cutter.cuts >= 6
    assert set(told.words) == {"OK"}
    check_what_was_told(database, key, told.words)


async def test_a_call_whose_time_is_up_while_the_outcome_is_in_doubt_is_told_so(
    database: Database, store: Pool, proxy: tuple[CuttingProxy, str]
) -> None:
    cutter, dsn = proxy
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    async with behind(dsn, store) as ledger:
        cutter.cut("and it arrives late")
        with pytest.raises(KmsError) as caught:
            async with asyncio.timeout(0.005):
                await ledger.settle(sign(alice, key))
        assert caught.value.reason == "OUTCOME_UNKNOWN"
        assert "may have been charged" in caught.value.message


async def test_uses_of_which_is_known_that_they_were_not_charged_are_not_in_doubt_any_more(
    database: Database, store: Pool, proxy: tuple[CuttingProxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cutter, dsn = proxy
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    settled = BatchConnection.settled

    async def settled_and_gone(connection: BatchConnection, *arguments: Any, **options: Any) -> list[str] | None:  # noqa: ANN401
        # It says that the batch has not happened and never will; then it is lost, and nobody answers any more.
        found = await settled(connection, *arguments, **options)
        connection.connection.cut()
        monkeypatch.setattr(ledgers, "connect", lambda *_, **__: asyncio.sleep(60))
        return found

    async with behind(dsn, store, 1) as ledger:
        await ledger.settle(sign(alice, key))
        monkeypatch.setattr(BatchConnection, "settled", settled_and_gone)
        cutter.cut("before it arrives")
        with pytest.raises(KmsError) as caught:
            await ledger.settle(sign(alice, key))
        assert (caught.value.reason, ledger.status().losses) == ("STORE_UNAVAILABLE", 1)
    assert counter(database, key) == 1


async def test_a_connection_that_was_ended_while_idle_costs_nobody_anything(
    database: Database, store: Pool, proxy: tuple[CuttingProxy, str]
) -> None:
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store) as ledger:
        await ledger.settle(sign(alice, key))
        with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
            connection.execute(
                b"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
                b" WHERE usename = 'kms_service' AND datname = current_database() AND query LIKE '%settle%'"
            )
        await ledger.settle(sign(alice, key))
        assert ledger.status().losses == 0
    assert counter(database, key) == 2
