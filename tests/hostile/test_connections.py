"""Errors of the server leave no pooled connection that fails the calls of others.

After an error the server skips the rest of a pipeline. What psycopg believes to be prepared then decides whether the next call
on that connection works, whoever makes it.
"""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString
from uuid import uuid4

import psycopg
import pytest

from kms.domain.errors import KmsError
from kms.domain.ids import UserId
from kms.store.keys import FIND_BY_ID, FIND_BY_NAME
from kms.store.pool import AS_JOB, BEFORE_LOGIN, Acting, Pool, as_user, open_pool
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import made
from tests.fixtures.postgres import Database
from tests.fixtures.server import Caller, Deployment, RunningServer

CONNECTIONS: Final = 4
CALLS: Final = 24
SOUND: Final[Sequence[LiteralString]] = ("SELECT 1 AS n", "SELECT 2 AS n", "SELECT 3 AS n")
FAILURES: Final[Sequence[LiteralString]] = (
    "SELECT 1 / 0",  # while it is executed
    "SELECT no_such_column",  # while it is parsed
    "SELECT 'x'::uuid",  # while it is planned
    "DO $$ BEGIN RAISE serialization_failure; END $$",
    "DO $$ BEGIN RAISE lock_not_available; END $$",
    "DO $$ BEGIN RAISE query_canceled; END $$",
)


async def check_all(pool: Pool, acting: Acting = AS_JOB, *, rounds: int = 8) -> None:
    """Run sound calls on every connection at once, often enough for psycopg to prepare what it prepares."""

    async def call() -> None:
        found = await pool.fetch_each(acting, *((query, None) for query in SOUND))
        assert found == [[{"n": 1}], [{"n": 2}], [{"n": 3}]]
        async with pool.transaction(acting) as connection:
            for number, query in enumerate(SOUND, start=1):
                assert await (await connection.execute(query)).fetchall() == [{"n": number}]

    for _ in range(rounds):
        await asyncio.gather(*(call() for _ in range(2 * CONNECTIONS)))


async def one_by_one(pool: Pool, queries: Sequence[LiteralString]) -> None:
    async with pool.transaction(AS_JOB) as connection:
        for query in queries:
            await connection.execute(query)


@pytest.mark.parametrize("uses_before", [0, 1, 4, 5, 6])
async def test_after_an_error_anywhere_in_a_pipeline_every_later_call_is_answered(database: Database, uses_before: int) -> None:
    """psycopg may prepare a statement after a number of uses, so the error comes after different numbers of them."""
    for failure, position in itertools.product(FAILURES, range(len(SOUND) + 1)):
        queries = [*SOUND[:position], failure, *SOUND[position:]]
        async with open_pool(database.dsn, 1) as pool:
            for query in (query for _ in range(uses_before) for query in SOUND):
                await pool.fetch(AS_JOB, query)
            with pytest.raises((psycopg.Error, KmsError)):
                await pool.fetch_each(AS_JOB, *((query, None) for query in queries))
            await check_all(pool, rounds=1)
            with pytest.raises((psycopg.Error, KmsError)):
                await one_by_one(pool, queries)
            await check_all(pool, rounds=1)


async def test_after_a_value_that_the_driver_refuses_every_later_call_is_answered(store: Pool) -> None:
    for _ in range(8):
        with pytest.raises(KmsError):
            await store.fetch_each(AS_JOB, (SOUND[0], None), ("SELECT %(text)s::text AS n", {"text": "\0"}), (SOUND[1], None))
    await check_all(store)


@contextmanager
def locked(database: Database, statement: str) -> Iterator[None]:
    """Hold the locks of *statement* within the block."""
    with psycopg.connect(database.admin_dsn) as holder:
        holder.execute(statement.encode())
        yield


async def test_after_lock_timeouts_in_bulk_every_later_call_is_answered(database: Database) -> None:
    """Everybody's reads of keys wait for a lock and give up, again and again; each number of uses comes before a time-out."""
    user = as_user(UserId(uuid4()))
    refs: list[tuple[LiteralString, dict[str, object]]] = [
        (FIND_BY_NAME, {"caller": user.user_id, "ref": "k"}),
        (FIND_BY_ID, {"caller": user.user_id, "ref": uuid4()}),
    ]
    hurried: LiteralString = "SELECT set_config('lock_timeout', '1ms', true)"
    async with open_pool(database.dsn, CONNECTIONS) as pool:
        for _ in range(8):
            with locked(database, "LOCK TABLE cryptography.keys IN ACCESS EXCLUSIVE MODE"):
                waited = (pool.fetch_each(user, (hurried, None), *refs, *reversed(refs)) for _ in range(CALLS))
                refused = await asyncio.gather(*waited, return_exceptions=True)
            assert {type(each) for each in refused} == {KmsError}
            answered = await asyncio.gather(*(pool.fetch_each(user, *refs, (SOUND[0], None)) for _ in range(CALLS)))
            assert answered == [[[], [], [{"n": 1}]]] * CALLS
        await check_all(pool)


