"""What the journal knows of revoked certificates: the port `JournaledRevocations`."""

from collections.abc import Mapping
from dataclasses import dataclass

from kms.certificates.authority import Authority
from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.revocation_ports import JournaledRevocation
from kms.store.journal import JournaledCertificate
from kms.store.journal_knowledge import JournalKnowledge


@dataclass(frozen=True, slots=True)
class KnownRevocations:
    """`JournaledRevocations` by the journal of this machine. None: there is no journal, and it knows nothing."""

    knowledge: JournalKnowledge | None

    def __call__(self, authority: Authority) -> Mapping[int, JournaledRevocation]:
        """See `JournaledRevocations`."""
        if self.knowledge is None:
            return {}
        known = self.knowledge.revoked_certificates(authority.authority_id)
        return {serial: _revocation(certificate) for serial, certificate in known.items()}


def _revocation(certificate: JournaledCertificate) -> JournaledRevocation:
    reasons = set(RevocationReason)
    reason = RevocationReason(certificate.reason) if certificate.reason in reasons else RevocationReason.UNSPECIFIED
    return JournaledRevocation(Revocation(certificate.revoked_at, reason), certificate.shard, certificate.expires_at)
