"""A certificate authority: one key in the token, one certificate of it, and who manages and who issues.

    pending ──► active ──► superseded         each ──► disabled
       │                      │                            │
       waits for its          issue no more; sign CRLs and OCSP answers until their certificate ends
       certificate

An authority is a name and a generation: rolling it over makes the next generation under its name. Of roots the next one has its
certificate while it is pending, until each of the two has certified the other.
"""

import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from kms.app.ports import User
from kms.certificates.record import record_bytes
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId, UserId, parse_uuid
from kms.domain.permissions import Permission, permission_denied

NAME_CHARACTERS_MAX: Final = 63
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_GENERATION: Final = re.compile(r"[1-9][0-9]{0,8}")
_BASE_URL: Final = re.compile(r"http://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*")
_BASE_URL_CHARACTERS_MAX: Final = 200
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class AuthorityStatus(StrEnum):
    """Where an authority is in its life, as `certificate_authorities.status` has it."""

    PENDING = "pending"
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, order=True)
class IssuerGrant:
    """A user who may issue certificates of a profile from an authority."""

    user_id: UserId
    profile: str

    def __str__(self) -> str:
        return f"{self.user_id} {self.profile}"


@dataclass(frozen=True, slots=True)
class Authority:
    """A row of `certificate_authorities`. `version` advances with each change.

    `certificate` and those of `chain` are DER; `chain` are the issuers elsewhere, the nearest first. `crl_shards` 0: one CRL.
    """

    authority_id: UUID
    name: str
    generation: int
    manager_id: UserId
    key_id: KeyId
    key_owner_id: UserId
    subject: str
    created_at: datetime
    parent_id: UUID | None = None
    path_length: int | None = None
    status: AuthorityStatus = AuthorityStatus.PENDING
    certificate: bytes | None = field(default=None, repr=False)
    chain: tuple[bytes, ...] = field(default=(), repr=False)
    issuers: tuple[IssuerGrant, ...] = ()
    self_service: tuple[str, ...] = ()
    base_url: str = ""
    crl_shards: int = 0
    not_after: datetime | None = None
    superseded_at: datetime | None = None
    version: int = 1

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the record covers."""
        return record_bytes(
            b"certificate authority",
            self.authority_id,
            self.name,
            self.generation,
            self.manager_id,
            self.key_id,
            self.key_owner_id,
            self.parent_id,
            self.status.value,
            self.subject,
            self.path_length,
            self.certificate,
            self.chain,
            tuple(map(str, self.issuers)),
            self.self_service,
            self.base_url,
            self.crl_shards,
            self.created_at,
            self.not_after,
            self.superseded_at,
            self.version,
        )

    @property
    def crl_url(self) -> str:
        """Where the one CRL is published; empty without a `base_url`."""
        return self._url(f"crl/{self.name}/{self.generation}.crl")

    def crl_url_of(self, shard: int) -> str:
        """Return where the CRL of a shard is published. Shard 0 is the one CRL of an authority without shards."""
        return self._url(f"crl/{self.name}/{self.generation}/{shard}.crl") if shard else self.crl_url

    @property
    def ocsp_url(self) -> str:
        """Where OCSP is answered; empty without a `base_url`."""
        return self._url(f"ocsp/{self.name}/{self.generation}")

    @property
    def certificate_url(self) -> str:
        """Where the certificate is published; empty without a `base_url`."""
        return self._url(f"ca/{self.name}/{self.generation}.crt")

    def shard_of(self, serial_number: int) -> int:
        """Return the shard of the CRL that a new certificate belongs to: 1 to `crl_shards`; 0 where there are none."""
        return 1 + serial_number % self.crl_shards if self.crl_shards else 0

    def issues(self, user_id: UserId, profile: str) -> bool:
        """Whether the record lets a user issue certificates of *profile*."""
        return IssuerGrant(user_id, profile) in self.issuers

    def is_open_to(self, user_id: UserId) -> bool:
        """Whether a user sees the certificates of the authority: its manager and its issuers do."""
        return user_id == self.manager_id or any(grant.user_id == user_id for grant in self.issuers)

    def changed(self, **changes: object) -> "Authority":
        """Return the authority after a change: the next version."""
        return replace(self, version=self.version + 1, **changes)  # type: ignore[arg-type]

    def _url(self, path: str) -> str:
        return f"{self.base_url}/{path}" if self.base_url else ""


@dataclass(frozen=True, slots=True)
class AuthorityRef:
    """How a caller names an authority: by its id, or by a name and perhaps a generation (None: the newest that is active)."""

    authority_id: UUID | None = None
    name: str = ""
    generation: int | None = None


def parse_authority_name(text: str, *, field: str = "name") -> str:
    """Return *text* as the name of an authority, or raise MALFORMED."""
    if not _NAME.fullmatch(text) or _UUID.fullmatch(text):
        raise malformed(field, "expected 1 to 63 of a-z 0-9 -, neither beginning nor ending with -, and not a UUID")
    return text


def parse_base_url(text: str, *, field: str = "base_url") -> str:
    """Return *text* as the address under which an authority publishes, empty for none, or raise MALFORMED.

    Only plain HTTP: whoever verifies a certificate would need another one to fetch over TLS (RFC 5280 section 8).
    """
    if text and (len(text) > _BASE_URL_CHARACTERS_MAX or not _BASE_URL.fullmatch(text)):
        raise malformed(
            field, f"expected http://HOST[:PORT][/PATH], at most {_BASE_URL_CHARACTERS_MAX} characters, without / at the end"
        )
    return text


def parse_authority_ref(text: str, *, field: str = "authority") -> AuthorityRef:
    """Return *text* as an id, a NAME or NAME/GENERATION, or raise MALFORMED."""
    if _UUID.fullmatch(text):
        return AuthorityRef(authority_id=parse_uuid(text, field=field))
    name, slash, generation = text.partition("/")
    if not _NAME.fullmatch(name) or (slash and not _GENERATION.fullmatch(generation)):
        raise malformed(field, "expected the id of an authority, its NAME or NAME/GENERATION")
    return AuthorityRef(name=name, generation=int(generation) if slash else None)


def check_points(before: Authority | None, base_url: str, crl_shards: int) -> None:
    """Raise MALFORMED where a certificate of an authority would be on no CRL that its verifier finds. *before* None: a new one.

    A certificate names for good the address of the CRL that will list it, and the CRL of a shard names the same.
    """
    if crl_shards and not base_url:
        raise malformed("crl_shards", "expected 0 without a base_url: the CRL of a shard names its own address")
    if before is None:
        return
    if crl_shards < before.crl_shards:
        raise malformed("crl_shards", f"expected {before.crl_shards} or more: certificates of the others are on no other CRL")
    if crl_shards and before.base_url not in ("", base_url):
        raise malformed("base_url", f"expected {before.base_url}: with shards, certificates and CRLs name it for good")


def check_active(authority: Authority, now: datetime) -> None:
    """Raise AUTHORITY_INACTIVE unless *authority* may issue certificates at *now*."""
    if authority.status is not AuthorityStatus.ACTIVE:
        raise authority_inactive(authority, str(authority.status))
    check_not_ended(authority, now)


def check_signs(authority: Authority, now: datetime) -> None:
    """Raise AUTHORITY_INACTIVE unless *authority* signs its CRLs and OCSP answers at *now*: also when superseded or disabled."""
    if authority.certificate is None:
        raise authority_inactive(authority, "pending")
    check_not_ended(authority, now)


def check_not_ended(authority: Authority, now: datetime) -> None:
    """Raise AUTHORITY_INACTIVE where the certificate of *authority* has ended at *now*."""
    if authority.not_after is None or authority.not_after <= now:
        raise authority_inactive(authority, "expired")


def check_lets_issue(authority: Authority, caller: User, profile: str) -> None:
    """Raise PERMISSION_DENIED unless *caller* has the permission to issue, and the record lets them issue that profile."""
    if Permission.CERTS_ISSUE not in caller.permissions:
        raise permission_denied(Permission.CERTS_ISSUE)
    if not authority.issues(caller.user_id, profile):
        message = f"the manager of the authority {authority.name} has not let you issue certificates of profile {profile}"
        raise KmsError(Reason.PERMISSION_DENIED, message, permission=Permission.CERTS_ISSUE)


def authority_not_found() -> KmsError:
    """Return the one answer for an authority that is not there."""
    return KmsError(Reason.AUTHORITY_NOT_FOUND, "there is no such authority")


def authority_inactive(authority: Authority, state: str) -> KmsError:
    """Return the refusal of an authority that issues nothing in its *state*."""
    message = f"the authority {authority.name}/{authority.generation} is {state}: it issues no certificates"
    return KmsError(Reason.AUTHORITY_INACTIVE, message, state=state)
