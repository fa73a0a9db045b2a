"""Whom a certificate names: its subject, and its alternative names (RFC 5280 sections 4.1.2.6 and 4.2.1.6).

Text becomes a name once, here, in the one spelling that a certificate holds. So two spellings of a name are one name: host names
are in lower case and in ASCII (IDNA 2008), addresses in the form of RFC 5952. All refusals are CERTIFICATE_INVALID.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

import idna

from kms.domain.errors import KmsError, Reason
from kms.domain.text import has_hidden, is_blank

NAMES_MAX: Final = 100
DOMAIN_CHARACTERS_MAX: Final = 253
EMAIL_CHARACTERS_MAX: Final = 254
URI_CHARACTERS_MAX: Final = 1024
WILDCARD: Final = "*."

_LOCAL_PART: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_LOCAL_PART_MAX: Final = 64
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")
_PRINTABLE: Final = re.compile(r"[A-Za-z0-9 '()+,./:=?-]+")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
_ESCAPED: Final = re.compile(r'([,+"\\<>;]|^[ #]| $)')
_ATTRIBUTE_TEXT: Final = re.compile(r' *([A-Za-z]+) *= *((?:[^,+"\\<>;]|\\[,+"\\<>; #=])*)')


def certificate_invalid(field: str, rule: str) -> KmsError:
    """Return the error for a request or a certificate that breaks *rule*."""
    return KmsError(Reason.CERTIFICATE_INVALID, f"{field}: {rule}", field=field)


class NameKind(StrEnum):
    """A kind of alternative name (`GeneralName` of RFC 5280)."""

    DNS = "dns"
    IP = "ip"
    URI = "uri"
    EMAIL = "email"


@dataclass(frozen=True, slots=True)
class GeneralName:
    """An alternative name in its one spelling. Made by `parse_name`, so its value obeys the rules of its kind."""

    kind: NameKind
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"

    @property
    def is_wildcard(self) -> bool:
        """Whether the name stands for all hosts of a domain."""
        return self.kind is NameKind.DNS and self.value.startswith(WILDCARD)

    @property
    def host(self) -> str | None:
        """The domain or address that the name lies in: a wildcard's domain, an address's, an URI's host. None: it has none."""
        match self.kind:
            case NameKind.DNS:
                return self.value.removeprefix(WILDCARD)
            case NameKind.IP:
                return self.value
            case NameKind.EMAIL:
                return self.value.rpartition("@")[2]
            case NameKind.URI:
                return urlsplit(self.value).hostname


class Attribute(StrEnum):
    """An attribute of a subject, by its short name of RFC 4514 (serialNumber: of RFC 4519)."""

    COMMON_NAME = "CN"
    ORGANIZATION = "O"
    ORGANIZATIONAL_UNIT = "OU"
    COUNTRY = "C"
    STATE = "ST"
    LOCALITY = "L"
    SERIAL_NUMBER = "serialNumber"


# RFC 5280 appendix A.1, "Upper Bounds".
_CHARACTERS_MAX: Final = {
    Attribute.COMMON_NAME: 64,
    Attribute.ORGANIZATION: 64,
    Attribute.ORGANIZATIONAL_UNIT: 64,
    Attribute.COUNTRY: 2,
    Attribute.STATE: 128,
    Attribute.LOCALITY: 128,
    Attribute.SERIAL_NUMBER: 64,
}
_OF_TEXT: Final = {attribute.lower(): attribute for attribute in Attribute}


@dataclass(frozen=True, slots=True)
class Subject:
    """Attributes of a subject in the order of the certificate. Made by `parse_subject`; without attributes it is empty."""

    attributes: tuple[tuple[Attribute, str], ...] = ()

    def __str__(self) -> str:
        """Return the subject as RFC 4514 writes it: the last attribute first."""
        return ",".join(f"{attribute}={_escaped(value)}" for attribute, value in reversed(self.attributes))

    def values(self, attribute: Attribute) -> tuple[str, ...]:
        """Return the values of *attribute*."""
        return tuple(value for each, value in self.attributes if each is attribute)

    @property
    def common_name(self) -> str | None:
        """The common name, if there is one."""
        return next(iter(self.values(Attribute.COMMON_NAME)), None)


