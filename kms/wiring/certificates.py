"""The parts of the certificate authority."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kms.app.records import Records
from kms.certificates.authorities import ManagingAuthorities
from kms.certificates.certificate_service import CertificateServicer
from kms.certificates.issuer import Issuer
from kms.certificates.issuing import Issuing
from kms.certificates.jobs import abandoning_job
from kms.certificates.own_keys import OwnKeys
from kms.certificates.postgres.authorities import StoredAuthorities
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.profiles import Profile
from kms.certificates.service_keys import ServiceKeys
from kms.config import Config, PublishingConfig
from kms.jobs.job import Job
from kms.pki.trust import Trust
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from kms.wiring.acme import AcmeParts, acme_parts
from kms.wiring.key_uses import KeyUses
from kms.wiring.profiles import profiles_of
from kms.wiring.revocation import RevocationParts, publishing, revocation_parts


@dataclass(frozen=True, slots=True)
class CertificateParts:
    """What is stored of authorities and certificates, and what works with it."""

    authorities: StoredAuthorities
    certificates: StoredCertificates
    keys: ServiceKeys
    issuer: Issuer
    issuing: Issuing
    revocation: RevocationParts
    acme: AcmeParts
    publishing: PublishingConfig | None
    profiles: Mapping[str, Profile]

    def jobs(self) -> list[Job]:
        """Return the jobs of each worker."""
        return [abandoning_job(self.certificates), *self.revocation.jobs(), *self.acme.jobs()]

    @asynccontextmanager
    async def over_http(self, trust: Trust, *, shares_port: bool) -> AsyncIterator[None]:
        """Publish CRLs, OCSP answers and certificates, and serve ACME, within the block; each where it is configured."""
        async with (
            publishing(self.publishing, self.revocation.publications, shares_port=shares_port),
            self.acme.serving(trust, shares_port=shares_port),
        ):
            yield

    def servicer(self, uses: KeyUses) -> CertificateServicer:
        """Return the servicer of CertificateService."""
        authorities, certificates, issuer = self.authorities, self.certificates, self.issuer
        return CertificateServicer(
            ManagingAuthorities(authorities, certificates, self.keys, issuer, self.profiles),
            self.issuing,
            OwnKeys(uses.keys, uses.charged, certificates, uses.hsm.random),
            self.revocation.revoking,
        )


def certificate_parts(
    config: Config,
    pool: Pool,
    records: Records,
    uses: KeyUses,
    journal: Journal | None,
    knowledge: JournalKnowledge | None,
    has_room: Callable[[], bool],
) -> CertificateParts:
    """Return the parts, as `kms serve` has them. *has_room*: whether what strangers cause may be recorded."""
    authorities = StoredAuthorities(pool, records, knowledge, journal)
    certificates = StoredCertificates(pool, records, knowledge, journal)
    keys = ServiceKeys(StoredUsers(pool), uses.access, uses.keyring, uses.charged)
    issuer = Issuer(certificates, keys, uses.hsm.random)
    revocation = revocation_parts(config.publishing, pool, authorities, certificates, keys, issuer, knowledge, has_room)
    profiles, revoking = profiles_of(config.certificates), revocation.revoking
    issuing = Issuing(authorities, certificates, issuer, uses.keys, uses.repeats, profiles, config.deployment_id, keys.users)
    acme = acme_parts(config.acme, pool, records, uses, authorities, certificates, issuing, revoking, journal, knowledge)
    return CertificateParts(authorities, certificates, keys, issuer, issuing, revocation, acme, config.publishing, profiles)
