"""The parts of the certificate authority."""

from collections.abc import Callable, Mapping
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
from kms.config import Config
from kms.jobs.job import Job
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from kms.wiring.key_uses import KeyUses
from kms.wiring.profiles import profiles_of
from kms.wiring.revocation import RevocationParts, revocation_parts


@dataclass(frozen=True, slots=True)
class CertificateParts:
    """What is stored of authorities and certificates, and what works with it."""

    authorities: StoredAuthorities
    certificates: StoredCertificates
    keys: ServiceKeys
    issuer: Issuer
    revocation: RevocationParts
    profiles: Mapping[str, Profile]
    deployment: str

    def jobs(self) -> list[Job]:
        """Return the jobs of each worker."""
        return [abandoning_job(self.certificates), *self.revocation.jobs()]

    def servicer(self, uses: KeyUses) -> CertificateServicer:
        """Return the servicer of CertificateService."""
        authorities, certificates, issuer = self.authorities, self.certificates, self.issuer
        return CertificateServicer(
            ManagingAuthorities(authorities, certificates, self.keys, issuer, self.profiles),
            Issuing(authorities, certificates, issuer, uses.keys, uses.repeats, self.profiles, self.deployment),
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
    profiles = profiles_of(config.certificates)
    return CertificateParts(authorities, certificates, keys, issuer, revocation, profiles, config.deployment_id)
