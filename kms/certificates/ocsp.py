"""Answering OCSP requests: from what was signed before, or by the delegated signer on demand.

    request ──► stored answer, still good, and as the record says ──► sent
            ──► a nonce, several certificates, no such answer ──────► signed now, at a bound rate ──► sent; stored without a nonce

Beyond the rate, a request with a nonce gets the stored answer, without it. The signer is a key of its own, with a certificate of
the profile `ocsp` (RFC 6960 section 4.2.2.2). A stored answer is believed with the signer's signature, and never where the record
or the journal calls the certificate revoked and the answer does not.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import structlog

from kms.certificates.authority import Authority, check_signs
from kms.certificates.certificate import Certificate, Issuance, Revocation, serial_text
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.publishing.documents import Document
from kms.certificates.responders import BOUND_TO, Responders, is_to_be_renewed
from kms.certificates.revocation_ports import Answers, JournaledRevocations, NewAnswer, Signer
from kms.certificates.x509.ocsp import (
    CertId,
    CertStatus,
    OcspError,
    OcspRequest,
    build_answer,
    error_answer,
    issuer_hashes,
    parse_answer,
    parse_ocsp_request,
)
from kms.domain.errors import KmsError, Reason

ANSWER_LIFETIME: Final = timedelta(days=2)
RENEWED_BEFORE_END: Final = timedelta(days=1)
MISSING_MAX: Final = 1_000
_LOOK_AGAIN: Final = timedelta(seconds=1)
_LOG = structlog.get_logger("kms.certificates")


class Rate(Protocol):
    """How many signatures may be made on demand."""

    def take(self) -> bool:
        """Whether there is one left now; it is taken."""
        ...


@dataclass(frozen=True, slots=True)
class OcspAnswering:
    """Answers requests about the certificates of authorities. `_responders` remembers the signer of each authority."""

    authorities: Authorities
    certificates: Certificates
    answers: Answers
    signer: Signer
    responders: Responders
    journaled: JournaledRevocations
    rate: Rate
    _responders: "MutableMapping[UUID, _KnownResponder]" = field(default_factory=dict, repr=False)

    async def answer(self, authority: Authority, data: bytes) -> Document:
        """Return the answer to the request in *data*; an OCSP error where there is none. Raises STORE_UNAVAILABLE."""
        now = await self.authorities.now()
        try:
            check_signs(authority, now)
            request = parse_ocsp_request(data)
        except KmsError as error:
            is_inactive = error.reason is Reason.AUTHORITY_INACTIVE
            return _refused(OcspError.UNAUTHORIZED if is_inactive else OcspError.MALFORMED_REQUEST, now)
        if not all(_is_of(authority, cert_id) for cert_id in request.cert_ids):
            return _refused(OcspError.UNAUTHORIZED, now)
        try:
            return await self._answered(authority, request, now)
        except KmsError as error:
            if error.reason is Reason.STORE_UNAVAILABLE:
                raise
            _LOG.warning(
                "OCSP request not answered", authority=str(authority.authority_id), reason=error.reason, message=error.message
            )
            return _refused(OcspError.TRY_LATER, now)

    async def _answered(self, authority: Authority, request: OcspRequest, now: datetime) -> Document:
        responder = await self._responder(authority, now)
        is_common = len(request.cert_ids) == 1 and request.nonce is None
        if is_common and (stored := await self._stored(authority, request.cert_ids[0], responder, now)) is not None:
            return stored
        statuses = [await self._status(authority, cert_id) for cert_id in request.cert_ids]
        known = [status for status in statuses if status is not None]
        if len(known) < len(statuses):
            return _refused(OcspError.UNAUTHORIZED, now)
        if not self.rate.take():
            return await self._without_nonce(authority, request, responder, now) or _refused(OcspError.TRY_LATER, now)
        document = await self._signed(authority, responder, known, request.nonce, now)
        if is_common:
            await self._store(authority, known[0], document)
        return document

    async def _without_nonce(
        self, authority: Authority, request: OcspRequest, responder: Certificate, now: datetime
    ) -> Document | None:
        """Return the stored answer to a request whose nonce is left out, which RFC 9654 allows, or None."""
        if len(request.cert_ids) != 1 or request.nonce is None:
            return None
        stored = await self._stored(authority, request.cert_ids[0], responder, now)
        return None if stored is None else replace(stored, next_update=None)

    async def sign_missing(self, authority: Authority) -> int:
        """Sign the answers that an authority lacks or that end soon, about some of its certificates, and return how many."""
        now = await self.authorities.now()
        responder = await self._responder(authority, now)
        if authority.certificate is None:
            return 0
        # No answer is good for longer than its signer.
        good_until = min(now + RENEWED_BEFORE_END, responder.not_after)
        made = 0
        for certificate_id in await self.answers.missing(authority.authority_id, good_until, MISSING_MAX):
            certificate = await self._ours(certificate_id)
            if certificate is None or certificate.issuer_id != authority.authority_id:
                continue
            cert_id = CertId("sha1", *issuer_hashes(authority.certificate, "sha1"), certificate.serial_number)
            status = CertStatus(cert_id, self._revocation(authority, certificate))
            now = await self.authorities.now()
            document = await self._signed(authority, await self._responder(authority, now), [status], None, now)
            await self._store(authority, status, document)
            made += 1
        return made

    async def _ours(self, certificate_id: UUID) -> Certificate | None:
        """Return a certificate, or None, which the log tells, where its record is not as the service left it."""
        try:
            return await self.certificates.find_any(certificate_id)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
        _LOG.error("no OCSP answer: the certificate's record is not ours", certificate=str(certificate_id))
        return None

    async def _responder(self, authority: Authority, now: datetime) -> Certificate:
        """Return the certificate of the signer of an authority. The first is made when somebody asks.

        One that is remembered is looked at again each second, and the journal is asked each time whether it was revoked since.
        """
        known = self._responders.get(authority.authority_id)
        is_revoked = known is not None and self._is_journaled(authority, known.certificate.serial_number)
        if known is not None and not is_revoked and known.is_fresh(now):
            return known.certificate
        try:
            found = await self.responders.find(authority, now) or await self.responders.renew(authority)
        except KmsError as error:
            if error.reason is not Reason.HSM_UNAVAILABLE or known is None or is_revoked:
                raise
            found = known.certificate  # it signs nothing meanwhile, and what it signed before is good
        self._responders[authority.authority_id] = _KnownResponder(found, now)
        return found

    def _is_journaled(self, authority: Authority, serial_number: int) -> bool:
        return self.journaled.find(authority.authority_id, serial_number) is not None

    async def _stored(self, authority: Authority, cert_id: CertId, responder: Certificate, now: datetime) -> Document | None:
        """Return the stored answer, if it is good and says what the record and the journal say."""
        der = await self.answers.find(authority.authority_id, cert_id.serial_number, cert_id.hash_name)
        if der is None:
            return None
        try:
            answer = parse_answer(der, responder.der)
        except KmsError:
            return None  # of an earlier signer, or planted
        if answer.status.cert_id != cert_id or not answer.this_update <= now < answer.next_update:
            return None
        try:
            status = await self._status(authority, cert_id)
        except KmsError as error:
            # Without the token no record is proven. An answer that was signed while it was there is good until its end.
            is_known = self._is_journaled(authority, cert_id.serial_number)
            is_good = error.reason is Reason.HSM_UNAVAILABLE and not is_known
            if not is_good and answer.status.revocation is None:
                raise
            return Document(der, answer.this_update, answer.next_update)
        is_same = status is not None and (status.revocation is None) == (answer.status.revocation is None)
        return Document(der, answer.this_update, answer.next_update) if is_same else None

    async def _status(self, authority: Authority, cert_id: CertId) -> CertStatus | None:
        """Return what the record and the journal say of a certificate; None where the authority has not issued it.

        Raises RECORD_INVALID for a record that is not as the service left it, unless the journal knows that it is revoked.
        """
        try:
            certificate = await self.certificates.find_by_serial(authority.authority_id, cert_id.serial_number)
        except KmsError as error:
            known = self.journaled.find(authority.authority_id, cert_id.serial_number)
            if error.reason is not Reason.RECORD_INVALID or known is None:
                raise
            return CertStatus(cert_id, known.revocation)
        if certificate is None or certificate.issuance is Issuance.INTENDED:
            return None
        return CertStatus(cert_id, self._revocation(authority, certificate))

    def _revocation(self, authority: Authority, certificate: Certificate) -> Revocation | None:
        known = self.journaled.find(authority.authority_id, certificate.serial_number)
        return certificate.revocation if known is None else known.revocation

    async def _signed(
        self, authority: Authority, responder: Certificate, statuses: Sequence[CertStatus], nonce: bytes | None, now: datetime
    ) -> Document:
        if responder.key_id is None:
            raise AssertionError("checked: the signer's key is the service's")
        this_update = now.replace(microsecond=0)
        next_update = min(this_update + ANSWER_LIFETIME, responder.not_after)
        unsigned = build_answer(statuses, responder.der, this_update, next_update, nonce)
        details = {
            "authority": str(authority.authority_id),
            "ocsp": ",".join(serial_text(each.cert_id.serial_number) for each in statuses),
        }
        answer = await self.signer.sign(None, responder.owner_id, responder.key_id, BOUND_TO, unsigned, details)
        return Document(answer, this_update, next_update if nonce is None and len(statuses) == 1 else None)

    async def _store(self, authority: Authority, status: CertStatus, document: Document) -> None:
        if document.next_update is not None:
            is_revoked = status.revocation is not None
            new = NewAnswer(status.cert_id.hash_name, document.content, is_revoked, document.this_update, document.next_update)
            await self.answers.store(authority.authority_id, status.cert_id.serial_number, new)


@dataclass(frozen=True, slots=True)
class _KnownResponder:
    """The certificate of a signer, and when its record was proven last."""

    certificate: Certificate
    looked_at: datetime

    def is_fresh(self, now: datetime) -> bool:
        """Whether the signer needs no look at *now*."""
        return self.looked_at <= now < self.looked_at + _LOOK_AGAIN and not is_to_be_renewed(self.certificate, now)


def _is_of(authority: Authority, cert_id: CertId) -> bool:
    """Whether a request names *authority* as the issuer."""
    if authority.certificate is None:
        return False
    return (cert_id.issuer_name_hash, cert_id.issuer_key_hash) == issuer_hashes(authority.certificate, cert_id.hash_name)


def _refused(error: OcspError, now: datetime) -> Document:
    return Document(error_answer(error), now, None)
