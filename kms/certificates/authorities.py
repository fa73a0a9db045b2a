"""Making and changing authorities.

    root            key ──► pending ──► its key signs its own certificate ──► active
    intermediate    key ──► pending ──► its parent issues its certificate ──► active
    external        key ──► pending ──► a request goes out, a certificate comes back ──► active
    rolling over    the same for the next generation; then both generations certify each other, and the old one is superseded

Who manages an authority is in its record, under a MAC. A role of the database opens the calls, and no authority.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final
from uuid import UUID

from kms.app.ports import Call, User
from kms.certificates.authority import (
    Authority,
    AuthorityRef,
    AuthorityStatus,
    IssuerGrant,
    authority_not_found,
    check_active,
    check_points,
)
from kms.certificates.certificate import Certificate
from kms.certificates.constraints import NameConstraints
from kms.certificates.issuer import Draft, Issuer
from kms.certificates.names import Subject, certificate_invalid, parse_subject_text
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.profiles import CLIENT, INTERMEDIATE, OF_THE_SERVICE, ROOT, KeyUsage, Profile
from kms.certificates.service_keys import AUTHORITY, ServiceKeys, authority_key_name
from kms.certificates.x509.certificates import build_request, certificates_in, parse_certificate
from kms.certificates.x509.chains import verify_chain
from kms.certificates.x509.signing import spki_of_pem
from kms.certificates.x509.stored import limits_in, named_in
from kms.domain.algorithms import KeySpec
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import UserId
from kms.domain.keys import Custody, KeyRecord
from kms.domain.permissions import Permission, permission_denied

ISSUERS_MAX: Final = 1000
# Of these a user may get one that names nobody but them.
SELF_SERVICE: Final = frozenset({CLIENT.name})
_HELD: Final = frozenset({AuthorityStatus.ACTIVE, AuthorityStatus.SUPERSEDED})


@dataclass(frozen=True, slots=True)
class AuthorityWish:
    """What a caller asks of a new authority. None: as the profile says, and no name constraints."""

    name: str
    subject: Subject
    spec: KeySpec
    custody_min: Custody | None = None
    parent: AuthorityRef | None = None
    is_external: bool = False
    validity: timedelta | None = None
    path_length: int | None = None
    name_constraints: NameConstraints | None = None
    base_url: str = ""
    crl_shards: int = 0


@dataclass(frozen=True, slots=True)
class AuthorityChange:
    """What changes of an authority. None and nothing: stays as it is."""

    allow: tuple[IssuerGrant, ...] = ()
    disallow: tuple[IssuerGrant, ...] = ()
    self_service: tuple[str, ...] | None = None
    manager_id: UserId | None = None
    base_url: str | None = None
    crl_shards: int | None = None
    disable: bool = False


@dataclass(frozen=True, slots=True)
class MadeAuthority:
    """An authority, and the request (DER) that another authority signs, if it waits for that."""

    authority: Authority
    csr: bytes = b""


@dataclass(frozen=True, slots=True)
class ManagingAuthorities:
    """CreateCertificateAuthority and the calls that change one. Every call takes the permission `certs:manage`."""

    authorities: Authorities
    certificates: Certificates
    keys: ServiceKeys
    issuer: Issuer
    profiles: Collection[str]

    async def create(self, call: Call, wish: AuthorityWish) -> MadeAuthority:
        """Make an authority. The caller becomes its manager.

        Raises NAME_TAKEN; for the parent AUTHORITY_NOT_FOUND, AUTHORITY_INACTIVE, and PERMISSION_DENIED unless the caller is one
        of its issuers; CERTIFICATE_INVALID, and what making a key raises.
        """
        check_points(None, wish.base_url, wish.crl_shards)
        generations = await self.authorities.generations(wish.name)
        # What was begun and never became active is left behind, for its manager to begin again.
        if any(each.status in _HELD or each.manager_id != call.user.user_id for each in generations):
            raise KmsError(Reason.NAME_TAKEN, "there is an authority of that name", field="name")
        parent = None if wish.parent is None else await self._parent(call.user, wish.parent)
        generation = max((each.generation for each in generations), default=0) + 1
        return await self._make(call, wish, generation, parent)

    async def roll_over(self, call: Call, ref: AuthorityRef, validity: timedelta | None) -> MadeAuthority:
        """Make the next generation of an active authority, with a key of the same type. Raises what `create` raises."""
        old = await self.managed(call.user, ref)
        check_active(old, await self.certificates.now())
        if old.certificate is None:
            raise authority_not_found()
        key, parsed = await self.keys.find(old.key_owner_id, old.key_id), parse_certificate(old.certificate)
        above = None if old.parent_id is None else await self.require(AuthorityRef(authority_id=old.parent_id))
        parent = None if above is None else await self._parent(call.user, AuthorityRef(name=above.name))
        generations = await self.authorities.generations(old.name)
        wish = AuthorityWish(
            name=old.name,
            subject=named_in(old.certificate)[0],
            spec=key.identity.spec,
            custody_min=key.custody,
            is_external=parent is None and bool(old.chain),
            validity=validity,
            path_length=parsed.path_length,
            name_constraints=limits_in(old.certificate),
            base_url=old.base_url,
            crl_shards=old.crl_shards,
        )
        generation = max(each.generation for each in generations) + 1
        return await self._make(call, wish, generation, parent, old)

    async def import_certificate(self, call: Call, ref: AuthorityRef, data: bytes) -> Authority:
        """Give a pending authority the certificate that another made of its request. *data* begins with it; its issuers follow.

        Raises CERTIFICATE_INVALID unless it is of the authority's key and subject, and the chain holds; AUTHORITY_INACTIVE.
        """
        authority = await self.managed(call.user, ref)
        if authority.status is not AuthorityStatus.PENDING:
            raise KmsError(Reason.AUTHORITY_INACTIVE, "the authority has its certificate", state=authority.status)
        chain = certificates_in(data)
        parsed = parse_certificate(chain[0])
        key = await self.keys.find(authority.key_owner_id, authority.key_id)
        if parsed.public_key != spki_of_pem(key.public_key):
            raise certificate_invalid("certificates", "expected first a certificate of the authority's key")
        if not parsed.is_ca or KeyUsage.KEY_CERT_SIGN not in parsed.key_usage or KeyUsage.CRL_SIGN not in parsed.key_usage:
            raise certificate_invalid("certificates", "expected first a certificate of an authority: CA, keyCertSign, cRLSign")
        if str(named_in(chain[0])[0]) != authority.subject:
            raise certificate_invalid("certificates", "expected first a certificate with the subject of the authority")
        verify_chain(chain, at=await self.certificates.now())
        return await self._activate(call, authority, chain[0], chain[1:])

    async def update(self, call: Call, ref: AuthorityRef, change: AuthorityChange, version: int | None) -> Authority:
        """Change an authority. Raises MALFORMED for a change that must not be, STALE for another version than *version*."""
        before = await self.managed(call.user, ref)
        if version is not None and before.version != version:
            raise KmsError(Reason.STALE, "the authority is not at that version any more: read it again")
        after = await self._changed(before, change)
        if replace(after, version=before.version) == before:
            return before
        event = "authority.disabled" if change.disable else "authority.changed"
        await self.authorities.change(call, after, event, _details(change))
        return after

    async def request(self, call: Call, ref: AuthorityRef) -> bytes:
        """Return a request (DER) of a pending authority once more. Raises AUTHORITY_INACTIVE for one that has its certificate."""
        authority = await self.managed(call.user, ref)
        if authority.status is not AuthorityStatus.PENDING:
            raise KmsError(Reason.AUTHORITY_INACTIVE, "the authority has its certificate", state=authority.status)
        return await self._request(call, authority, await self.keys.find(authority.key_owner_id, authority.key_id))

    async def require(self, ref: AuthorityRef) -> Authority:
        """Return an authority, or raise AUTHORITY_NOT_FOUND."""
        authority = await self.authorities.find(ref)
        if authority is None:
            raise authority_not_found()
        return authority

    async def managed(self, caller: User, ref: AuthorityRef) -> Authority:
        """Return an authority that *caller* manages. Raises AUTHORITY_NOT_FOUND, PERMISSION_DENIED."""
        if Permission.CERTS_MANAGE not in caller.permissions:
            raise permission_denied(Permission.CERTS_MANAGE)
        authority = await self.require(ref)
        if authority.manager_id != caller.user_id:
            message = f"another user manages the authority {authority.name}"
            raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_MANAGE)
        return authority

    async def cross_certificates(self, authority: Authority) -> Sequence[bytes]:
        """Return the certificates (DER) of an authority's key that other generations of it made."""
        return [
            each.der
            for each in await self.certificates.of_key(authority.key_owner_id, authority.key_id)
            if each.der and each.der != authority.certificate and each.revocation is None
        ]

    async def _parent(self, caller: User, ref: AuthorityRef) -> Authority:
        parent = await self.require(ref)
        check_active(parent, await self.certificates.now())
        if not parent.issues(caller.user_id, INTERMEDIATE.name):
            message = f"the manager of the authority {parent.name} has not let you issue certificates of profile intermediate"
            raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_MANAGE)
        return parent

    async def _make(
        self, call: Call, wish: AuthorityWish, generation: int, parent: Authority | None, old: Authority | None = None
    ) -> MadeAuthority:
        is_root = parent is None and not wish.is_external
        profile = ROOT if is_root else INTERMEDIATE
        profile.check_subject(wish.subject, ())
        authority_id = UUID(bytes=await self.issuer.random(16), version=4)
        key_name = authority_key_name(wish.name, generation, authority_id)
        custody = wish.custody_min or (Custody.RESIDENT if is_root else None)
        key = await self.keys.make(call, key_name, wish.spec, custody, AUTHORITY)
        authority = Authority(
            authority_id=authority_id,
            name=wish.name,
            generation=generation,
            manager_id=call.user.user_id,
            key_id=key.identity.key_id,
            key_owner_id=key.identity.owner_id,
            subject=str(wish.subject),
            created_at=await self.certificates.now(),
            parent_id=None if parent is None else parent.authority_id,
            path_length=wish.path_length,
            issuers=() if old is None else old.issuers,
            self_service=() if old is None else old.self_service,
            base_url=wish.base_url,
            crl_shards=wish.crl_shards,
        )
        await self.authorities.add(call, authority)
        if wish.is_external:
            return MadeAuthority(authority, await self._request(call, authority, key))
        draft = _draft(authority, profile, wish, key)
        if parent is None:
            certificate = await self.issuer.issue_to_itself(call, authority, draft)
            return MadeAuthority(await self._activate(call, authority, certificate.der, ()))
        certificate = await self.issuer.issue(call, parent, draft)
        assert parent.certificate is not None  # noqa: S101  # an active authority has one
        return MadeAuthority(await self._activate(call, authority, certificate.der, (parent.certificate, *parent.chain)))

    async def _activate(self, call: Call, authority: Authority, certificate: bytes, chain: Sequence[bytes]) -> Authority:
        """Make a pending authority active. The generation that is active until then certifies it, and is superseded."""
        certified = authority.changed(
            certificate=certificate, chain=tuple(chain), not_after=parse_certificate(certificate).validity.not_after
        )
        old = next((each for each in await self.authorities.generations(authority.name) if _is_active(each)), None)
        if old is None:
            active = replace(certified, status=AuthorityStatus.ACTIVE)
            await self.authorities.change(call, active, "authority.activated", {"name": active.name})
            return active
        if not old.chain and not certified.chain:
            # Of roots. Whoever trusts what is above an intermediate trusts both of its generations.
            await self.authorities.change(call, certified, "authority.certified", {"name": certified.name})
            await self._cross_certify(call, old, certified)
            await self._cross_certify(call, certified, old)
            active = certified.changed(status=AuthorityStatus.ACTIVE)
        else:
            active = replace(certified, status=AuthorityStatus.ACTIVE)
        superseded = old.changed(status=AuthorityStatus.SUPERSEDED, superseded_at=await self.certificates.now())
        await self.authorities.roll_over(call, active, superseded)
        return active

    async def _cross_certify(self, call: Call, issuer: Authority, subject: Authority) -> Certificate:
        """Have one generation certify the key of another, for as long as both certificates last."""
        assert subject.certificate is not None  # noqa: S101  # both generations have one
        parsed, now = parse_certificate(subject.certificate), await self.certificates.now()
        profile = replace(INTERMEDIATE, validity_max=ROOT.validity_max, path_length=None)
        draft = Draft(
            owner_id=subject.key_owner_id,
            key_id=subject.key_id,
            profile=profile,
            subject=named_in(subject.certificate)[0],
            names=(),
            public_key=parsed.public_key,
            validity=parsed.validity.not_after - now.replace(microsecond=0) + timedelta(seconds=1),
            path_length=parsed.path_length,
            name_constraints=limits_in(subject.certificate),
        )
        return await self.issuer.cross_certify(call, issuer, draft)

    async def _request(self, call: Call, authority: Authority, key: KeyRecord) -> bytes:
        unsigned = build_request(parse_subject_text(authority.subject), (), spki_of_pem(key.public_key))
        return await self.keys.sign_for(call, authority, unsigned, {"request": "csr"})

    async def _changed(self, before: Authority, change: AuthorityChange) -> Authority:
        manager_id = change.manager_id or before.manager_id
        issuers = (set(before.issuers) | set(change.allow)) - set(change.disallow)
        known = frozenset(self.profiles) - OF_THE_SERVICE
        if any(grant.profile not in known for grant in change.allow):
            raise malformed("allow", f"expected profiles among {', '.join(sorted(known))}")
        if any(grant.user_id == manager_id for grant in issuers):
            raise malformed("allow", "expected issuers other than the manager: who manages an authority does not issue from it")
        if len(issuers) > ISSUERS_MAX:
            raise malformed("allow", f"expected at most {ISSUERS_MAX} issuers")
        for user_id in {grant.user_id for grant in change.allow} | ({manager_id} - {before.manager_id}):
            if await self.keys.users.find(user_id) is None:
                raise malformed("allow" if user_id != manager_id else "manager_id", "expected a user in good standing")
        if change.self_service is not None and not SELF_SERVICE.issuperset(change.self_service):
            raise malformed("self_service", "expected client, or none")
        base_url = before.base_url if change.base_url is None else change.base_url
        crl_shards = before.crl_shards if change.crl_shards is None else change.crl_shards
        check_points(before, base_url, crl_shards)
        return before.changed(
            issuers=tuple(sorted(issuers)),
            self_service=before.self_service if change.self_service is None else change.self_service,
            manager_id=manager_id,
            base_url=base_url,
            crl_shards=crl_shards,
            status=AuthorityStatus.DISABLED if change.disable else before.status,
        )


def _is_active(authority: Authority) -> bool:
    return authority.status is AuthorityStatus.ACTIVE


def _details(change: AuthorityChange) -> Mapping[str, object]:
    """Return a change as the trail has it."""
    told = {
        "allow": list(map(str, change.allow)),
        "disallow": list(map(str, change.disallow)),
        "self_service": None if change.self_service is None else list(change.self_service),
        "manager": None if change.manager_id is None else str(change.manager_id),
        "base_url": change.base_url,
        "crl_shards": change.crl_shards,
    }
    return {name: value for name, value in told.items() if value not in (None, [])}


def _draft(authority: Authority, profile: Profile, wish: AuthorityWish, key: KeyRecord) -> Draft:
    return Draft(
        owner_id=authority.key_owner_id,
        key_id=authority.key_id,
        profile=profile,
        subject=wish.subject,
        names=(),
        public_key=spki_of_pem(key.public_key),
        validity=wish.validity,
        path_length=wish.path_length,
        name_constraints=wish.name_constraints,
    )
