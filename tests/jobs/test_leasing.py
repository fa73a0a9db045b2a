"""A worker of leased work: what it records for each end of the work, and what it does while it works."""

import asyncio
from collections.abc import Mapping, Sequence
from uuid import UUID, uuid4

import pytest
import structlog
from structlog.testing import LogCapture

from kms.domain.errors import KmsError, Reason
from kms.jobs import leasing
from kms.jobs.leases import Claim, LeaseLostError, LeasePolicy
from kms.jobs.leasing import Lease, LeasedWork, LeasedWorker
from kms.rotation.leases import rotation_leases
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.jobs.manual_time import ManualTime
from tests.jobs.rotations import NEW, Rotations

AWAY = KmsError(Reason.STORE_UNAVAILABLE, "the database does not answer")
POLICY = LeasePolicy(lease_seconds=60, backoff_seconds_min=5, attempts_max=3)


class Items:
    """Items in memory: `waiting` are due, and `said` is what the worker recorded."""

    def __init__(self, *waiting: Claim) -> None:
        self.waiting = list(waiting)
        self.said: list[tuple[object, ...]] = []
        self.error: KmsError | None = None

    async def claim(self, worker: UUID, items_max: int, policy: LeasePolicy, *, item_id: UUID | None = None) -> Sequence[Claim]:
        taken, self.waiting = self.waiting[:items_max], self.waiting[items_max:]
        return taken

    async def extend(self, _worker: UUID, claim: Claim, _policy: LeasePolicy) -> None:
        self._say("extend", claim)

    async def finish_step(
        self, _worker: UUID, claim: Claim, step: str, state: Mapping[str, object], _policy: LeasePolicy
    ) -> None:
        self._say("finish_step", claim, step, state)

    async def complete(self, _worker: UUID, claim: Claim, result: Mapping[str, object]) -> None:
        self._say("complete", claim, result)

    async def fail(self, _worker: UUID, claim: Claim, message: str, retry_seconds: float, attempts_max: int) -> None:
        self._say("fail", claim, message, retry_seconds, attempts_max)

    async def release(self, _worker: UUID, claim: Claim) -> None:
        self._say("release", claim)

    def _say(self, what: str, claim: Claim, *more: object) -> None:
        self.said.append((what, claim.number, *more))
        if self.error is not None:
            raise self.error


def an_item(number: int = 1, attempts: int = 1, step: str = "") -> Claim:
    return Claim(uuid4(), number, attempts, step, {}, {})


@pytest.fixture
def time() -> ManualTime:
    return ManualTime()


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    capture = LogCapture()
    monkeypatch.setattr(leasing, "_LOG", structlog.wrap_logger(None, processors=[capture]))
    return capture


def worker(items: Items, work: LeasedWork, time: ManualTime) -> LeasedWorker:
    return LeasedWorker(items, work, POLICY, now=time.now, sleep=time.sleep)


async def done(_: Lease) -> Mapping[str, object]:
    return {"made": 1}


async def hang(_: Lease) -> Mapping[str, object]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_all_that_is_due_is_done_one_after_the_other(time: ManualTime) -> None:
    items = Items(an_item(1), an_item(2), an_item(3))
    assert await worker(items, done, time).do_due() == 3
    assert items.said == [("complete", number, {"made": 1}) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("error", "message", "event"),
    [
        (KmsError(Reason.HSM_UNAVAILABLE, "x" * 1000), "HSM_UNAVAILABLE: " + "x" * 483, "attempt failed"),
        (ValueError("a bug with a secret"), "INTERNAL", "bug"),
        (asyncio.CancelledError(), "INTERNAL", "bug"),
    ],
)
async def test_a_failed_attempt_waits_for_its_back_off_and_others_go_on(
    time: ManualTime, log: LogCapture, error: BaseException, message: str, event: str
) -> None:
    async def work(lease: Lease) -> Mapping[str, object]:
        if lease.claim.number == 1:
            raise error
        return {}

    items = Items(an_item(1, attempts=2), an_item(2))
    assert await worker(items, work, time).do_due() == 2
    assert items.said == [("fail", 1, message, 10.0, 3), ("complete", 2, {})]
    assert [line["event"] for line in log.entries] == [event]


