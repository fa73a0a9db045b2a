"""Every job of `kms serve`, in one list: work that the service repeats by itself and no call waits for.

Not jobs, and why:

- `store/changes.py` reads a stream (LISTEN): it waits for the database to speak, not for a time.
- `store/ledger.py` and `store/refusals.py` consume queues: calls wait for the first, and both empty their queue at the end.
- `hsm/watch.py` is a thread, because it must notice an event loop that is stuck.
- `rpc/streams.py` looks at the caller of one stream and ends with it.
- `wiring/supervisor.py` starts processes, in a process without a database.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from kms.app.moving import Destruction
from kms.app.ports import Lifecycle
from kms.app.residents import Reconciliation
from kms.domain.ids import KeyId
from kms.domain.residents import ADVICE, Finding
from kms.hsm.token_hsm import TokenHsm
from kms.jobs.job import Job
from kms.pki.client_identity import host_clock
from kms.pki.trust import Trust
from kms.rpc.connections import Connections
from kms.rpc.server import Server
from kms.store import partitions
from kms.store.disk import Disk
from kms.store.journal import Journal
from kms.store.journal_follower import JournalFollower
from kms.store.journaled_uses import JournaledUses
from kms.store.keys import StoredKeys
from kms.store.pool import Pool
from kms.store.repeats import FORGET_MAX, StoredRepeats
from kms.store.resident_rows import StoredResidentRows
from kms.store.sealer import Sealer
from kms.store.watch import DatabaseProbe
from kms.wiring.certificates import CertificateParts
from kms.wiring.condition import Condition
from kms.wiring.limits import closing_connections
from kms.wiring.rotation import RotationParts
from kms.wiring.seen import Pulse
from kms.wiring.trust import trust_job

CHECKPOINTS: Final = "checkpoints"
_MINUTE: Final = 60.0
_HOUR: Final = 3600.0
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class JobParts:
    """What the jobs of a worker work with. `is_first`: of the workers of one service this is the first."""

    pool: Pool
    keys: StoredKeys
    hsm: TokenHsm
    lifecycle: Lifecycle
    journal: Journal | None
    uses: JournaledUses | None
    disk: Disk
    probe: DatabaseProbe
    condition: Condition
    sealer: Sealer | None
    rotation: RotationParts
    certificates: CertificateParts
    trust: Trust
    is_first: bool


def upkeep_jobs(parts: JobParts) -> list[Job]:
    """Return the jobs that need no server. They begin before it listens."""
    pool, hsm = parts.pool, parts.hsm
    destruction = Destruction(parts.lifecycle, hsm)
    jobs = [
        Job("partitions", 6 * _HOUR, partial(partitions.look_after, pool), warns_after_seconds=13 * _HOUR),
        Job("destruction", _MINUTE, partial(destroy_due, destruction), warns_after_seconds=10 * _MINUTE),
        Job("repeats", _MINUTE, partial(forget_answers, StoredRepeats(pool)), warns_after_seconds=_HOUR),
        Job("condition", 5.0, parts.condition.check, warns_after_seconds=_MINUTE),
        Job("disk", 5.0, parts.disk.watch),
        *parts.rotation.jobs(),
        *parts.certificates.jobs(),
        trust_job(parts.trust),
        Job("database", 1.0, parts.probe.ask),
    ]
    if parts.is_first:
        reconciliation = Reconciliation(hsm, StoredResidentRows(pool, parts.keys), hsm.opens, host_clock)
        jobs.append(Job("residents", 5 * _MINUTE, reconciling(reconciliation), warns_after_seconds=_HOUR))
    if parts.journal is not None:
        follower = JournalFollower(pool, parts.journal, parts.keys.records)
        jobs.append(Job("journal", 10.0, follower.catch_up, warns_after_seconds=5 * _MINUTE))
    if parts.uses is not None:
        jobs.append(Job("uses", 1.0, parts.uses.write, warns_after_seconds=_MINUTE))
    if parts.sealer is not None:
        # A round is a term: it lasts for as long as nothing fails. `SealWatch` warns of rows without a checkpoint.
        jobs.append(Job(CHECKPOINTS, 5.0, parts.sealer.serve_term))
    return jobs


def serving_jobs(server: Server, connections: Connections, port: int, pulse: Pulse) -> list[Job]:
    """Return the jobs of a server that listens on *port*."""

    async def report() -> None:
        server.report()

    return [
        Job("health", 0.25, report),
        Job("connections", 0.2, closing_connections(connections, port), warns_after_seconds=_MINUTE),
        Job("pulse", 1.0, pulse.beat),
    ]


async def destroy_due(destruction: Destruction) -> None:
    """Destroy the keys whose time has come. That they are not usable does not wait for it."""
    for key_id in await destruction.destroy_due():
        _LOG.info("key destroyed", key=str(key_id))
    await destruction.remove_objects()


async def forget_answers(repeats: StoredRepeats) -> None:
    """Remove the answers that are no longer given to a repeat. That they are not given does not wait for it."""
    while await repeats.forget() >= FORGET_MAX:
        pass


def reconciling(reconciliation: Reconciliation) -> Callable[[], Awaitable[None]]:
    """Return what reconciles the token with the database once, and logs what is new since the last time."""
    known: dict[KeyId, Finding] = {}

    async def reconcile() -> None:
        found = await reconciliation.run()
        for key_id, finding in found.items():
            if (advice := ADVICE.get(finding)) and known.get(key_id) is not finding:
                _LOG.warning("resident key", key=str(key_id), finding=finding, advice=advice)
        known.clear()
        known.update(found)

    return reconcile
