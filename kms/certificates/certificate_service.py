"""The servicer of CertificateService."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from kms.app.ports import Call
from kms.certificates.authorities import AuthorityChange, AuthorityWish, MadeAuthority, ManagingAuthorities
from kms.certificates.authority import (
    Authority,
    AuthorityStatus,
    IssuerGrant,
    parse_authority_name,
    parse_authority_ref,
    parse_base_url,
)
from kms.certificates.certificate import Certificate, CertificatePlace, Issuance, serial_text
from kms.certificates.constraints import parse_constraints
from kms.certificates.crl import parse_reason
from kms.certificates.crls import SignedCrl
from kms.certificates.issuing import CertificateWish, Issuing
from kms.certificates.names import EMPTY, Subject, parse_names, parse_subject_text
from kms.certificates.own_keys import OwnKeys
from kms.certificates.revoking import Revoking
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, malformed
from kms.domain.fields import open_token, parse_number, parse_optional_number, token_of
from kms.domain.ids import UserId, parse_key_ref, parse_uuid
from kms.rpc import convert, enums
from kms.v1 import certificates_pb2 as pb

PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 200
CRL_SHARDS_MAX: Final = 65_536
PATH_LENGTH_MAX: Final = 16
GRANTS_MAX: Final = 100
_PROFILE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
AUTHORITY_STATUSES: Final[Mapping["pb.AuthorityStatus.ValueType", AuthorityStatus]] = {
    pb.AUTHORITY_STATUS_PENDING: AuthorityStatus.PENDING,
    pb.AUTHORITY_STATUS_ACTIVE: AuthorityStatus.ACTIVE,
    pb.AUTHORITY_STATUS_SUPERSEDED: AuthorityStatus.SUPERSEDED,
    pb.AUTHORITY_STATUS_DISABLED: AuthorityStatus.DISABLED,
}


@dataclass(frozen=True, slots=True)
class CertificateServicer:
    """Decodes, calls the use cases of certificates, encodes."""

    managing: ManagingAuthorities
    issuing: Issuing
    own_keys: OwnKeys
    revoking: Revoking

    async def CreateCertificateAuthority(
        self, request: pb.CreateCertificateAuthorityRequest, call: Call
    ) -> pb.CreateCertificateAuthorityResponse:
        """Make an authority."""
        made = await self.managing.create(call, _authority_wish(request))
        return pb.CreateCertificateAuthorityResponse(authority=await self._wire(made.authority, call), csr=made.csr)

    async def ImportAuthorityCertificate(
        self, request: pb.ImportAuthorityCertificateRequest, call: Call
    ) -> pb.ImportAuthorityCertificateResponse:
        """Give a pending authority its certificate."""
        authority = await self.managing.import_certificate(call, parse_authority_ref(request.authority), request.certificates)
        return pb.ImportAuthorityCertificateResponse(authority=await self._wire(authority, call))

    async def UpdateCertificateAuthority(
        self, request: pb.UpdateCertificateAuthorityRequest, call: Call
    ) -> pb.UpdateCertificateAuthorityResponse:
        """Change an authority."""
        version = parse_optional_number(request.version, field="version")
        authority = await self.managing.update(call, parse_authority_ref(request.authority), _change(request), version)
        return pb.UpdateCertificateAuthorityResponse(authority=await self._wire(authority, call))

    async def RotateCertificateAuthority(
        self, request: pb.RotateCertificateAuthorityRequest, call: Call
    ) -> pb.RotateCertificateAuthorityResponse:
        """Make the next generation of an authority."""
        made: MadeAuthority = await self.managing.roll_over(
            call, parse_authority_ref(request.authority), convert.span(request, "validity")
        )
        return pb.RotateCertificateAuthorityResponse(authority=await self._wire(made.authority, call), csr=made.csr)

    async def GetCertificateAuthority(
        self, request: pb.GetCertificateAuthorityRequest, call: Call
    ) -> pb.GetCertificateAuthorityResponse:
        """Return an authority."""
        authority = await self.managing.require(parse_authority_ref(request.authority))
        return pb.GetCertificateAuthorityResponse(authority=await self._wire(authority, call))

    async def ListCertificateAuthorities(
        self, request: pb.ListCertificateAuthoritiesRequest, call: Call
    ) -> pb.ListCertificateAuthoritiesResponse:
        """List authorities."""
        limit = parse_optional_number(request.page_size, field="page_size", most=PAGE_MAX) or PAGE_DEFAULT
        found = await self.managing.authorities.page(after=_parse_name_token(request.page_token), limit=limit + 1)
        names = list(dict.fromkeys(authority.name for authority in found))[:limit]
        token = token_of(names[-1]) if len({authority.name for authority in found}) > limit else ""
        listed = [wire_authority(each, call.user.user_id) for each in found if each.name in names]
        return pb.ListCertificateAuthoritiesResponse(authorities=listed, next_page_token=token)

    async def IssueCertificate(self, request: pb.IssueCertificateRequest, call: Call) -> pb.IssueCertificateResponse:
        """Issue a certificate."""
        issued = await self.issuing.issue(call, _certificate_wish(request), convert.repeatable(request))
        return pb.IssueCertificateResponse(certificate=wire_certificate(issued.certificate, issued.at), chain=issued.chain)

    async def RenewCertificate(self, request: pb.RenewCertificateRequest, call: Call) -> pb.RenewCertificateResponse:
        """Issue a certificate that says what another says."""
        issued = await self.issuing.renew(
            call,
            parse_uuid(request.certificate_id, field="certificate_id"),
            request.csr or None,
            convert.span(request, "validity"),
            convert.repeatable(request),
        )
        return pb.RenewCertificateResponse(certificate=wire_certificate(issued.certificate, issued.at), chain=issued.chain)

    async def CreateCertificateRequest(
        self, request: pb.CreateCertificateRequestRequest, call: Call
    ) -> pb.CreateCertificateRequestResponse:
        """Make a request for an authority elsewhere."""
        match request.WhichOneof("of"):
            case "authority":
                if request.subject or request.names:
                    raise malformed("subject", "expected neither a subject nor names with an authority, which has its own")
                csr = await self.managing.request(call, parse_authority_ref(request.authority))
            case "key":
                subject, names = _subject(request.subject), parse_names(request.names)
                csr = await self.own_keys.request(call, parse_key_ref(request.key), subject, names)
            case _:
                raise malformed("key", "expected a key or an authority")
        return pb.CreateCertificateRequestResponse(csr=csr)

    async def ImportCertificate(self, request: pb.ImportCertificateRequest, call: Call) -> pb.ImportCertificateResponse:
        """Store a certificate that an authority elsewhere issued."""
        certificate = await self.own_keys.keep(call, parse_key_ref(request.key), request.certificate)
        return pb.ImportCertificateResponse(certificate=wire_certificate(certificate, await self.issuing.now()))

    async def GetCertificate(self, request: pb.GetCertificateRequest, call: Call) -> pb.GetCertificateResponse:
        """Return a certificate."""
        issued = await self.issuing.find(call.user, parse_uuid(request.certificate_id, field="certificate_id"))
        return pb.GetCertificateResponse(certificate=wire_certificate(issued.certificate, issued.at), chain=issued.chain)

    async def ListCertificates(self, request: pb.ListCertificatesRequest, call: Call) -> pb.ListCertificatesResponse:
        """List certificates, the newest first."""
        limit = parse_optional_number(request.page_size, field="page_size", most=PAGE_MAX) or PAGE_DEFAULT
        which = (request.authority, request.key)
        found = await self.issuing.page(
            call.user,
            parse_authority_ref(request.authority) if request.authority else None,
            parse_key_ref(request.key) if request.key else None,
            after=_parse_place(request.page_token, which),
            limit=limit + 1,
        )
        now, last = await self.issuing.now(), found[limit - 1] if len(found) > limit else None
        token = "" if last is None else token_of(*which, last.created_at.isoformat(), str(last.certificate_id))
        listed = [wire_certificate(each, now) for each in found[:limit]]
        return pb.ListCertificatesResponse(certificates=listed, next_page_token=token)

    async def RevokeCertificate(self, request: pb.RevokeCertificateRequest, call: Call) -> pb.RevokeCertificateResponse:
        """Revoke a certificate."""
        certificate_id = parse_uuid(request.certificate_id, field="certificate_id")
        revoked = await self.revoking.revoke(call, certificate_id, parse_reason(request.reason))
        return pb.RevokeCertificateResponse(certificate=wire_certificate(revoked, await self.issuing.now()))

    async def GetCrl(self, request: pb.GetCrlRequest, call: Call) -> pb.GetCrlResponse:
        """Return the newest CRL."""
        authority = await self.managing.require(parse_authority_ref(request.authority))
        shard = parse_number(request.shard, field="shard", most=authority.crl_shards)
        return pb.GetCrlResponse(crl=_wire_crl(authority, shard, await self.revoking.newest_crl(authority, shard)))

    async def PublishCrl(self, request: pb.PublishCrlRequest, call: Call) -> pb.PublishCrlResponse:
        """Sign new CRLs."""
        authority = await self.managing.managed(call.user, parse_authority_ref(request.authority))
        made = await self.revoking.publish(authority)
        return pb.PublishCrlResponse(crls=[_wire_crl(authority, shard, crl) for shard, crl in enumerate(made)])

    async def _wire(self, authority: Authority, call: Call) -> pb.CertificateAuthority:
        wire = wire_authority(authority, call.user.user_id)
        wire.cross_certificates.extend(await self.managing.cross_certificates(authority))
        return wire


def wire_authority(authority: Authority, caller: UserId) -> pb.CertificateAuthority:
    """Return an authority as *caller* sees it: only its manager sees who issues."""
    issuers = authority.issuers if caller == authority.manager_id else ()
    return pb.CertificateAuthority(
        id=str(authority.authority_id),
        name=authority.name,
        generation=authority.generation,
        status=enums.number_of(AUTHORITY_STATUSES, authority.status),
        subject=authority.subject,
        manager_id=str(authority.manager_id),
        parent_id="" if authority.parent_id is None else str(authority.parent_id),
        certificate=authority.certificate or b"",
        chain=authority.chain,
        issuers=[pb.IssuerGrant(user_id=str(grant.user_id), profile=grant.profile) for grant in issuers],
        self_service=authority.self_service,
        base_url=authority.base_url,
        crl_shards=authority.crl_shards,
        created_at=convert.stamp(authority.created_at),
        not_after=convert.stamp(authority.not_after),
        superseded_at=convert.stamp(authority.superseded_at),
        version=authority.version,
    )


def wire_certificate(certificate: Certificate, now: datetime) -> pb.Certificate:
    """Return a certificate as a client sees it at *now*."""
    revocation = certificate.revocation
    return pb.Certificate(
        id=str(certificate.certificate_id),
        authority_id="" if certificate.issuer_id is None else str(certificate.issuer_id),
        profile=certificate.profile,
        status=_status(certificate, now),
        serial_number=serial_text(certificate.serial_number),
        subject=certificate.subject,
        issuer=certificate.issuer,
        names=certificate.names,
        not_before=convert.stamp(certificate.not_before),
        not_after=convert.stamp(certificate.not_after),
        owner_id=str(certificate.owner_id),
        key_id="" if certificate.key_id is None else str(certificate.key_id),
        requested_by="" if certificate.requested_by is None else str(certificate.requested_by),
        fingerprint=certificate.fingerprint,
        certificate=certificate.der,
        created_at=convert.stamp(certificate.created_at),
        revoked_at=None if revocation is None else convert.stamp(revocation.at),
        revocation_reason=0 if revocation is None else revocation.reason.value,  # type: ignore[arg-type]  # the same numbers
        superseded_at=convert.stamp(certificate.superseded_at),
        replaces="" if certificate.replaces is None else str(certificate.replaces),
    )


def _wire_crl(authority: Authority, shard: int, signed: SignedCrl) -> pb.Crl:
    return pb.Crl(
        authority_id=str(authority.authority_id),
        shard=shard,
        number=signed.crl.number,
        crl=signed.der,
        this_update=convert.stamp(signed.crl.this_update),
        next_update=convert.stamp(signed.crl.next_update),
    )


def _status(certificate: Certificate, now: datetime) -> "pb.CertificateStatus.ValueType":
    match certificate.issuance:
        case Issuance.INTENDED:
            return pb.CERTIFICATE_STATUS_INTENDED
        case Issuance.ABANDONED:
            return pb.CERTIFICATE_STATUS_ABANDONED
        case _ if certificate.revocation is not None:
            return pb.CERTIFICATE_STATUS_REVOKED
        case _:
            is_over = certificate.not_after < now
            return pb.CERTIFICATE_STATUS_EXPIRED if is_over else pb.CERTIFICATE_STATUS_VALID


def _authority_wish(request: pb.CreateCertificateAuthorityRequest) -> AuthorityWish:
    if request.parent and request.external:
        raise malformed("external", "expected a parent, or external, not both")
    constraints = parse_constraints(request.permitted, request.excluded)
    if request.external and constraints is not None:
        raise malformed("permitted", "expected none with external: the other authority limits the names")
    size_bits = parse_optional_number(request.size_bits, field="size_bits")
    key_type = enums.optional(enums.KEY_TYPES, request.key_type, "key_type") or KeyType.SECP256R1
    return AuthorityWish(
        name=parse_authority_name(request.name),
        subject=_subject(request.subject),
        spec=key_spec(key_type, Purpose.SIGNING, size_bits),
        custody_min=enums.optional(enums.CUSTODIES, request.custody_min, "custody_min"),
        parent=parse_authority_ref(request.parent, field="parent") if request.parent else None,
        is_external=request.external,
        validity=convert.span(request, "validity"),
        path_length=parse_number(request.path_length, field="path_length", most=PATH_LENGTH_MAX)
        if request.HasField("path_length")
        else None,
        name_constraints=constraints,
        base_url=parse_base_url(request.base_url),
        crl_shards=parse_number(request.crl_shards, field="crl_shards", most=CRL_SHARDS_MAX),
    )


def _change(request: pb.UpdateCertificateAuthorityRequest) -> AuthorityChange:
    if request.self_service and not request.set_self_service:
        raise malformed("self_service", "expected none without set_self_service")
    change = AuthorityChange(
        allow=_grants(request.allow, "allow"),
        disallow=_grants(request.disallow, "disallow"),
        self_service=tuple(dict.fromkeys(request.self_service)) if request.set_self_service else None,
        manager_id=UserId(parse_uuid(request.manager_id, field="manager_id")) if request.manager_id else None,
        base_url=parse_base_url(request.base_url) if request.HasField("base_url") else None,
        crl_shards=parse_number(request.crl_shards, field="crl_shards", most=CRL_SHARDS_MAX)
        if request.HasField("crl_shards")
        else None,
        disable=request.disable,
    )
    if change == AuthorityChange():
        raise malformed("request", "expected something that changes")
    return change


def _grants(grants: Sequence[pb.IssuerGrant], field: str) -> tuple[IssuerGrant, ...]:
    if len(grants) > GRANTS_MAX:
        raise malformed(field, f"expected at most {GRANTS_MAX}")
    return tuple(
        IssuerGrant(UserId(parse_uuid(grant.user_id, field=f"{field}.user_id")), _profile_name(grant.profile, f"{field}.profile"))
        for grant in grants
    )


def _profile_name(text: str, field: str) -> str:
    if not _PROFILE_NAME.fullmatch(text):
        raise malformed(field, "expected the name of a profile")
    return text


def _certificate_wish(request: pb.IssueCertificateRequest) -> CertificateWish:
    source = request.WhichOneof("public_key")
    return CertificateWish(
        authority=parse_authority_ref(request.authority),
        profile=request.profile,
        csr=request.csr if source == "csr" else None,
        key=parse_key_ref(request.key) if source == "key" else None,
        subject=_subject(request.subject),
        names=parse_names(request.names),
        user_id=UserId(parse_uuid(request.user_id, field="user_id")) if request.user_id else None,
        validity=convert.span(request, "validity"),
    )


def _subject(text: str) -> Subject:
    return parse_subject_text(text) if text else EMPTY


def _parse_name_token(token: str) -> str:
    if not token:
        return ""
    expected = malformed("page_token", "expected next_page_token of the page before")
    match open_token(token, expected=expected):
        case [str(name)]:
            try:
                return parse_authority_name(name)
            except KmsError:
                raise expected from None
        case _:
            raise expected


def _parse_place(token: str, which: tuple[str, str]) -> CertificatePlace | None:
    if not token:
        return None
    expected = malformed("page_token", "expected next_page_token of the page before, with the same filter")
    match open_token(token, expected=expected):
        case [authority, key, str(moment), str(certificate_id)] if (authority, key) == which:
            pass
        case _:
            raise expected
    try:
        place = CertificatePlace(datetime.fromisoformat(moment), UUID(certificate_id))
    except ValueError:
        raise expected from None
    if place.created_at.tzinfo is None:
        raise expected
    return place
