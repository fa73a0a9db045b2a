"""What the journal knows of revoked certificates: the port `JournaledRevocations`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.revocation_ports import JournaledRevocation
from kms.store.journal import JournaledCertificate
from kms.store.journal_knowledge import JournalKnowledge

_REASONS: Final = frozenset(RevocationReason)


@dataclass(frozen=True, slots=True)
class KnownRevocations:
    """`JournaledRevocations` by the journal of this machine. None: there is no journal, and it knows nothing."""

    knowledge: JournalKnowledge | None

    def find(self, issuer_id: UUID, serial_number: int) -> JournaledRevocation | None:
        """See `JournaledRevocations.find`."""
        known = None if self.knowledge is None else self.knowledge.revoked_certificate(issuer_id, serial_number)
        return None if known is None else _revocation(known)

    def of_shard(self, issuer_id: UUID, shard: int, *, after: int) -> Sequence[JournaledRevocation]:
        """See `JournaledRevocations.of_shard`."""
        if self.knowledge is None:
            return ()
        return [_revocation(known) for known in self.knowledge.revoked_of_shard(issuer_id, shard, after=after)]


def _revocation(certificate: JournaledCertificate) -> JournaledRevocation:
    reason = RevocationReason(certificate.reason) if certificate.reason in _REASONS else RevocationReason.UNSPECIFIED
    return JournaledRevocation(certificate.serial_number, Revocation(certificate.revoked_at, reason), certificate.expires_at)
