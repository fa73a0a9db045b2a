"""The runner: when it does a round, what survives a failure, and what it knows of each job."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import structlog
from structlog.testing import LogCapture

from kms.domain.errors import KmsError, Reason
from kms.jobs import runner as running
from kms.jobs.job import Job, Scope, Work
from kms.jobs.runner import JobRunner
from tests.jobs.manual_time import ManualTime

AWAY = KmsError(Reason.STORE_UNAVAILABLE, "the database of Alice's key is away")


class Rounds:
    """Work that notes its rounds, and raises while `error` is set."""

    def __init__(self, time: ManualTime, error: BaseException | None = None) -> None:
        self._time = time
        self.error = error
        self.began_at: list[float] = []

    async def work(self) -> None:
        self.began_at.append(self._time.now())
        if self.error is not None:
            raise self.error


@pytest.fixture
def time() -> ManualTime:
    return ManualTime()


@pytest.fixture
def runner(time: ManualTime) -> JobRunner:
    return JobRunner(now=time.now, sleep=time.sleep)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    capture = LogCapture()
    monkeypatch.setattr(running, "_LOG", structlog.wrap_logger(None, processors=[capture]))
    return capture


async def test_a_round_begins_at_once_and_again_an_interval_after_each_end(time: ManualTime, runner: JobRunner) -> None:
    began_at: list[float] = []

    async def work() -> None:
        began_at.append(time.now())
        await time.sleep(7)

    async with runner.running(Job("work", 10, work)):
        await time.advance(0)
        for _ in range(40):
            await time.advance(1)
    assert began_at == [0, 17, 34]


@pytest.mark.parametrize(
    ("error", "event", "reason"),
    [
        (AWAY, "put off", "STORE_UNAVAILABLE"),
        (ValueError("a bug"), "bug", "INTERNAL"),
        (asyncio.CancelledError(), "bug", "INTERNAL"),  # of something that the work waited for
    ],
)
async def test_a_failure_is_logged_and_counted_and_ends_no_later_round(
    time: ManualTime, runner: JobRunner, log: LogCapture, error: BaseException, event: str, reason: str
) -> None:
    rounds = Rounds(time, error)
    async with runner.running(Job("work", 10, rounds.work)):
        await time.advance(0)
        await time.advance(10)
        assert [(line["event"], line["job"]) for line in log.entries] == [(event, "work")] * 2
        (status,) = runner.statuses()
        assert (status.failures, status.last_failure, status.failure_age) == (2, reason, 0)
        rounds.error = None
        await time.advance(10)
        await time.advance(3)
        (status,) = runner.statuses()
        assert (status.failures, status.last_failure, status.failure_age, status.success_age) == (2, "", 13, 3)
    assert len(rounds.began_at) == 3


async def test_a_bug_is_logged_with_its_traceback(time: ManualTime, runner: JobRunner, log: LogCapture) -> None:
    async with runner.running(Job("work", 10, Rounds(time, ValueError("a bug")).work)):
        await time.advance(0)
    assert [line["exc_info"] for line in log.entries] == [True]


async def test_a_job_ends_with_the_block_in_the_middle_of_a_round(time: ManualTime, runner: JobRunner) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    rounds = Rounds(time)
    async with runner.running(Job("endless", 10, work), Job("short", 10, rounds.work)):
        await time.advance(0)
    assert ended.is_set()
    await time.advance(100)
    assert len(rounds.began_at) == 1


async def test_a_job_that_fails_for_longer_than_its_allowance_is_a_warning_until_it_succeeds(
    time: ManualTime, runner: JobRunner, log: LogCapture
) -> None:
    rounds = Rounds(time)
    async with runner.running(Job("destruction", 60, rounds.work, warns_after_seconds=600)):
        await time.advance(0)
        rounds.error = AWAY
        for _ in range(10):
            await time.advance(60)
        assert [status.warning for status in runner.statuses()] == [""]
        await time.advance(60)
        # The reason and no message: anybody who reaches /readyz reads it, and a message may name a key.
        warning = "job destruction has not succeeded for 11 minutes: STORE_UNAVAILABLE"
        assert [status.warning for status in runner.statuses()] == [warning]
        rounds.error = None
        await time.advance(60)
        assert [status.warning for status in runner.statuses()] == [""]
    assert log.entries


async def test_a_job_that_never_succeeded_is_a_warning_from_its_start_on(
    time: ManualTime, runner: JobRunner, log: LogCapture
) -> None:
    await time.advance(5000)
    async with runner.running(Job("work", 10, Rounds(time, AWAY).work, warns_after_seconds=60)):
        await time.advance(60)
        assert runner.statuses()[0].warning == ""
        await time.advance(1)
        assert runner.statuses()[0].warning == "job work has not succeeded for 61 seconds: STORE_UNAVAILABLE"
    assert log.entries


async def test_without_an_allowance_a_failure_is_no_warning(time: ManualTime, runner: JobRunner, log: LogCapture) -> None:
    async with runner.running(Job("work", 10, Rounds(time, AWAY).work)):
        await time.advance(1_000_000)
        assert runner.statuses()[0].warning == ""
    assert log.entries


async def test_a_round_that_does_not_end_is_a_warning(time: ManualTime, runner: JobRunner) -> None:
    async with runner.running(Job("work", 10, asyncio.Event().wait, warns_after_seconds=600)):
        await time.advance(3 * 3600)
        assert runner.statuses()[0].warning == "job work has not succeeded for 3 hours: its round has not ended"


async def test_a_long_round_reports_its_successes(time: ManualTime, runner: JobRunner) -> None:
    async def work() -> None:
        await time.sleep(50)
        runner.note_success("work")
        await asyncio.Event().wait()

    async with runner.running(Job("work", 10, work, warns_after_seconds=60)):
        await time.advance(0)
        await time.advance(50)
        await time.advance(20)
        assert (runner.statuses()[0].success_age, runner.statuses()[0].warning) == (20, "")


class HeldElsewhere:
    """Locks that another worker holds while `is_held`."""

    is_held = True

    async def run_alone(self, _name: str, work: Work) -> bool:
        if not self.is_held:
            await work()
        return not self.is_held


async def test_a_round_that_another_worker_does_is_skipped_and_is_neither_success_nor_failure(time: ManualTime) -> None:
    locks, rounds = HeldElsewhere(), Rounds(time)
    runner = JobRunner(locks, now=time.now, sleep=time.sleep)
    async with runner.running(Job("work", 10, rounds.work, Scope.ONE_WORKER, warns_after_seconds=60)):
        await time.advance(0)
        for _ in range(10):
            await time.advance(10)
        (status,) = runner.statuses()
        assert (status.success_age, status.idle_age, status.failures, status.warning) == (100, 0, 0, "")
        assert rounds.began_at == []
        locks.is_held = False
        await time.advance(10)
        assert (rounds.began_at, runner.statuses()[0].success_age) == ([110], 0)


async def test_a_job_of_every_worker_takes_no_lock(time: ManualTime) -> None:
    rounds = Rounds(time)
    async with JobRunner(HeldElsewhere(), now=time.now, sleep=time.sleep).running(Job("work", 10, rounds.work)):
        await time.advance(0)
    assert rounds.began_at == [0]


@pytest.mark.parametrize(
    "jobs",
    [
        lambda work: [Job("twice", 1, work), Job("twice", 1, work)],
        lambda work: [Job("alone", 1, work, Scope.ONE_WORKER)],
    ],
)
async def test_a_name_that_is_taken_and_a_lock_that_is_missing_are_refused(
    time: ManualTime, runner: JobRunner, jobs: Callable[[Callable[[], Awaitable[None]]], list[Job]]
) -> None:
    with pytest.raises(ValueError, match=r"twice already|alone needs locks"):
        async with runner.running(*jobs(Rounds(time).work)):
            pass