EMPTY: Final = Subject()


def parse_subject(attributes: Iterable[tuple[str, str]], *, field: str = "subject") -> Subject:
    """Return a subject of (short name, value) pairs, in the order of the certificate. Only OU may be there more than once."""
    parsed: list[tuple[Attribute, str]] = []
    for name, value in attributes:
        attribute = _OF_TEXT.get(name.lower())
        if attribute is None:
            raise certificate_invalid(field, f"expected only the attributes {', '.join(Attribute)}")
        if attribute is not Attribute.ORGANIZATIONAL_UNIT and any(attribute is each for each, _ in parsed):
            raise certificate_invalid(field, f"expected {attribute} once")
        _check_attribute(attribute, value, field)
        if (attribute, value) in parsed:
            raise certificate_invalid(field, f"expected each value of {attribute} once")
        parsed.append((attribute, value))
    return Subject(tuple(parsed))


def parse_subject_text(text: str, *, field: str = "subject") -> Subject:
    """Return the subject that *text* writes as RFC 4514 does (`CN=www.example.com,O=Example`), the last attribute first."""
    pairs: list[tuple[str, str]] = []
    place = 0
    while text and place <= len(text):
        found = _ATTRIBUTE_TEXT.match(text, place)
        if found is None or (found.end() < len(text) and text[found.end()] != ","):
            raise certificate_invalid(field, r"expected NAME=VALUE,NAME=VALUE with , + \" \ < > ; written as \, and so on")
        pairs.append((found[1], re.sub(r"\\(.)", r"\1", found[2], flags=re.DOTALL)))
        place = found.end() + 1
    return parse_subject(reversed(pairs), field=field)


def _escaped(value: str) -> str:
    return _ESCAPED.sub(r"\\\1", value)


def _check_attribute(attribute: Attribute, value: str, field: str) -> None:
    most = _CHARACTERS_MAX[attribute]
    if not 0 < len(value) <= most:
        raise certificate_invalid(field, f"expected 1 to {most} characters as {attribute}")
    if has_hidden(value) or is_blank(value) or value != value.strip() or not unicodedata.is_normalized("NFC", value):
        rule = "expected text in Unicode's NFC form without control characters, and without spaces at its ends"
        raise certificate_invalid(field, f"{rule}, as {attribute}")
    if attribute is Attribute.COUNTRY and not _COUNTRY.fullmatch(value):
        raise certificate_invalid(field, "expected a country of two letters of A-Z as C")
    if attribute is Attribute.SERIAL_NUMBER and not _PRINTABLE.fullmatch(value):
        raise certificate_invalid(field, "expected A-Z a-z 0-9 ' ( ) + , - . / : = ? and spaces as serialNumber")


def parse_names(texts: Sequence[str], *, field: str = "names") -> tuple[GeneralName, ...]:
    """Return the names that *texts* write as `dns:www.example.com`, `ip:192.0.2.1`, `uri:…`, `email:…`, none of them twice."""
    check_count(len(texts), field=field)
    names = []
    for text in texts:
        kind, separator, value = text.partition(":")
        if not separator or kind not in tuple(NameKind):
            raise certificate_invalid(
                field, "expected names like dns:www.example.com or ip:192.0.2.1, of kind dns, ip, uri or email"
            )
        names.append(parse_name(NameKind(kind), value, field=field))
    return distinct(names, field=field)


def check_count(count: int, *, field: str) -> None:
    """Raise CERTIFICATE_INVALID for more names than any profile has, before each of them costs time."""
    if count > NAMES_MAX:
        raise certificate_invalid(field, f"expected at most {NAMES_MAX} names, not {count}")


