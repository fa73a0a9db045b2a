"""The jobs of revocation: CRLs and OCSP answers are made before somebody asks for them."""

from dataclasses import dataclass
from typing import Final

import structlog

from kms.certificates.authority import Authority, AuthorityRef
from kms.certificates.crls import CrlPublishing
from kms.certificates.ocsp import MISSING_MAX, OcspAnswering
from kms.certificates.ports import Authorities
from kms.certificates.responders import Responders
from kms.certificates.revocation_ports import Answers
from kms.domain.errors import KmsError, Reason
from kms.jobs.job import Job, Scope

CRLS: Final = "crls"
OCSP: Final = "ocsp"
_CRLS_SECONDS: Final = 30.0
_OCSP_SECONDS: Final = 60.0
_WARNS_AFTER_SECONDS: Final = 1800.0
_LOG = structlog.get_logger("kms.certificates")


@dataclass(frozen=True, slots=True)
class OcspRounds:
    """Renews the signers of all authorities, and signs the answers that are missing or end soon."""

    authorities: Authorities
    responders: Responders
    answering: OcspAnswering
    answers: Answers

    async def run(self) -> None:
        """Do a round. What fails for one authority is logged, holds up no other, and is raised at the end."""
        failure: KmsError | None = None
        for authority_id in await self.answers.issuer_ids():
            try:
                authority = await self.authorities.find(AuthorityRef(authority_id=authority_id))
                if authority is not None:
                    await self._serve(authority)
            except KmsError as error:
                failure = error
                _LOG.error("OCSP not served", authority=str(authority_id), reason=error.reason, message=error.message)
        await self.answers.forget()
        if failure is not None:
            raise failure

    async def _serve(self, authority: Authority) -> None:
        try:
            await self.responders.renew(authority)
        except KmsError as error:
            if error.reason is not Reason.AUTHORITY_INACTIVE:
                raise
            return  # pending, or its certificate has ended
        while await self.answering.sign_missing(authority) == MISSING_MAX:
            pass


def revocation_jobs(publishing: CrlPublishing, rounds: OcspRounds) -> list[Job]:
    """Return the jobs. One worker of the deployment at a time does a round of each."""
    return [
        Job(CRLS, _CRLS_SECONDS, publishing.publish_due, Scope.ONE_WORKER, warns_after_seconds=_WARNS_AFTER_SECONDS),
        Job(OCSP, _OCSP_SECONDS, rounds.run, Scope.ONE_WORKER, warns_after_seconds=_WARNS_AFTER_SECONDS),
    ]
