"""The runner: one task for each job, round after round, and a record of how the rounds ended.

    round ──► success: the moment is kept
          ──► KmsError: "put off" in the log, next round in its time
          ──► anything else: a bug, with its traceback in the log; next round in its time
          ──► another worker is in the round (ONE_WORKER): skipped

Only the end of the block ends a job.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import structlog

from kms.domain.errors import INTERNAL, KmsError
from kms.jobs.job import Job, JobStatus, Scope, Work

_LOG = structlog.get_logger("kms")


class DeploymentLocks(Protocol):
    """Locks that one worker of the whole deployment holds at a time."""

    async def run_alone(self, name: str, work: Work) -> bool:
        """Do *work* while holding the lock *name*. Return False at once if another worker holds it.

        Raises what *work* raises, and STORE_UNAVAILABLE.
        """
        ...


@dataclass(slots=True, eq=False)
class _Record:
    """How the rounds of one job ended, in moments of the runner's clock. It changes with each round."""

    job: Job
    began_at: float
    succeeded_at: float | None = None
    skipped_at: float | None = None
    failed_at: float | None = None
    failures: int = 0
    last_failure: str = ""

    def succeed(self, now: float) -> None:
        self.succeeded_at = now
        self.last_failure = ""

    def fail(self, now: float, why: str) -> None:
        self.failed_at = now
        self.failures += 1
        self.last_failure = why

    def status(self, now: float) -> JobStatus:
        succeeded_at = self.began_at if self.succeeded_at is None else self.succeeded_at
        idle_since = succeeded_at if self.skipped_at is None else max(succeeded_at, self.skipped_at)
        failure_age = None if self.failed_at is None else now - self.failed_at
        return JobStatus(self.job, now - succeeded_at, now - idle_since, failure_age, self.failures, self.last_failure)


class JobRunner:
    """Runs jobs, and knows how each of them does.

    `locks` serves jobs of the scope ONE_WORKER. `now` is a clock that only goes forward, `sleep` waits by it.
    """

    def __init__(
        self,
        locks: DeploymentLocks | None = None,
        *,
        now: Callable[[], float] = monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._locks = locks
        self._now = now
        self._sleep = sleep
        self._records: dict[str, _Record] = {}

    @asynccontextmanager
    async def running(self, *jobs: Job) -> AsyncIterator[None]:
        """Run *jobs* within the block. Raises ValueError for a name that is in use, or a job that needs missing locks."""
        for job in jobs:
            if job.name in self._records:
                raise ValueError(f"there is a job {job.name} already")
            if job.scope is Scope.ONE_WORKER and self._locks is None:
                raise ValueError(f"the job {job.name} needs locks of the deployment")
            self._records[job.name] = _Record(job, self._now())
        tasks = [asyncio.create_task(self._repeat(self._records[job.name]), name=job.name) for job in jobs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def note_success(self, name: str) -> None:
        """Count a success of the job *name* within a round that goes on. Raises KeyError for an unknown name."""
        self._records[name].succeed(self._now())

    def statuses(self) -> list[JobStatus]:
        """Return what is known of each job. Any thread may ask."""
        now = self._now()
        return [record.status(now) for record in list(self._records.values())]

    async def _repeat(self, record: _Record) -> None:
        while True:
            await self._round(record)
            await self._sleep(record.job.interval_seconds)

    async def _round(self, record: _Record) -> None:
        name = record.job.name
        try:
            is_done = await self._work(record.job)
        except KmsError as error:
            record.fail(self._now(), error.reason)
            _LOG.warning("put off", job=name, reason=error.reason, message=error.message)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled the job: its work waited for something that was cancelled.
            record.fail(self._now(), INTERNAL)
            _LOG.exception("bug", job=name)
        except Exception:  # noqa: BLE001  # a bug in one round must not end the later rounds
            record.fail(self._now(), INTERNAL)
            _LOG.exception("bug", job=name)
        else:
            if is_done:
                record.succeed(self._now())
            else:
                record.skipped_at = self._now()

    async def _work(self, job: Job) -> bool:
        """Do the work of one round; return False if another worker is doing it."""
        if job.scope is Scope.ONE_WORKER and self._locks is not None:
            return await self._locks.run_alone(job.name, job.work)
        await job.work()
        return True
