"""The jobs of rotation: of keys, of keys that are due by policy, and of the master keys."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from kms.jobs.job import Job, Scope
from kms.jobs.leases import LeasePolicy
from kms.jobs.leasing import LeasedWorker
from kms.rotation.envelopes import StoredEnvelopes, rewrapping_leases
from kms.rotation.leases import rotation_leases
from kms.rotation.rewrapping import Rewrapping, Token
from kms.rotation.rotating import FINAL_REASONS, RotatingWorker
from kms.rotation.scheduling import PolicyRounds
from kms.store.pool import Pool

ROTATIONS: Final = "rotations"
REWRAPPING: Final = "rewrapping"
POLICIES: Final = "rotation policies"
# A worker that dies holds a rotation up for as long. The same key is not used less meanwhile.
POLICY: Final = LeasePolicy(lease_seconds=15.0, backoff_seconds_min=2.0, backoff_seconds_max=600.0, attempts_max=10)
REWRAPPING_POLICY: Final = LeasePolicy(lease_seconds=30.0, backoff_seconds_min=2.0, backoff_seconds_max=300.0)
_INTERVAL_SECONDS: Final = 2.0
_SLICES_AT_ONCE: Final = 2
_POLICIES_SECONDS: Final = 5.0
_WARNS_AFTER_SECONDS: Final = 300.0


@asynccontextmanager
async def rotation_worker(pool: Pool, worker: RotatingWorker) -> AsyncIterator[LeasedWorker]:
    """Yield what does rotations that are due. At the end it gives back what it still works on."""
    made = LeasedWorker(rotation_leases(pool), worker.rotate, POLICY, final_reasons=FINAL_REASONS)
    try:
        yield made
    finally:
        await made.close()


def policy_job(rounds: PolicyRounds) -> Job:
    """Return the job that asks for what has become due by policy. One worker of the deployment at a time does it."""
    return Job(POLICIES, _POLICIES_SECONDS, rounds.ask_for_due, Scope.ONE_WORKER, warns_after_seconds=_WARNS_AFTER_SECONDS)


def rotation_job(worker: LeasedWorker) -> Job:
    """Return the job of each worker: they share what is due."""
    return Job(ROTATIONS, _INTERVAL_SECONDS, worker.do_due, warns_after_seconds=_WARNS_AFTER_SECONDS)


def rewrapping_job(pool: Pool, token: Token) -> Job:
    """Return the job of each worker that moves envelopes to the generation that makes new ones: they share the slices."""
    rewrapping = Rewrapping(token, StoredEnvelopes(pool))
    worker = LeasedWorker(rewrapping_leases(pool, rewrapping.leavable), rewrapping.rewrap, REWRAPPING_POLICY)

    async def move() -> None:
        if not await rewrapping.plan():
            return
        # While the database stores the envelopes of one slice, the token works on the other.
        for ended in await asyncio.gather(*(worker.do_due() for _ in range(_SLICES_AT_ONCE)), return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    return Job(REWRAPPING, _INTERVAL_SECONDS, move)
