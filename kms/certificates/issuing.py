"""What callers ask of authorities: certificates, their renewal, and a look at them.

Who may have a certificate is decided by the record of the authority, under a MAC, and by the caller's permission: the first
cannot be planted in the database, and the second ends with the role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from kms.app.keyring import require_key, require_usable_key
from kms.app.ports import Call, Keys, User
from kms.certificates.authority import Authority, AuthorityRef, authority_not_found, check_active
from kms.certificates.certificate import (
    Certificate,
    CertificateFilter,
    CertificatePlace,
    Issuance,
    certificate_not_found,
)
from kms.certificates.issuer import Draft, Issuer
from kms.certificates.names import EMPTY, GeneralName, NameKind, Subject
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.profiles import OF_THE_SERVICE, Profile
from kms.certificates.x509.certificates import parse_certificate
from kms.certificates.x509.requests import CertificateRequest, parse_request
from kms.certificates.x509.signing import spki_of_pem
from kms.certificates.x509.stored import named_in
from kms.domain.algorithms import Purpose
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId, KeyRef, UserId, base_name, identity_uri
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Use
from kms.domain.permissions import Permission, permission_denied
from kms.keys.ledger.repeats import RepeatableRequest, Repeats


@dataclass(frozen=True, slots=True)
class CertificateWish:
    """What a caller asks of a certificate. Its key is that of `csr`, or `key` of the caller.

    None, and no names: as the request says. `user_id` is the user for whom it is, and whose URI is its one name.
    """

    authority: AuthorityRef
    profile: str
    csr: bytes | None
    key: KeyRef | None
    subject: Subject | None = None
    names: tuple[GeneralName, ...] = ()
    user_id: UserId | None = None
    validity: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate as it is at a moment, and those of its issuers (DER), the nearest first.

    No `chain`: it was issued elsewhere.
    """

    certificate: Certificate
    chain: tuple[bytes, ...]
    at: datetime


@dataclass(frozen=True, slots=True)
class _CertifiedKey:
    """The key of a certificate: its SPKI in DER, and which of our keys it is, if it is one."""

    public_key: bytes
    key_id: KeyId | None
    request: CertificateRequest | None = None


