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
from kms.certificates.names import GeneralName, Subject, certificate_invalid
from kms.certificates.ports import Certificates
from kms.certificates.profiles import Profile
from kms.certificates.service_keys import ServiceKeys
from kms.certificates.x509.certificates import IssuerCertificate, ToCertify, build_certificate, issuer_of, parse_certificate
from kms.certificates.x509.lint import lint
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId

SERIAL_BYTES: Final = 20
OWN_MAX: Final = 100
"""Certificates of one authority that a user gets by themselves."""
LISTED_MAX: Final = 1150
"""Certificates of a CRL in an Ed25519 signature: each takes 53 bytes at most, and `MESSAGE_BYTES_MAX` are signed."""

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

        Raises AUTHORITY_INACTIVE, CERTIFICATE_INVALID; STALE if the authority changed since it was read; USAGE_LIMIT_REACHED
        where the owner, who needs nobody's leave, or a CRL has room for no more; what `ServiceKeys.sign` raises.
        """
        now = await self.certificates.now()
        check_active(authority, now)
        if call is not None and not authority.issues(call.user.user_id, draft.profile.name):
            living = await self.certificates.count_living(authority.authority_id, owner_id=draft.owner_id, shard=None)
            _check_room(living, OWN_MAX, "you have", "of this authority that have not ended")
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
        spki_sha256 = sha256(draft.public_key).digest()
        if await self.certificates.is_compromised(spki_sha256):
            raise certificate_invalid("public_key", "expected a key of which no certificate is revoked as compromised")
        to_certify = await self._to_certify(authority, draft, now, issuer)
        signer = draft.public_key if issuer is None else parse_certificate(issuer.chain[0]).public_key
        shard = authority.shard_of(to_certify.serial_number)
        unsigned = build_certificate(to_certify, signer)
        if call is not None and not draft.profile.is_ca and not unsigned.token_input[1]:
            # It signs no digest but the whole CRL, and the token signs no longer message.
            living = await self.certificates.count_living(authority.authority_id, owner_id=None, shard=shard)
            _check_room(
                living, LISTED_MAX, "the CRL of this certificate may have to list", "and its authority signs no longer one"
            )
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
            spki_sha256=spki_sha256,
            requested_by=None if call is None else call.user.user_id,
            created_at=now,
            replaces=draft.replaces,
            crl_shard=shard,
        )
        await self.certificates.add(call, intended, authority)
        details = {"certificate": str(intended.certificate_id), "serial": serial_text(intended.serial_number)}
        issued = intended.issued(await self.keys.sign_for(call, authority, unsigned, details))
        await self.certificates.complete(call, issued, None if keep is None else keep(issued.certificate_id))
        return issued

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


def _check_room(living: int, most: int, before: str, after: str) -> None:
    if living >= most:
        raise KmsError(Reason.USAGE_LIMIT_REACHED, f"{before} {living} certificates {after}: wait until some have ended")


def _issuer(authority: Authority) -> IssuerCertificate:
    return issuer_of((_certificate(authority), *authority.chain))


def _certificate(authority: Authority) -> bytes:
    if authority.certificate is None:
        raise KmsError(Reason.AUTHORITY_INACTIVE, "the authority waits for its own certificate", state=authority.status)
    return authority.certificate
