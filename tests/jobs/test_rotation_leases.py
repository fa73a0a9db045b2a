"""Rotations as leased work in PostgreSQL: who holds which, for how long, and what a lost lease cannot do."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors, sql

from kms.jobs.leases import Claim, LeaseLostError, LeasePolicy
from kms.jobs.postgres import PostgresLeases
from kms.rotation.leases import rotation_leases
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.jobs.rotations import ALICE, NEW, OLD, Rotations
from tests.store.acting import run

ONE, TWO = uuid4(), uuid4()
POLICY: Final = LeasePolicy(lease_seconds=60, backoff_seconds_min=5, backoff_seconds_max=60, attempts_max=3)
SLACK_SECONDS: Final = 30  # how long a stalled machine may take between a statement and the look at what it did
FUNCTIONS: Final = {
    "claim_rotations": (ONE, 1, 60.0, 3, None),
    "extend_rotation_lease": (ONE, ONE, 1, 60.0),
    "finish_rotation_step": (ONE, ONE, 1, "s", "{}", 60.0),
    "complete_rotation": (ONE, ONE, 1, NEW, 0),
    "fail_rotation": (ONE, ONE, 1, "m", 1.0, 3),
    "release_rotation": (ONE, ONE, 1),
}


@pytest.fixture
def rotations(database: Database) -> Rotations:
    return Rotations(database)


@pytest.fixture
def leases(store: Pool) -> PostgresLeases:
    return rotation_leases(store)


async def claimed(leases: PostgresLeases, worker: UUID) -> Claim:
    (claim,) = await leases.claim(worker, 1, POLICY)
    return claim


async def test_what_waits_longest_is_claimed_first_with_what_the_work_needs(leases: PostgresLeases, rotations: Rotations) -> None:
    first, second, third = rotations.add(3)
    claims = await leases.claim(ONE, 2, POLICY)
    assert {claim.item_id for claim in claims} == {first, second}
    longest = next(claim for claim in claims if claim.item_id == first)
    item = {"user_id": ALICE, "old_key_id": OLD, "new_key_id": None, "rotation_reason": "age", "initiated_by": None}
    assert (longest.number, longest.attempts, longest.step, longest.step_state) == (1, 1, "", {})
    assert {column: longest.item[column] for column in item} == item
    assert rotations.of(first, "migration_status", "lease_owner") == ("in_progress", ONE)
    assert POLICY.lease_seconds - SLACK_SECONDS < rotations.wait_of(first) <= POLICY.lease_seconds
    assert [claim.item_id for claim in await leases.claim(TWO, 5, POLICY)] == [third]


async def test_two_workers_never_hold_the_same_rotation(leases: PostgresLeases, rotations: Rotations) -> None:
    ids = rotations.add(40)

    async def take(worker: UUID) -> list[UUID]:
        taken = []
        while claims := await leases.claim(worker, 3, POLICY):
            taken += [claim.item_id for claim in claims]
        return taken

    workers = [uuid4() for _ in range(4)]
    shares = await asyncio.gather(*map(take, workers))
    assert sorted(rotation for share in shares for rotation in share) == sorted(ids)
    for worker, share in zip(workers, shares, strict=True):
        assert {rotations.of(rotation, "lease_owner")[0] for rotation in share} <= {worker}


async def test_a_row_that_somebody_has_locked_is_skipped_and_not_waited_for(
    database: Database, leases: PostgresLeases, rotations: Rotations
) -> None:
    locked, free = rotations.add(2)
    with psycopg.connect(database.admin_dsn) as other:
        other.execute("SELECT FROM cryptography.key_rotations WHERE id = %s FOR UPDATE", (locked,))
        async with asyncio.timeout(5):  # the pool's lock_timeout is 10 seconds
            assert [claim.item_id for claim in await leases.claim(ONE, 5, POLICY)] == [free]


async def test_the_rotation_of_a_dead_worker_is_taken_over_behind_its_last_step_and_it_records_nothing_any_more(
    leases: PostgresLeases, rotations: Rotations
) -> None:
    (rotation,) = rotations.add()
    dead = await claimed(leases, ONE)
    await leases.finish_step(ONE, dead, "successor made", {"successor": str(NEW)}, POLICY)
    rotations.pass_time(POLICY.lease_seconds - SLACK_SECONDS)
    assert await leases.claim(TWO, 1, POLICY) == []
    rotations.pass_time(SLACK_SECONDS + 1)
    alive = await claimed(leases, TWO)
    assert (alive.number, alive.attempts, alive.step, alive.step_state) == (2, 2, "successor made", {"successor": str(NEW)})
    before = rotations.of(rotation, "*")
    void: Sequence[Callable[[], Awaitable[None]]] = (
        lambda: leases.extend(ONE, dead, POLICY),
        lambda: leases.finish_step(ONE, dead, "late", {}, POLICY),
        lambda: leases.complete(ONE, dead, {"successor": NEW, "affected": 3}),
        lambda: leases.fail(ONE, dead, "late", 0, 3),
        lambda: leases.release(ONE, dead),
    )
    for record in void:
        with pytest.raises(LeaseLostError):
            await record()
    assert rotations.of(rotation, "*") == before
    await leases.complete(TWO, alive, {"successor": NEW, "affected": 3})
    assert rotations.of(rotation, "migration_status", "new_key_id", "lease_owner", "completed_at IS NOT NULL") == (
        "completed",
        NEW,
        None,
        True,
    )


async def test_an_earlier_claim_of_the_same_worker_records_nothing(leases: PostgresLeases, rotations: Rotations) -> None:
    rotations.add()
    earlier = await claimed(leases, ONE)
    rotations.pass_time(POLICY.lease_seconds + 1)
    now = await claimed(leases, ONE)
    with pytest.raises(LeaseLostError):
        await leases.finish_step(ONE, earlier, "late", {}, POLICY)
    await leases.finish_step(ONE, now, "made", {}, POLICY)


async def test_another_worker_cannot_use_a_claim(leases: PostgresLeases, rotations: Rotations) -> None:
    rotations.add()
    claim = await claimed(leases, ONE)
    with pytest.raises(LeaseLostError):
        await leases.complete(TWO, claim, {"successor": NEW, "affected": 3})


@pytest.mark.parametrize("by_a_step", [False, True])
async def test_a_living_worker_keeps_its_rotation(leases: PostgresLeases, rotations: Rotations, *, by_a_step: bool) -> None:
    (rotation,) = rotations.add()
    claim = await claimed(leases, ONE)
    for number in range(5):
        rotations.pass_time(POLICY.lease_seconds / 2)
        if by_a_step:
            await leases.finish_step(ONE, claim, f"step {number}", {}, POLICY)
        else:
            await leases.extend(ONE, claim, POLICY)
        assert await leases.claim(TWO, 1, POLICY) == []
    assert rotations.wait_of(rotation) > POLICY.lease_seconds - SLACK_SECONDS


async def test_a_lease_that_ran_out_and_that_nobody_took_is_still_the_workers(
    leases: PostgresLeases, rotations: Rotations
) -> None:
    rotations.add()
    claim = await claimed(leases, ONE)
    rotations.pass_time(1000)
    await leases.extend(ONE, claim, POLICY)
    assert await leases.claim(TWO, 1, POLICY) == []


async def test_a_failed_attempt_is_due_after_its_back_off_and_the_last_one_has_failed(
    leases: PostgresLeases, rotations: Rotations
) -> None:
    (rotation,) = rotations.add()
    for attempt in (1, 2, 3):
        claim = await claimed(leases, ONE)
        assert claim.attempts == attempt
        retry_seconds = 1000 * POLICY.backoff_seconds(attempt)
        await leases.fail(ONE, claim, f"failure {attempt}", retry_seconds, POLICY.attempts_max)
        assert retry_seconds - SLACK_SECONDS < rotations.wait_of(rotation) <= retry_seconds
        assert await leases.claim(TWO, 1, POLICY) == []
        rotations.pass_time(retry_seconds + 1)
    assert rotations.of(rotation, "migration_status", "error_message", "lease_owner") == ("failed", "failure 3", None)
    assert await leases.claim(TWO, 1, POLICY) == []


async def test_a_rotation_whose_workers_die_is_not_tried_for_ever(leases: PostgresLeases, rotations: Rotations) -> None:
    ids = rotations.add(2)
    for _ in range(POLICY.attempts_max):
        assert len(await leases.claim(uuid4(), 2, POLICY)) == 2
        rotations.pass_time(POLICY.lease_seconds + 1)
    message = "the worker of the last attempt did not answer any more"
    for failed in (1, 2):  # one each time, since one is asked for; the other is not claimed meanwhile
        assert await leases.claim(TWO, 1, POLICY) == []
        ended = [rotations.of(rotation, "migration_status", "error_message", "lease_owner") for rotation in ids]
        assert ended.count(("failed", message, None)) == failed


async def test_a_finished_step_gives_the_next_one_all_attempts(leases: PostgresLeases, rotations: Rotations) -> None:
    (rotation,) = rotations.add()
    for _ in range(2):
        await claimed(leases, ONE)
        rotations.pass_time(POLICY.lease_seconds + 1)
    claim = await claimed(leases, ONE)
    assert claim.attempts == 3
    await leases.finish_step(ONE, claim, "made", {}, POLICY)
    assert rotations.of(rotation, "attempts") == (1,)


async def test_what_is_given_back_is_due_at_once_and_has_lost_no_attempt(leases: PostgresLeases, rotations: Rotations) -> None:
    rotations.add()
    claim = await claimed(leases, ONE)
    await leases.release(ONE, claim)
    again = await claimed(leases, TWO)
    assert (again.attempts, again.number) == (1, 2)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("role", ["authenticated_users", "admin_users", "auditor_users", "none"])
def test_nobody_but_the_jobs_claims_or_records(database: Database, rotations: Rotations, name: str, role: str) -> None:
    rotations.add()
    values = sql.SQL(", ").join(map(sql.Literal, FUNCTIONS[name])).as_string()
    query = f"SELECT * FROM cryptography.{name}({values})"
    with pytest.raises(errors.InsufficientPrivilege):
        run(database.dsn, role, ALICE, query)
    assert len(run(database.dsn, "job_runner", "", query)) == 1


def test_the_jobs_write_no_rotation_past_the_functions(database: Database, rotations: Rotations) -> None:
    rotations.add()
    for statement in ("UPDATE {} SET attempts = 0", "DELETE FROM {}", "SELECT id FROM {}"):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, "job_runner", "", statement.format("cryptography.key_rotations"))


def test_an_owner_sees_how_far_a_rotation_is_and_not_who_works_at_it(database: Database, rotations: Rotations) -> None:
    rotations.add()
    seen = "SELECT attempts, step, next_attempt_at < now() FROM cryptography.key_rotations"
    assert run(database.dsn, "authenticated_users", ALICE, seen) == [(0, "", True)]
    for column in ("lease_owner", "claim_number", "step_state"):
        with pytest.raises(errors.InsufficientPrivilege):
            run(database.dsn, "authenticated_users", ALICE, f"SELECT {column} FROM cryptography.key_rotations")


def test_the_back_off_doubles_to_its_maximum() -> None:
    assert [POLICY.backoff_seconds(attempts) for attempts in (0, 1, 2, 3, 4, 5, 10_000)] == [5, 5, 10, 20, 40, 60, 60]
    assert POLICY.extension_seconds == 20
