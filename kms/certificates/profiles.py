"""What a certificate may be for, and whom it may name: one profile for each kind of certificate.

A profile fixes usages, names, keys and validity. Whoever asks chooses within it. A request of PKCS#10 may ask for less than the
profile gives, and never gets more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from kms.certificates.names import NAMES_MAX, Attribute, GeneralName, NameKind, Subject, certificate_invalid

BACKDATED: Final = timedelta(minutes=5)
"""How long before it is issued a certificate is valid: the clocks of those who verify it may be a little behind."""
VALIDITY_MIN: Final = timedelta(minutes=1)

_SECOND: Final = timedelta(seconds=1)


class KeyUsage(StrEnum):
    """What a key may do (RFC 5280 section 4.2.1.3), as the RFC names it."""

    DIGITAL_SIGNATURE = "digitalSignature"
    CONTENT_COMMITMENT = "contentCommitment"
    KEY_ENCIPHERMENT = "keyEncipherment"
    DATA_ENCIPHERMENT = "dataEncipherment"
    KEY_AGREEMENT = "keyAgreement"
    KEY_CERT_SIGN = "keyCertSign"
    CRL_SIGN = "cRLSign"
    ENCIPHER_ONLY = "encipherOnly"
    DECIPHER_ONLY = "decipherOnly"


EXTENDED_KEY_USAGES: Final[Mapping[str, str]] = {
    "serverAuth": "1.3.6.1.5.5.7.3.1",
    "clientAuth": "1.3.6.1.5.5.7.3.2",
    "codeSigning": "1.3.6.1.5.5.7.3.3",
    "emailProtection": "1.3.6.1.5.5.7.3.4",
    "timeStamping": "1.3.6.1.5.5.7.3.8",
    "OCSPSigning": "1.3.6.1.5.5.7.3.9",
}
"""The object identifiers of extended key usages (RFC 5280 section 4.2.1.12)."""


class PublicKeyType(StrEnum):
    """The type of a certified key. Keys that are kept elsewhere can be of more types than the service's own."""

    RSA = "rsa"
    P256 = "p-256"
    P384 = "p-384"
    SECP256K1 = "secp256k1"
    ED25519 = "ed25519"


