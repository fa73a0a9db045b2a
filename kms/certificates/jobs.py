"""The job of the certificate authority: what was begun and has no outcome is given up."""

from dataclasses import dataclass
from typing import Final

import structlog

from kms.certificates.certificate import Issuance, serial_text
from kms.certificates.ports import Certificates
from kms.domain.errors import KmsError
from kms.jobs.job import Job

CERTIFICATES: Final = "certificates"
# Longer than any call lasts: a certificate that is being signed is left alone.
OUTCOME_SECONDS_MAX: Final = 600.0
_INTERVAL_SECONDS: Final = 60.0
_WARNS_AFTER_SECONDS: Final = 1800.0
_PAGE: Final = 100
_LOG = structlog.get_logger("kms.certificates")


@dataclass(frozen=True, slots=True)
class Abandoning:
    """Gives up certificates whose intent is older than *seconds* and has no outcome: they are abandoned, and revoked."""

    certificates: Certificates
    seconds: float = OUTCOME_SECONDS_MAX

    async def abandon(self) -> None:
        """Give up what is due. A record that is not ours is left, and logged."""
        while found := await self.certificates.without_outcome(self.seconds, _PAGE):
            done = 0
            for certificate_id in found:
                try:
                    certificate = await self.certificates.find_any(certificate_id)
                    if certificate is None or certificate.issuance is not Issuance.INTENDED:
                        continue
                    done += await self.certificates.abandon(certificate.abandoned(await self.certificates.now()))
                except KmsError as error:
                    _LOG.error("certificate not given up", certificate=str(certificate_id), reason=error.reason)
                else:
                    serial = serial_text(certificate.serial_number)
                    _LOG.warning("certificate given up", certificate=str(certificate_id), serial=serial)
            if done == 0 or len(found) < _PAGE:
                break


def abandoning_job(certificates: Certificates) -> Job:
    """Return the job of each worker: several may do it at once."""
    return Job(CERTIFICATES, _INTERVAL_SECONDS, Abandoning(certificates).abandon, warns_after_seconds=_WARNS_AFTER_SECONDS)
