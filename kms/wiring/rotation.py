"""The parts of rotation, as `kms serve` and `kms work` have them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kms.app.records import Records
from kms.hsm.token_hsm import TokenHsm
from kms.jobs.job import Job
from kms.jobs.leasing import LeasedWorker
from kms.rotation.jobs import policy_job, rewrapping_job, rotation_job, rotation_worker
from kms.rotation.master_keys import MasterKeys
from kms.rotation.ports import ServedKeys
from kms.rotation.postgres import StoredRotations
from kms.rotation.rotating import RotatingWorker
from kms.rotation.scheduling import PolicyRounds
from kms.rotation.stored_policies import StoredPolicies
from kms.rotation.usage_postgres import StoredUses
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool


@dataclass(frozen=True, slots=True)
class RotationParts:
    """What asks for rotations, and what does them."""

    rotations: StoredRotations
    policies: StoredPolicies
    worker: LeasedWorker
    rounds: PolicyRounds
    uses: StoredUses
    master_keys: MasterKeys
    rewrapping: Job

    def jobs(self) -> list[Job]:
        """Return the jobs of each worker: they share what is due."""
        return [rotation_job(self.worker), policy_job(self.rounds), self.master_keys.job(), self.rewrapping]


@asynccontextmanager
async def rotation_parts(
    pool: Pool,
    records: Records,
    hsm: TokenHsm,
    master_keys: MasterKeys,
    served: ServedKeys,
    journal: Journal | None,
    knowledge: JournalKnowledge | None,
) -> AsyncIterator[RotationParts]:
    """Yield the parts. At the end they give back what they still work on. *served* are keys that this process remembers."""
    rotations, policies = StoredRotations(pool, records, knowledge, journal), StoredPolicies(pool, records, knowledge)
    async with rotation_worker(pool, RotatingWorker(rotations, policies, hsm, served)) as worker:
        rounds, rewrapping = PolicyRounds(policies, rotations, hsm), rewrapping_job(pool, hsm)
        yield RotationParts(rotations, policies, worker, rounds, StoredUses(pool), master_keys, rewrapping)