async def pid(pool: Pool) -> int:
    return int((await pool.fetch(BEFORE_LOGIN, "SELECT pg_backend_pid() AS pid"))[0]["pid"])


async def test_ordinary_refusals_cost_no_connection_and_leave_little_on_the_server(database: Database) -> None:
    """A caller can be refused as often as they like. Were each a new connection, they could keep the service busy with that."""
    failing: LiteralString = "SELECT 1 / 0"
    left: LiteralString = "SELECT count(*) AS n FROM pg_catalog.pg_prepared_statements"
    refusals = 0
    async with open_pool(database.dsn, 1) as pool:
        seen = {await pid(pool)}
        while len(seen) < 4:
            with pytest.raises(KmsError):
                await pool.fetch_each(AS_JOB, (SOUND[0], None), (failing, None), (SOUND[1], None))
            refusals += 1
            seen.add(await pid(pool))
            assert (await pool.fetch(AS_JOB, left))[0]["n"] < 200
    assert refusals >= 300


async def test_a_connection_after_an_unexpected_error_is_replaced(database: Database) -> None:
    async with open_pool(database.dsn, 1) as pool:
        before = await pid(pool)
        with pytest.raises(KmsError):
            await pool.fetch(AS_JOB, "SELECT no_such_column")
        assert await pid(pool) != before


def together(*calls: Any) -> list[str]:  # noqa: ANN401  # grpc futures
    """Return the reason of each call's refusal, or OK."""
    errors = [call.exception() for call in calls]
    return ["OK" if error is None else refusal_of(error).reason or error.code().name for error in errors]


def use_everything(server: RunningServer, caller: Caller, key: kpb.Key) -> list[str]:
    """Let *caller* read, use and move a key over and over; return how the calls ended."""
    again = server.again(caller)
    ended = []
    for _ in range(CALLS):
        ended += together(
            again.keys.GetKey.future(kpb.GetKeyRequest(key=key.id), timeout=60),
            again.keys.GetKey.future(kpb.GetKeyRequest(key=key.name), timeout=60),
            again.keys.ListKeys.future(kpb.ListKeysRequest(), timeout=60),
            again.crypto.Sign.future(cpb.SignRequest(key=key.name, message=b"m"), timeout=60),
        )
        ended += together(again.keys.DeactivateKey.future(kpb.DeactivateKeyRequest(key=key.id), timeout=60))
        ended += together(again.keys.ReactivateKey.future(kpb.ReactivateKeyRequest(key=key.id), timeout=60))
    return ended


@pytest.mark.slow
def test_moves_that_are_refused_or_give_up_waiting_fail_no_later_call_of_anybody(deployment: Deployment) -> None:
    with deployment.serving() as server:
        attacker, other = server.caller(), server.caller()
        victim, sound = made(attacker, "ed25519", name="victim"), made(other, "ed25519", name="sound")

        def attack(version: int) -> list[str]:
            request = kpb.DeactivateKeyRequest(key=victim.id, version=version)
            revocation = kpb.RevokeKeyRequest(key=victim.id, reason="r", version=version)
            moves = (attacker.keys.DeactivateKey.future(request, timeout=60) for _ in range(CALLS // 2))
            revocations = (attacker.keys.RevokeKey.future(revocation, timeout=60) for _ in range(CALLS // 2))
            return together(*moves, *revocations)

        for _ in range(8):
            assert set(attack(version=victim.version + 7)) == {"STALE"}
        with locked(deployment.database, "SELECT FROM cryptography.keys WHERE key_name = 'victim' FOR UPDATE"):
            # The call's own deadline may come before the time-out of the lock.
            assert set(attack(version=victim.version)) <= {"STORE_UNAVAILABLE", "DEADLINE_EXCEEDED"}
        ended = use_everything(server, other, sound)
        assert {outcome: ended.count(outcome) for outcome in set(ended)} == {"OK": len(ended)}
        last = attacker.keys.RevokeKey.future(kpb.RevokeKeyRequest(key=victim.id, reason="r"), timeout=60)
        # One whose deadline came first may have revoked the key as soon as the lock was free.
        assert together(last)[0] in ("OK", "KEY_REVOKED")