async def test_a_step_is_recorded_and_the_attempts_begin_anew(time: ManualTime) -> None:
    async def work(lease: Lease) -> Mapping[str, object]:
        assert lease.claim.step == "first"
        await lease.finish_step("second", {"at": 5})
        assert (lease.claim.step, lease.claim.step_state) == ("second", {"at": 5})
        raise AWAY

    items = Items(an_item(1, attempts=3, step="first"))
    await worker(items, work, time).do_due()
    assert items.said[0] == ("finish_step", 1, "second", {"at": 5})
    assert items.said[1][3] == 5.0  # the back-off after one attempt, and not after three


async def test_while_the_work_goes_on_the_lease_is_extended_three_times_as_often_as_it_runs_out(time: ManualTime) -> None:
    may_end = asyncio.Event()

    async def work(_: Lease) -> Mapping[str, object]:
        await may_end.wait()
        return {}

    items = Items(an_item())
    doing = asyncio.create_task(worker(items, work, time).do_due())
    await time.advance(0)
    for _ in range(5):
        await time.advance(20)
    assert items.said == [("extend", 1)] * 5
    may_end.set()
    assert await doing == 1
    assert items.said[5:] == [("complete", 1, {})]
    await time.advance(100)
    assert len(items.said) == 6


async def test_who_loses_the_lease_stops_at_once_and_records_nothing(time: ManualTime, log: LogCapture) -> None:
    ended = asyncio.Event()

    async def work(lease: Lease) -> Mapping[str, object]:
        try:
            return await hang(lease)
        finally:
            ended.set()

    items = Items(an_item(1))
    items.error = LeaseLostError()
    doing = asyncio.create_task(worker(items, work, time).do_due())
    await time.advance(0)
    await time.advance(20)
    assert await doing == 1
    assert ended.is_set()
    assert items.said == [("extend", 1)]
    assert [line["event"] for line in log.entries] == ["lease lost"]


async def test_a_step_that_cannot_be_recorded_since_the_lease_is_lost_is_no_failed_attempt(time: ManualTime) -> None:
    async def work(lease: Lease) -> Mapping[str, object]:
        await lease.finish_step("late", {})
        raise AssertionError

    items = Items(an_item(1))
    items.error = LeaseLostError()
    await worker(items, work, time).do_due()
    assert items.said == [("finish_step", 1, "late", {})]


async def test_a_database_that_does_not_answer_ends_the_work_only_when_the_lease_has_run_out(time: ManualTime) -> None:
    items = Items(an_item(1))
    items.error = AWAY
    doing = asyncio.create_task(worker(items, hang, time).do_due())
    await time.advance(0)
    await time.advance(20)
    await time.advance(20)
    assert not doing.done()
    items.error = None
    await time.advance(20)  # extended again, in the last moment: until 120
    items.error = AWAY
    await time.advance(20)
    await time.advance(20)
    assert not doing.done()
    await time.advance(20)
    assert doing.done()
    assert items.said == [("extend", 1)] * 6


async def test_a_worker_that_is_stopped_gives_its_item_back(time: ManualTime) -> None:
    items = Items(an_item(1))
    doing = asyncio.create_task(worker(items, hang, time).do_due())
    await time.advance(0)
    doing.cancel()
    await asyncio.wait({doing})
    assert doing.cancelled()
    assert items.said == [("release", 1)]


async def test_a_rotation_goes_on_behind_the_step_at_which_a_worker_died(database: Database, store: Pool) -> None:
    rotations, leases, steps = Rotations(database), rotation_leases(store), list[str]()
    (rotation,) = rotations.add()

    async def work(lease: Lease) -> Mapping[str, object]:
        if lease.claim.step == "":
            steps.append("made")
            await lease.finish_step("made", {"successor": str(NEW)})
        if is_dying:
            is_stuck.set()
            await asyncio.Event().wait()
        steps.append("switched")
        return {"successor": UUID(str(lease.claim.step_state["successor"])), "affected": 0}

    is_dying, is_stuck = True, asyncio.Event()
    dying = asyncio.create_task(LeasedWorker(leases, work, POLICY).do_due())
    async with asyncio.timeout(60):
        await is_stuck.wait()
        assert rotations.of(rotation, "step") == ("made",)
        rotations.pass_time(POLICY.lease_seconds + 1)  # it works on, and nobody knows
        is_dying = False
        assert await LeasedWorker(leases, work, POLICY).do_due() == 1
    dying.cancel()
    await asyncio.wait({dying})
    assert steps == ["made", "switched"]
    assert rotations.of(rotation, "migration_status", "new_key_id", "attempts") == ("completed", NEW, 2)
