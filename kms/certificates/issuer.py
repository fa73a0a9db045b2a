"""Signing a certificate: intent, act, outcome. Nothing here asks whether the caller may have it.

    write what is to be signed, and read it again
      ──► intent: the row with serial number, names and hash is stored
      ──► act: the token signs; the use of the authority's key is charged
      ──► outcome: the certificate is stored ──► and only then answered

Where the service dies in between, the row stays `intended`. A job makes it `abandoned` and revoked, since nobody knows whether
the token has signed. So each serial number is accounted for.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final
from uuid import UUID

from kms.app.ports import Call, Repeat
from kms.certificates.authority import Authority, check_active
from kms.certificates.certificate import Certificate, new_serial_number, serial_text
from kms.certificates.constraints import NameConstraints
from kms.certificates.names import GeneralName, Subject
from kms.certificates.ports import Certificates
from kms.certificates.profiles import Profile
from kms.certificates.service_keys import ServiceKeys
from kms.certificates.x509.certificates import IssuerCertificate, ToCertify, build_certificate, issuer_of, parse_certificate
from kms.certificates.x509.lint import lint
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId

SERIAL_BYTES: Final = 20

Keep = Callable[[UUID], Repeat]
"""Makes of a new certificate's id the answer that is stored for a repeat of the request."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a new certificate is to say, and whose it is. `validity` and `path_length` None: as the profile says."""

    owner_id: UserId
    key_id: KeyId | None
    profile: Profile
    subject: Subject
    names: tuple[GeneralName, ...]
    public_key: bytes
    validity: timedelta | None = None
    replaces: UUID | None = None
    path_length: int | None = None
    name_constraints: NameConstraints | None = None


@dataclass(frozen=True, slots=True)
class Issuer:
    """Signs certificates for authorities."""

    certificates: Certificates
    keys: ServiceKeys
    random: Callable[[int], Awaitable[bytes]]

    async def issue(self, call: Call | None, authority: Authority, draft: Draft, keep: Keep | None = None) -> Certificate:
        """Issue a certificate of an active authority. None as *call*: the service does it by itself.

        Raises AUTHORITY_INACTIVE, CERTIFICATE_INVALID; STALE if the authority changed since it was read; what
        `ServiceKeys.sign` raises.
        """
        now = await self.certificates.now()
        check_active(authority, now)
        await self._check_not_revoked(authority)
        return await self._signed(call, authority, draft, now, keep, _issuer(authority))

    async def issue_to_itself(self, call: Call, authority: Authority, draft: Draft) -> Certificate:
        """Issue the certificate of a root that is pending: its key signs its own. Raises what `issue` raises."""
        return await self._signed(call, authority, draft, await self.certificates.now(), None, None)

    async def cross_certify(self, call: Call, authority: Authority, draft: Draft) -> Certificate:
        """Have *authority*, which has a certificate, certify the key of another generation. Raises what `issue` raises.

        The path length of *authority* does not count the other generation, which has the same name (RFC 5280 section 4.2.1.9).
        """
        issuer = replace(_issuer(authority), path_length=None)
        return await self._signed(call, authority, draft, await self.certificates.now(), None, issuer)

    async def issue_to_responder(self, authority: Authority, draft: Draft) -> Certificate:
        """Issue the certificate of the signer of OCSP answers: of an authority that is superseded or disabled, too.

        Raises what `issue` raises.
        """
        return await self._signed(None, authority, draft, await self.certificates.now(), None, _issuer(authority))

    async def _signed(
        self,
        call: Call | None,
        authority: Authority,
        draft: Draft,
        now: datetime,
        keep: Keep | None,
        issuer: IssuerCertificate | None,
    ) -> Certificate:
        """Sign a certificate. *issuer* None: the key signs its own."""
        to_certify = await self._to_certify(authority, draft, now, issuer)
        signer = draft.public_key if issuer is None else parse_certificate(issuer.chain[0]).public_key
        unsigned = build_certificate(to_certify, signer)
        lint(unsigned.draft, to_certify)
        intended = Certificate(
            certificate_id=UUID(bytes=await self.random(16), version=4),
            owner_id=draft.owner_id,
            key_id=draft.key_id,
            issuer_id=authority.authority_id,
            profile=draft.profile.name,
            serial_number=to_certify.serial_number,
            issuer=authority.subject,
            subject=str(draft.subject),
            names=tuple(map(str, draft.names)),
            not_before=to_certify.validity.not_before,
            not_after=to_certify.validity.not_after,
            is_ca=draft.profile.is_ca,
            tbs_sha256=sha256(unsigned.to_sign).digest(),
            requested_by=None if call is None else call.user.user_id,
            created_at=now,
            replaces=draft.replaces,
            crl_shard=authority.shard_of(to_certify.serial_number),
        )
        await self.certificates.add(call, intended, authority)
        details = {"certificate": str(intended.certificate_id), "serial": serial_text(intended.serial_number)}
        issued = intended.issued(await self.keys.sign_for(call, authority, unsigned, details))
        await self.certificates.complete(call, issued, None if keep is None else keep(issued.certificate_id))
        return issued

    async def _check_not_revoked(self, authority: Authority) -> None:
        """Raise AUTHORITY_INACTIVE where the certificate of *authority* is revoked. One from elsewhere is not looked at."""
        if authority.parent_id is None and authority.chain:
            return
        issuer_id, parsed = authority.parent_id or authority.authority_id, parse_certificate(_certificate(authority))
        found = await self.certificates.find_by_serial(issuer_id, parsed.serial_number)
        if found is None or found.revocation is not None:
            raise KmsError(Reason.AUTHORITY_INACTIVE, "the certificate of the authority is revoked", state="revoked")

    async def _to_certify(self, authority: Authority, draft: Draft, now: datetime, issuer: IssuerCertificate | None) -> ToCertify:
        serial_number = new_serial_number(await self.random(SERIAL_BYTES))
        return ToCertify(
            serial_number=serial_number,
            subject=draft.subject,
            names=draft.names,
            public_key=draft.public_key,
            profile=draft.profile,
            validity=draft.profile.validity(now, draft.validity, issuer=None if issuer is None else issuer.validity),
            issuer=issuer,
            crl_url=authority.crl_url_of(authority.shard_of(serial_number)) or None,
            ocsp_url=authority.ocsp_url or None,
            issuer_url=authority.certificate_url or None,
            path_length=draft.path_length,
            name_constraints=draft.name_constraints,
        )


def _issuer(authority: Authority) -> IssuerCertificate:
    return issuer_of((_certificate(authority), *authority.chain))


def _certificate(authority: Authority) -> bytes:
    if authority.certificate is None:
        raise KmsError(Reason.AUTHORITY_INACTIVE, "the authority waits for its own certificate", state=authority.status)
    return authority.certificate