def distinct(names: Sequence[GeneralName], *, field: str = "names") -> tuple[GeneralName, ...]:
    """Return *names*, or raise CERTIFICATE_INVALID if one is there twice."""
    if len(set(names)) != len(names):
        raise certificate_invalid(field, "expected each name once")
    return tuple(names)


def parse_name(kind: NameKind, text: str, *, field: str = "names") -> GeneralName:
    """Return *text* as a name of *kind*, in its one spelling. Whether a wildcard is allowed is for the profile to say."""
    match kind:
        case NameKind.DNS:
            wildcard = WILDCARD if text.startswith(WILDCARD) else ""
            value = wildcard + parse_domain(text.removeprefix(WILDCARD), field=field)
            if len(value) > DOMAIN_CHARACTERS_MAX or (wildcard and value.count(".") < 2):
                raise certificate_invalid(field, "expected after *. a domain of at least two labels, 253 characters in all")
        case NameKind.IP:
            value = parse_address(text, field=field)
        case NameKind.EMAIL:
            value = _parse_email(text, field)
        case NameKind.URI:
            value = _parse_uri(text, field)
    return GeneralName(kind, value)


def parse_domain(text: str, *, field: str) -> str:
    """Return a domain as IDNA 2008 writes it in ASCII (RFC 5891), in lower case; without a dot at its end."""
    rule = "expected a domain: labels of letters, digits and hyphens (IDNA 2008), 63 characters each, 253 in all"
    if len(text) > DOMAIN_CHARACTERS_MAX:
        raise certificate_invalid(field, rule)
    try:
        domain = idna.encode(text.lower(), strict=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise certificate_invalid(field, rule) from None
    if len(domain) > DOMAIN_CHARACTERS_MAX or domain.endswith("."):
        raise certificate_invalid(field, rule)
    if domain.rpartition(".")[2].isdigit():
        raise certificate_invalid(field, "expected a domain, and an address only as a name of the kind ip")
    return domain


def parse_address(text: str, *, field: str) -> str:
    """Return an address of IPv4 or IPv6 as RFC 5952 writes it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise certificate_invalid(field, "expected an address of IPv4 or IPv6") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise certificate_invalid(field, "expected an address without a zone")
    return str(address)


def _parse_email(text: str, field: str) -> str:
    local, _, domain = text.rpartition("@")
    if len(local) > _LOCAL_PART_MAX or not _LOCAL_PART.fullmatch(local):
        raise certificate_invalid(field, "expected an e-mail address with a local part of 1 to 64 ASCII characters (RFC 5321)")
    email = f"{local}@{parse_domain(domain, field=field)}"
    if len(email) > EMAIL_CHARACTERS_MAX:
        raise certificate_invalid(field, f"expected an e-mail address of at most {EMAIL_CHARACTERS_MAX} characters")
    return email


def _parse_uri(text: str, field: str) -> str:
    rule = f"expected an absolute URI in ASCII (RFC 3986) of at most {URI_CHARACTERS_MAX} characters, its scheme in lower case"
    if len(text) > URI_CHARACTERS_MAX or not _URI.fullmatch(text):
        raise certificate_invalid(field, rule)
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise certificate_invalid(field, rule) from None
    if parts.netloc and not _is_host(parts.netloc, host, field):
        raise certificate_invalid(field, "expected a URI without a user, whose host is a domain or an address in lower case")
    return text


def _is_host(netloc: str, host: str | None, field: str) -> bool:
    if host is None:
        return False
    if netloc.startswith("["):
        return netloc.startswith(f"[{parse_address(host, field=field)}]")
    is_address = host.rpartition(".")[2].isdigit()
    spelt = parse_address(host, field=field) if is_address else parse_domain(host, field=field)
    return netloc == spelt or netloc.startswith(f"{spelt}:")