@dataclass(frozen=True, slots=True)
class Issuing:
    """IssueCertificate, RenewCertificate, GetCertificate, ListCertificates. *profiles* are by name."""

    authorities: Authorities
    certificates: Certificates
    issuer: Issuer
    keys: Keys
    repeats: Repeats
    profiles: Mapping[str, Profile]
    deployment: str

    async def issue(self, call: Call, wish: CertificateWish, repeatable: RepeatableRequest | None) -> Issued:
        """Issue a certificate. For a repeated request return the one that was issued then, as it is now.

        Raises AUTHORITY_NOT_FOUND, AUTHORITY_INACTIVE, PERMISSION_DENIED, CERTIFICATE_INVALID, MALFORMED, KEY_NOT_FOUND and why
        the key must not be used, REQUEST_ID_REUSED, and what `Issuer.issue` raises.
        """
        answers = None if repeatable is None else await self.repeats.answers(call, repeatable)
        stored = None if answers is None else await answers.find()
        if stored is not None:
            return await self.find(call.user, UUID(bytes=stored.content))
        authority = await self.require(wish.authority)
        check_active(authority, now := await self.certificates.now())
        profile = self._profile(wish.profile)
        may_choose = self._check_may_issue(call.user, authority, profile)
        key = await self._key(call.user, wish.csr, wish.key)
        draft = self._draft(call.user, wish, profile, key, may_choose=may_choose)
        keep = None if answers is None else lambda certificate_id: answers.storable(certificate_id.bytes)
        certificate = await self.issuer.issue(call, authority, draft, keep)
        return Issued(certificate, _chain(authority), now)

    async def renew(
        self,
        call: Call,
        certificate_id: UUID,
        csr: bytes | None,
        validity: timedelta | None,
        repeatable: RepeatableRequest | None,
    ) -> Issued:
        """Issue a certificate that says what another says, and list the other as superseded from now on.

        Its key is that of *csr*, or the key of the caller which has the name of the other's key, or the same key. Raises
        CERTIFICATE_NOT_FOUND, CERTIFICATE_REVOKED, and what `issue` raises.
        """
        answers = None if repeatable is None else await self.repeats.answers(call, repeatable)
        stored = None if answers is None else await answers.find()
        if stored is not None:
            return await self.find(call.user, UUID(bytes=stored.content))
        old = await self.require_certificate(call.user, certificate_id)
        if old.issuer_id is None or old.issuance is not Issuance.ISSUED:
            raise malformed("certificate_id", "expected a certificate that an authority of this service has issued")
        if old.revocation is not None:
            raise KmsError(Reason.CERTIFICATE_REVOKED, "the certificate is revoked: ask for another")
        issued_by = await self.require(AuthorityRef(authority_id=old.issuer_id))
        authority = await self.require(AuthorityRef(name=issued_by.name))
        check_active(authority, now := await self.certificates.now())
        profile = self._profile(old.profile)
        may_choose = self._check_may_issue(call.user, authority, profile)
        subject, names = named_in(old.der)
        if not may_choose and names != (self._uri(call.user.user_id),):
            raise permission_denied(Permission.CERTS_ISSUE)
        key = await self._key_of_renewal(call.user, old, csr)
        if key.request is not None:
            key.request.check_extensions(profile)
        draft = Draft(old.owner_id, key.key_id, profile, subject, names, key.public_key, validity, certificate_id)
        keep = None if answers is None else lambda new_id: answers.storable(new_id.bytes)
        certificate = await self.issuer.issue(call, authority, draft, keep)
        await self._supersede(call, old, now)
        return Issued(certificate, _chain(authority), now)

    async def find(self, caller: User, certificate_id: UUID) -> Issued:
        """Return a certificate that *caller* sees. Raises CERTIFICATE_NOT_FOUND."""
        certificate, now = await self.require_certificate(caller, certificate_id), await self.certificates.now()
        if certificate.issuer_id is None:
            return Issued(certificate, (), now)
        return Issued(certificate, _chain(await self.require(AuthorityRef(authority_id=certificate.issuer_id))), now)

    async def page(
        self,
        caller: User,
        authority: AuthorityRef | None,
        key: KeyRef | None,
        *,
        after: CertificatePlace | None,
        limit: int,
    ) -> Sequence[Certificate]:
        """Return at most *limit* certificates that *caller* sees, after the place *after*, the newest first."""
        issuer = None if authority is None else await self.require(authority)
        key_id = None if key is None else (await require_key(self.keys, caller.user_id, key)).identity.key_id
        which = CertificateFilter(None if issuer is None else issuer.authority_id, key_id)
        found = await self.certificates.page(caller, which, after=after, limit=limit)
        # Row security leaves the others out, unless somebody has changed it.
        sees_all = issuer is not None and issuer.is_open_to(caller.user_id)
        if any(each.owner_id != caller.user_id and not sees_all for each in found):
            raise record_invalid()
        return found

    async def now(self) -> datetime:
        """Return the moment by the database's clock."""
        return await self.certificates.now()

    async def require(self, ref: AuthorityRef) -> Authority:
        """Return an authority, or raise AUTHORITY_NOT_FOUND."""
        authority = await self.authorities.find(ref)
        if authority is None:
            raise authority_not_found()
        return authority

    async def require_certificate(self, caller: User, certificate_id: UUID) -> Certificate:
        """Return a certificate that *caller* sees, or raise CERTIFICATE_NOT_FOUND."""
        certificate = await self.certificates.find(caller, certificate_id)
        if certificate is None:
            raise certificate_not_found()
        if certificate.owner_id != caller.user_id:
            # Row security has shown it. The records of both prove that it may.
            issuer_id = certificate.issuer_id
            issuer = None if issuer_id is None else await self.authorities.find(AuthorityRef(authority_id=issuer_id))
            if issuer is None or not issuer.is_open_to(caller.user_id):
                raise record_invalid()
        return certificate

    def _profile(self, name: str) -> Profile:
        profile = None if name in OF_THE_SERVICE else self.profiles.get(name)
        if profile is None:
            known = ", ".join(sorted(set(self.profiles) - OF_THE_SERVICE))
            raise malformed("profile", f"expected one of {known}")
        return profile

    def _check_may_issue(self, caller: User, authority: Authority, profile: Profile) -> bool:
        """Return whether *caller* chooses what the certificate says; else it is their own. Raises PERMISSION_DENIED."""
        if authority.issues(caller.user_id, profile.name) and Permission.CERTS_ISSUE in caller.permissions:
            return True
        if profile.name in authority.self_service:
            return False
        if Permission.CERTS_ISSUE not in caller.permissions:
            raise permission_denied(Permission.CERTS_ISSUE)
        message = f"the manager of the authority {authority.name} has not let you issue certificates of profile {profile.name}"
        raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_ISSUE)

    def _draft(self, caller: User, wish: CertificateWish, profile: Profile, key: _CertifiedKey, *, may_choose: bool) -> Draft:
        subject, names = wish.subject or EMPTY, wish.names
        if key.request is not None:
            key.request.check_extensions(profile)
            subject, names = subject if subject.attributes else key.request.subject, names or key.request.names
        owner_id = wish.user_id or caller.user_id
        own = (self._uri(owner_id),)
        if not may_choose and (owner_id != caller.user_id or subject.attributes or names not in ((), own)):
            message = "you issue for yourself only: without a subject, and with no name but your own URI"
            raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_ISSUE)
        if wish.user_id is not None and names not in ((), own):
            raise malformed("names", "expected none with user_id: the URI of the user is the one name")
        if wish.user_id is not None or not may_choose:
            names = own
        return Draft(owner_id, key.key_id, profile, subject, names, key.public_key, wish.validity)

    def _uri(self, user_id: UserId) -> GeneralName:
        return GeneralName(NameKind.URI, identity_uri(self.deployment, user_id))

    async def _key(self, caller: User, csr: bytes | None, key: KeyRef | None) -> _CertifiedKey:
        if csr is not None:
            request = parse_request(csr)
            return _CertifiedKey(request.public_key, None, request)
        if key is None:
            raise malformed("public_key", "expected a csr or a key")
        return _own_key((await require_usable_key(self.keys, caller.user_id, key, Use.PROTECT, fresh=True)).record)

    async def _key_of_renewal(self, caller: User, old: Certificate, csr: bytes | None) -> _CertifiedKey:
        if csr is not None:
            return await self._key(caller, csr, None)
        if old.key_id is None or old.owner_id != caller.user_id:
            return _CertifiedKey(parse_certificate(old.der).public_key, old.key_id)
        name = base_name((await require_key(self.keys, caller.user_id, old.key_id)).name)
        return await self._key(caller, None, name)

    async def _supersede(self, call: Call, old: Certificate, at: datetime) -> None:
        """List *old* as superseded. Another renewal at the same moment may have done so, or somebody may have revoked it."""
        if old.superseded_at is None:
            await self.certificates.supersede(call, old.superseded(at))


def check_signs(key: KeyRecord) -> None:
    """Raise WRONG_PURPOSE unless *key* is one that signs."""
    if key.identity.spec.purpose is not Purpose.SIGNING:
        raise KmsError(Reason.WRONG_PURPOSE, "this key does not sign", purpose=key.identity.spec.purpose)


def _own_key(key: KeyRecord) -> _CertifiedKey:
    check_signs(key)
    return _CertifiedKey(spki_of_pem(key.public_key), key.identity.key_id)


def _chain(authority: Authority) -> tuple[bytes, ...]:
    return () if authority.certificate is None else (authority.certificate, *authority.chain)