class Unwanted(StrEnum):
    """What becomes of a request for an extension that the profile does not give."""

    REFUSE = "refuse"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of certificates. `extended_key_usage` holds object identifiers; a CA's `path_length` None is no limit."""

    name: str
    key_usage: frozenset[KeyUsage]
    extended_key_usage: tuple[str, ...]
    key_types: frozenset[PublicKeyType]
    name_kinds: frozenset[NameKind]
    names_min: int
    names_max: int
    subject_allowed: frozenset[Attribute]
    subject_required: frozenset[Attribute]
    validity_default: timedelta
    validity_max: timedelta
    rsa_bits_min: int = 2048
    rsa_bits_max: int = 4096
    allow_wildcards: bool = False
    common_name_is_a_name: bool = False
    is_ca: bool = False
    path_length: int | None = None
    ocsp_no_check: bool = False
    unknown_extensions: Unwanted = Unwanted.REFUSE

    def check_key(self, key_type: PublicKeyType, bits: int) -> None:
        """Raise CERTIFICATE_INVALID unless the profile certifies keys of this type and size."""
        if key_type not in self.key_types:
            raise certificate_invalid("key", f"expected one of {', '.join(sorted(self.key_types))} in profile {self.name}")
        if key_type is PublicKeyType.RSA and not self.rsa_bits_min <= bits <= self.rsa_bits_max:
            raise certificate_invalid("key", f"expected RSA of {self.rsa_bits_min} to {self.rsa_bits_max} bits")

    def check_subject(self, subject: Subject, names: Sequence[GeneralName]) -> None:
        """Raise CERTIFICATE_INVALID unless the profile lets a certificate have this subject and these names."""
        self._check_names(names)
        attributes = {attribute for attribute, _ in subject.attributes}
        if not attributes <= self.subject_allowed:
            allowed = ", ".join(sorted(self.subject_allowed)) or "no attribute"
            raise certificate_invalid("subject", f"expected only {allowed} in profile {self.name}")
        if missing := self.subject_required - attributes:
            raise certificate_invalid("subject", f"expected {', '.join(sorted(missing))} in profile {self.name}")
        if not attributes and not names:
            raise certificate_invalid("subject", "expected a subject or a name")
        hosts = {name.value for name in names if name.kind in {NameKind.DNS, NameKind.IP}}
        if self.common_name_is_a_name and subject.common_name is not None and subject.common_name not in hosts:
            raise certificate_invalid("subject", "expected as CN one of the names (dns or ip)")

    def _check_names(self, names: Sequence[GeneralName]) -> None:
        if not self.names_min <= len(names) <= self.names_max:
            raise certificate_invalid("names", f"expected {self.names_min} to {self.names_max} names in profile {self.name}")
        if any(name.kind not in self.name_kinds for name in names):
            allowed = ", ".join(sorted(self.name_kinds)) or "no names"
            raise certificate_invalid("names", f"expected only {allowed} in profile {self.name}")
        if not self.allow_wildcards and any(name.is_wildcard for name in names):
            raise certificate_invalid("names", f"expected no wildcard in profile {self.name}")

    def check_usages(self, key_usage: frozenset[KeyUsage], extended_key_usage: frozenset[str], *, is_ca: bool) -> None:
        """Raise CERTIFICATE_INVALID for usages that were asked for and that the profile neither gives nor drops."""
        if self.unknown_extensions is Unwanted.DROP:
            return
        if is_ca and not self.is_ca:
            raise certificate_invalid("csr", f"expected a request without CA:TRUE in profile {self.name}")
        if more := key_usage - self.key_usage:
            raise certificate_invalid("csr", f"expected no key usage {', '.join(sorted(more))} in profile {self.name}")
        if not extended_key_usage <= frozenset(self.extended_key_usage):
            raise certificate_invalid("csr", f"expected only the extended key usages of profile {self.name}")

    def validity(self, now: datetime, asked: timedelta | None, *, issuer: "Validity | None") -> "Validity":
        """Return from when to when a certificate is valid: as long as *asked*, and not longer than its issuer.

        *now* is by the database's clock, so that all workers agree. Raises CERTIFICATE_INVALID for a span beyond the profile's.
        """
        span = self.validity_default if asked is None else asked
        if not VALIDITY_MIN <= span <= self.validity_max:
            days = self.validity_max / timedelta(days=1)
            raise certificate_invalid("validity", f"expected 1 minute to {days:g} days in profile {self.name}")
        begins_at = now.replace(microsecond=0)
        ends_at = begins_at + span - _SECOND  # the last second counts (RFC 5280 section 4.1.2.5)
        if issuer is None:
            return Validity(begins_at - BACKDATED, ends_at)
        if not issuer.not_before <= begins_at < issuer.not_after:
            raise certificate_invalid("validity", "expected an issuer that is valid now")
        return Validity(max(begins_at - BACKDATED, issuer.not_before), min(ends_at, issuer.not_after))

    def check_validity(self, validity: "Validity") -> None:
        """Raise CERTIFICATE_INVALID for a validity longer than the profile's."""
        if not _SECOND <= validity.not_after - validity.not_before < self.validity_max + BACKDATED:
            raise certificate_invalid("validity", f"expected at most the validity of profile {self.name}")


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when a certificate is valid, both included, in whole seconds."""

    not_before: datetime
    not_after: datetime


_ORGANIZATION: Final = frozenset({Attribute.ORGANIZATION, Attribute.ORGANIZATIONAL_UNIT, Attribute.COUNTRY})
_PLACE: Final = frozenset({Attribute.STATE, Attribute.LOCALITY})
_COMMON_NAME: Final = frozenset({Attribute.COMMON_NAME})
_LEAF_KEYS: Final = frozenset(PublicKeyType)
_CA_KEYS: Final = frozenset({PublicKeyType.RSA, PublicKeyType.P256, PublicKeyType.ED25519, PublicKeyType.SECP256K1})
_CA_USAGE: Final = frozenset({KeyUsage.KEY_CERT_SIGN, KeyUsage.CRL_SIGN, KeyUsage.DIGITAL_SIGNATURE})
_SIGNS: Final = frozenset({KeyUsage.DIGITAL_SIGNATURE})
_DAY: Final = timedelta(days=1)

SERVER: Final = Profile(
    name="server",
    key_usage=_SIGNS,
    extended_key_usage=(EXTENDED_KEY_USAGES["serverAuth"],),
    key_types=_LEAF_KEYS,
    name_kinds=frozenset({NameKind.DNS, NameKind.IP}),
    names_min=1,
    names_max=NAMES_MAX,
    subject_allowed=_COMMON_NAME | _ORGANIZATION | _PLACE,
    subject_required=frozenset(),
    validity_default=90 * _DAY,
    validity_max=398 * _DAY,
    allow_wildcards=True,
    common_name_is_a_name=True,
)
CLIENT: Final = Profile(
    name="client",
    key_usage=_SIGNS,
    extended_key_usage=(EXTENDED_KEY_USAGES["clientAuth"],),
    key_types=_LEAF_KEYS,
    name_kinds=frozenset({NameKind.URI, NameKind.EMAIL, NameKind.DNS}),
    names_min=1,
    names_max=10,
    subject_allowed=_COMMON_NAME | _ORGANIZATION | _PLACE | {Attribute.SERIAL_NUMBER},
    subject_required=frozenset(),
    validity_default=90 * _DAY,
    validity_max=398 * _DAY,
)
CODE_SIGNING: Final = Profile(
    name="code-signing",
    key_usage=_SIGNS,
    extended_key_usage=(EXTENDED_KEY_USAGES["codeSigning"],),
    key_types=_LEAF_KEYS,
    name_kinds=frozenset({NameKind.EMAIL, NameKind.URI}),
    names_min=0,
    names_max=10,
    subject_allowed=_COMMON_NAME | _ORGANIZATION | _PLACE | {Attribute.SERIAL_NUMBER},
    subject_required=_COMMON_NAME,
    validity_default=365 * _DAY,
    validity_max=460 * _DAY,
    rsa_bits_min=3072,
)
INTERMEDIATE: Final = Profile(
    name="intermediate",
    key_usage=_CA_USAGE,
    extended_key_usage=(),
    key_types=_CA_KEYS,
    name_kinds=frozenset(),
    names_min=0,
    names_max=0,
    subject_allowed=_COMMON_NAME | _ORGANIZATION | _PLACE,
    subject_required=_COMMON_NAME,
    validity_default=5 * 365 * _DAY,
    validity_max=15 * 365 * _DAY,
    is_ca=True,
    path_length=0,
)
ROOT: Final = Profile(
    name="root",
    key_usage=_CA_USAGE,
    extended_key_usage=(),
    key_types=_CA_KEYS,
    name_kinds=frozenset(),
    names_min=0,
    names_max=0,
    subject_allowed=_COMMON_NAME | _ORGANIZATION | _PLACE,
    subject_required=_COMMON_NAME,
    validity_default=10 * 365 * _DAY,
    validity_max=25 * 365 * _DAY,
    is_ca=True,
)
OCSP: Final = Profile(
    name="ocsp",
    key_usage=_SIGNS,
    extended_key_usage=(EXTENDED_KEY_USAGES["OCSPSigning"],),
    key_types=_CA_KEYS,
    name_kinds=frozenset(),
    names_min=0,
    names_max=0,
    subject_allowed=_COMMON_NAME | _ORGANIZATION,
    subject_required=_COMMON_NAME,
    validity_default=30 * _DAY,
    validity_max=90 * _DAY,
    ocsp_no_check=True,
)

BUILT_IN: Final[Mapping[str, Profile]] = {
    profile.name: profile for profile in (SERVER, CLIENT, CODE_SIGNING, INTERMEDIATE, OCSP, ROOT)
}
"""The profiles that are always there, by name."""

OF_THE_SERVICE: Final = frozenset({ROOT.name, OCSP.name})
"""Profiles of certificates that the service makes for itself, and nobody asks for by name."""
