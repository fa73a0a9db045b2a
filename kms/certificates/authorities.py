"""Making and changing authorities.

    root            key ──► pending ──► its key signs its own certificate ──► active
    intermediate    key ──► pending ──► its parent issues its certificate ──► active
    external        key ──► pending ──► a request goes out, a certificate comes back ──► active
    rolling over    the same for the next generation; then both generations certify each other, and the old one is superseded

Rolling over again goes on where a process was killed before. Generations that were begun before the one that becomes active are
given up: they are disabled, and what was issued to and by them is revoked.

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
    check_lets_issue,
    check_points,
)
from kms.certificates.certificate import CertificateFilter, Issuance, Revocation, RevocationReason
from kms.certificates.constraints import NameConstraints
from kms.certificates.issuer import Draft, Issuer
from kms.certificates.names import Subject, certificate_invalid, parse_subject_text
from kms.certificates.ports import Authorities, Certificates
from kms.certificates.profiles import CLIENT, INTERMEDIATE, OF_THE_SERVICE, ROOT, KeyUsage, Profile
from kms.certificates.service_keys import AUTHORITY, ServiceKeys, authority_key_name
from kms.certificates.standing import check_may_issue, is_revoked
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
# Generations of a name that never became active: whoever makes authorities fills no list with them.
BEGUN_MAX: Final = 16
# Of these a user may get one that names nobody but them.
SELF_SERVICE: Final = frozenset({CLIENT.name})
# More than an authority that is pending issues: its own certificate, and that of the generation before.
_ISSUED_MAX: Final = 100
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
        return await self._make(call, wish, generations, parent)

    async def roll_over(self, call: Call, ref: AuthorityRef, validity: timedelta | None) -> MadeAuthority:
        """Make the next generation of an active authority, with a key of the same type, or go on with one that was begun.

        One that waits for a certificate from elsewhere is returned as it is. Raises what `create` raises.
        """
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
        for begun in generations:
            if await self._is_begun(call.user, begun, old, key, parent):
                return await self._go_on(call, begun, wish, parent)
        return await self._make(call, wish, generations, parent)

    async def import_certificate(self, call: Call, ref: AuthorityRef, data: bytes) -> Authority:
        """Give a pending authority the certificate that another made of its request. *data* begins with it; its issuers follow.

        Raises CERTIFICATE_INVALID unless it is of the authority's key and subject, and the chain holds; AUTHORITY_INACTIVE.
        """
        authority = await self.managed(call.user, ref)
        if authority.status is not AuthorityStatus.PENDING or authority.certificate is not None:
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
        """Change an authority. Raises MALFORMED for a change that must not be, STALE for another version than *version*.

        What its former manager began under the name, and what is disabled before it was active, is given up.
        """
        before = await self.managed(call.user, ref)
        if version is not None and before.version != version:
            raise KmsError(Reason.STALE, "the authority is not at that version any more: read it again")
        after = await self._changed(before, change)
        if replace(after, version=before.version) == before:
            return before
        if change.disable and before.status is AuthorityStatus.PENDING:
            await self._revoke_all(call, before)
        if after.manager_id != before.manager_id:
            others = [each for each in await self.authorities.generations(before.name) if each != before]
            await self._give_up(call, others)
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
        # The journal has what was read, see `Authorities`: of a roll-over both generations.
        await self.authorities.generations(authority.name)
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
        await check_may_issue(self.authorities, self.certificates, parent)
        check_lets_issue(parent, caller, INTERMEDIATE.name)
        return parent

    async def _make(
        self, call: Call, wish: AuthorityWish, generations: Sequence[Authority], parent: Authority | None
    ) -> MadeAuthority:
        if sum(each.status is not AuthorityStatus.ACTIVE and each.superseded_at is None for each in generations) >= BEGUN_MAX:
            message = f"{BEGUN_MAX} generations of the name never became active: take another name"
            raise KmsError(Reason.NAME_TAKEN, message, field="name")
        generation = max((each.generation for each in generations), default=0) + 1
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
            base_url=wish.base_url,
            crl_shards=wish.crl_shards,
        )
        await self.authorities.add(call, authority)
        return await self._go_on(call, authority, wish, parent)

    async def _is_begun(self, caller: User, begun: Authority, old: Authority, key: KeyRecord, parent: Authority | None) -> bool:
        """Whether *begun* is a successor of *old* that a call of *caller* has begun, of the same kind, and not finished."""
        is_next = begun.status is AuthorityStatus.PENDING and begun.generation > old.generation
        if not is_next or begun.manager_id != caller.user_id:
            return False
        parent_id = None if parent is None else parent.authority_id
        wished = (begun.parent_id, begun.subject, begun.path_length)
        if wished != (parent_id, str(named_in(_certificate(old))[0]), parse_certificate(_certificate(old)).path_length):
            return False
        its_key = await self.keys.find(begun.key_owner_id, begun.key_id)
        return its_key.identity.spec == key.identity.spec and not await is_revoked(self.certificates, begun)

    async def _go_on(self, call: Call, authority: Authority, wish: AuthorityWish, parent: Authority | None) -> MadeAuthority:
        """Give a pending authority the certificate that it lacks, and make it active; of one elsewhere return the request."""
        key = await self.keys.find(authority.key_owner_id, authority.key_id)
        if wish.is_external:
            return MadeAuthority(authority, await self._request(call, authority, key))
        certificate = authority.certificate or await self._issued_to(authority, parent or authority)
        if certificate is None:
            draft = _draft(authority, ROOT if parent is None else INTERMEDIATE, wish, key)
            made = (
                self.issuer.issue_to_itself(call, authority, draft) if parent is None else self.issuer.issue(call, parent, draft)
            )
            certificate = (await made).der
        chain = () if parent is None else (_certificate(parent), *parent.chain)
        return MadeAuthority(await self._activate(call, authority, certificate, chain))

    async def _issued_to(self, subject: Authority, issuer: Authority) -> bytes | None:
        """Return the certificate (DER) of the key of *subject* that *issuer* has issued and that is valid, or None."""
        now = await self.certificates.now()
        for each in await self.certificates.of_key(subject.key_owner_id, subject.key_id):
            if each.der and each.issuer_id == issuer.authority_id and each.revocation is None and each.not_after > now:
                return each.der
        return None

    async def _activate(self, call: Call, authority: Authority, certificate: bytes, chain: Sequence[bytes]) -> Authority:
        """Make a pending authority active. The generation that is active until then certifies it, and is superseded.

        Who issues is what the record of that generation says now, and so are the addresses. Raises PERMISSION_DENIED if another
        manages it, AUTHORITY_INACTIVE if it is a later one; STALE if it changed meanwhile.
        """
        generations = await self.authorities.generations(authority.name)
        old = next((each for each in generations if each.status is AuthorityStatus.ACTIVE), None)
        not_after = parse_certificate(certificate).validity.not_after
        certified = replace(authority, certificate=certificate, chain=tuple(chain), not_after=not_after)
        if old is None:
            active = certified.changed(status=AuthorityStatus.ACTIVE)
            await self.authorities.change(call, active, "authority.activated", {"name": active.name})
        else:
            active = await self._supersede(call, old, authority, certified)
        await self._give_up(call, [each for each in generations if each.generation < active.generation])
        return active

    async def _supersede(self, call: Call, old: Authority, authority: Authority, certified: Authority) -> Authority:
        """Put *certified*, which is *authority* with its certificate, in the place of *old*."""
        _check_succeeds(authority, old)
        certified = replace(
            certified, issuers=old.issuers, self_service=old.self_service, base_url=old.base_url, crl_shards=old.crl_shards
        )
        # Whoever trusts what is above an intermediate trusts both of its generations. A key that is given up certifies nothing.
        if not old.chain and not certified.chain and not await is_revoked(self.certificates, old):
            if certified != authority:
                certified = certified.changed()
                await self.authorities.change(call, certified, "authority.certified", {"name": certified.name})
            await self._cross_certify(call, old, certified)
            await self._cross_certify(call, certified, old)
        active = certified.changed(status=AuthorityStatus.ACTIVE)
        superseded = old.changed(status=AuthorityStatus.SUPERSEDED, superseded_at=await self.certificates.now())
        await self.authorities.roll_over(call, active, superseded)
        return active

    async def _give_up(self, call: Call, generations: Sequence[Authority]) -> None:
        """Disable those of *generations* that the caller has begun and that never became active."""
        for each in generations:
            if each.status is AuthorityStatus.PENDING and each.manager_id == call.user.user_id:
                await self._revoke_all(call, each)
                disabled = each.changed(status=AuthorityStatus.DISABLED)
                await self.authorities.change(call, disabled, "authority.disabled", {"name": each.name})

    async def _revoke_all(self, call: Call, authority: Authority) -> None:
        """Revoke what was issued to and by an authority that never became active. The job of CRLs lists it."""
        issued = await self.certificates.page(call.user, CertificateFilter(authority.authority_id), after=None, limit=_ISSUED_MAX)
        of_key = await self.certificates.of_key(authority.key_owner_id, authority.key_id)
        revocation = Revocation(await self.certificates.now(), RevocationReason.CESSATION_OF_OPERATION)
        for each in {each.certificate_id: each for each in (*issued, *of_key)}.values():
            if each.issuance is Issuance.ISSUED and each.revocation is None:
                await self.certificates.revoke(call, each.revoked(revocation))

    async def _cross_certify(self, call: Call, issuer: Authority, subject: Authority) -> None:
        """Have one generation certify the key of another, for as long as both certificates last, unless it has."""
        if await self._issued_to(subject, issuer) is not None:
            return
        parsed, now = parse_certificate(_certificate(subject)), await self.certificates.now()
        profile = replace(INTERMEDIATE, validity_max=ROOT.validity_max, path_length=None)
        draft = Draft(
            owner_id=subject.key_owner_id,
            key_id=subject.key_id,
            profile=profile,
            subject=named_in(_certificate(subject))[0],
            names=(),
            public_key=parsed.public_key,
            validity=parsed.validity.not_after - now.replace(microsecond=0) + timedelta(seconds=1),
            path_length=parsed.path_length,
            name_constraints=limits_in(_certificate(subject)),
        )
        await self.issuer.cross_certify(call, issuer, draft)

    async def _request(self, call: Call, authority: Authority, key: KeyRecord) -> bytes:
        unsigned = build_request(parse_subject_text(authority.subject), (), spki_of_pem(key.public_key))
        return await self.keys.sign_for(call, authority, unsigned, {"request": "csr"})

    async def _changed(self, before: Authority, change: AuthorityChange) -> Authority:
        manager_id = change.manager_id or before.manager_id
        issuers = (set(before.issuers) | set(change.allow)) - set(change.disallow)
        known = frozenset(self.profiles) - OF_THE_SERVICE
        if any(grant.profile not in known for grant in change.allow):
            raise malformed("allow", f"expected profiles among {', '.join(sorted(known))}")
        # Whoever hands an authority over lets himself issue from it no more than any other manager.
        if any(grant.user_id == before.manager_id for grant in change.allow) or any(
            grant.user_id == manager_id for grant in issuers
        ):
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


def _check_succeeds(authority: Authority, old: Authority) -> None:
    """Raise PERMISSION_DENIED or AUTHORITY_INACTIVE unless *authority* may take the place of *old*, which is active."""
    if old.manager_id != authority.manager_id:
        message = f"another user manages the authority {old.name}"
        raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_MANAGE)
    if old.generation > authority.generation:
        message = "a later generation of the authority is active"
        raise KmsError(Reason.AUTHORITY_INACTIVE, message, state=authority.status)


def _certificate(authority: Authority) -> bytes:
    assert authority.certificate is not None  # noqa: S101  # one that is active, or certified, has its certificate
    return authority.certificate


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
