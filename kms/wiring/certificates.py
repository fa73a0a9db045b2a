"""The parts of the certificate authority."""

from dataclasses import dataclass

from kms.app.access import Access
from kms.app.keyring import Keyring
from kms.app.records import Records
from kms.certificates.authorities import ManagingAuthorities
from kms.certificates.certificate_service import CertificateServicer
from kms.certificates.issuer import Issuer
from kms.certificates.issuing import Issuing
from kms.certificates.jobs import abandoning_job
from kms.certificates.own_keys import OwnKeys
from kms.certificates.postgres.authorities import StoredAuthorities
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.profiles import BUILT_IN
from kms.certificates.service_keys import ServiceKeys
from kms.config import Config
from kms.jobs.job import Job
from kms.keys.crypto.charged import ChargedUses
from kms.keys.ledger.repeats import Repeats
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool
from kms.store.users import StoredUsers


@dataclass(frozen=True, slots=True)
class CertificateParts:
    """What is stored of authorities and certificates, and what works with it."""

    authorities: StoredAuthorities
    certificates: StoredCertificates
    users: StoredUsers
    deployment: str

    def jobs(self) -> list[Job]:
        """Return the jobs of each worker."""
        return [abandoning_job(self.certificates)]

    def servicer(self, access: Access, keyring: Keyring, uses: ChargedUses, repeats: Repeats) -> CertificateServicer:
        """Return the servicer of CertificateService."""
        keys = ServiceKeys(self.users, access, keyring, uses)
        random = keyring.hsm.random
        issuer = Issuer(self.certificates, keys, random)
        return CertificateServicer(
            ManagingAuthorities(self.authorities, self.certificates, keys, issuer, BUILT_IN),
            Issuing(self.authorities, self.certificates, issuer, keyring.keys, repeats, BUILT_IN, self.deployment),
            OwnKeys(keyring.keys, uses, self.certificates, random),
        )


def certificate_parts(
    config: Config, pool: Pool, records: Records, journal: Journal | None, knowledge: JournalKnowledge | None
) -> CertificateParts:
    """Return the parts, as `kms serve` has them."""
    return CertificateParts(
        StoredAuthorities(pool, records, knowledge, journal),
        StoredCertificates(pool, records, knowledge, journal),
        StoredUsers(pool),
        config.deployment_id,
    )
