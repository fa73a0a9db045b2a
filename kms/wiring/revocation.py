"""The parts that revoke certificates, and publish what is known of them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import structlog

from kms.certificates.crls import CrlPublishing
from kms.certificates.issuer import Issuer
from kms.certificates.ocsp import OcspAnswering
from kms.certificates.postgres.authorities import StoredAuthorities
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.postgres.journaled import KnownRevocations
from kms.certificates.postgres.revocations import StoredAnswers, StoredCrls
from kms.certificates.profiles import BUILT_IN
from kms.certificates.publishing.bounded import HttpLimits
from kms.certificates.publishing.http import published
from kms.certificates.publishing.locks import ShardLocks
from kms.certificates.publishing.publications import RememberedPublications
from kms.certificates.publishing.rate import Bucket
from kms.certificates.responders import Responders
from kms.certificates.revocation_jobs import OcspRounds, revocation_jobs
from kms.certificates.revoking import Revoking
from kms.certificates.service_keys import OCSP, ServiceKeys
from kms.config import PublishingConfig
from kms.jobs.job import Job
from kms.pki.client_identity import host_clock
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool

_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class RevocationParts:
    """What revokes, what makes CRLs and OCSP answers, and what publishes both."""

    revoking: Revoking
    publishing: CrlPublishing
    rounds: OcspRounds
    publications: RememberedPublications

    def jobs(self) -> list[Job]:
        """Return the jobs: one worker at a time does each."""
        return revocation_jobs(self.publishing, self.rounds)


def revocation_parts(
    config: PublishingConfig | None,
    pool: Pool,
    authorities: StoredAuthorities,
    certificates: StoredCertificates,
    keys: ServiceKeys,
    issuer: Issuer,
    knowledge: JournalKnowledge | None,
    has_room: Callable[[], bool],
) -> RevocationParts:
    """Return the parts, as `kms serve` has them. *has_room*: whether what strangers cause may be recorded."""
    known, answers, locks = KnownRevocations(knowledge), StoredAnswers(pool), ShardLocks()
    per_second = (config or PublishingConfig()).ocsp_signatures_per_second
    rate = Bucket(per_second, max(1, int(2 * per_second)), monotonic, has_room)
    publishing = CrlPublishing(authorities, certificates, StoredCrls(pool, certificates), keys, known, locks, host_clock)
    responders = Responders(authorities, certificates, answers, keys, issuer, BUILT_IN[OCSP], locks)
    answering = OcspAnswering(authorities, certificates, answers, keys, responders, known, rate)
    return RevocationParts(
        Revoking(authorities, certificates, publishing),
        publishing,
        OcspRounds(authorities, responders, answering, answers),
        RememberedPublications(authorities, publishing, answering, host_clock, monotonic),
    )


@asynccontextmanager
async def publishing(
    config: PublishingConfig | None, publications: RememberedPublications, *, shares_port: bool
) -> AsyncIterator[None]:
    """Publish on the address of *config* within the block; None: nowhere."""
    if config is None:
        yield
        return
    limits = HttpLimits(config.connections_max, config.connection_seconds)
    async with published(config.listen, publications, limits, host_clock, shares_port=shares_port) as port:
        _LOG.info("publishing", address=config.listen, port=port)
        yield
