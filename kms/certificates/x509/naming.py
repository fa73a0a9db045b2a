"""Our names as pyca/cryptography has them, and back."""

import ipaddress
from collections.abc import Iterable
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from kms.certificates.constraints import NameConstraints, Subtree
from kms.certificates.names import (
    Attribute,
    GeneralName,
    NameKind,
    Subject,
    certificate_invalid,
    check_count,
    distinct,
    parse_name,
    parse_subject,
)

_OID_OF: Final = {
    Attribute.COMMON_NAME: NameOID.COMMON_NAME,
    Attribute.ORGANIZATION: NameOID.ORGANIZATION_NAME,
    Attribute.ORGANIZATIONAL_UNIT: NameOID.ORGANIZATIONAL_UNIT_NAME,
    Attribute.COUNTRY: NameOID.COUNTRY_NAME,
    Attribute.STATE: NameOID.STATE_OR_PROVINCE_NAME,
    Attribute.LOCALITY: NameOID.LOCALITY_NAME,
    Attribute.SERIAL_NUMBER: NameOID.SERIAL_NUMBER,
}
_OF_OID: Final = {oid: attribute for attribute, oid in _OID_OF.items()}


def x509_name(subject: Subject) -> x509.Name:
    """Return *subject* with one attribute in each of its parts."""
    return x509.Name([x509.NameAttribute(_OID_OF[attribute], value) for attribute, value in subject.attributes])


def subject_of(name: x509.Name, *, field: str) -> Subject:
    """Return the subject that *name* is. Raises CERTIFICATE_INVALID for attributes that the service does not know."""
    if any(len(list(part)) != 1 for part in name.rdns):
        raise certificate_invalid(field, "expected a subject with one attribute in each of its parts")
    pairs = []
    for attribute in name:
        known = _OF_OID.get(attribute.oid)
        if known is None or not isinstance(attribute.value, str):
            raise certificate_invalid(field, f"expected a subject of the attributes {', '.join(Attribute)} only")
        pairs.append((str(known), attribute.value))
    return parse_subject(pairs, field=field)


def x509_names(names: Iterable[GeneralName]) -> list[x509.GeneralName]:
    """Return *names* as alternative names."""
    return [_x509_general_name(name.kind, name.value) for name in names]


def names_of(names: Iterable[x509.GeneralName], *, field: str) -> tuple[GeneralName, ...]:
    """Return *names* as ours. Raises CERTIFICATE_INVALID for a name that breaks a rule, or of a kind that we do not know."""
    names = list(names)
    check_count(len(names), field=field)
    return distinct([_checked_name(name, field) for name in names], field=field)


def x509_constraints(constraints: NameConstraints) -> x509.NameConstraints:
    """Return *constraints* as an extension."""
    return x509.NameConstraints(
        [_x509_subtree(subtree) for subtree in constraints.permitted] or None,
        [_x509_subtree(subtree) for subtree in constraints.excluded] or None,
    )


def constraints_of(extension: x509.NameConstraints) -> NameConstraints:
    """Return the constraints of an authority's certificate.

    Raises CERTIFICATE_INVALID for subtrees of other kinds: the service could not obey them (RFC 5280 section 4.2.1.10).
    """
    return NameConstraints(
        tuple(_subtree_of(name) for name in extension.permitted_subtrees or ()),
        tuple(_subtree_of(name) for name in extension.excluded_subtrees or ()),
    )


def raw_name(name: x509.GeneralName) -> tuple[NameKind, str] | None:
    """Return the kind and the text of an alternative name, unchecked. None: it is of another kind."""
    match name:
        case x509.DNSName():
            return NameKind.DNS, name.value
        case x509.IPAddress():
            return NameKind.IP, str(name.value)
        case x509.UniformResourceIdentifier():
            return NameKind.URI, name.value
        case x509.RFC822Name():
            return NameKind.EMAIL, name.value
        case _:
            return None


def _checked_name(name: x509.GeneralName, field: str) -> GeneralName:
    raw = raw_name(name)
    if raw is None:
        raise certificate_invalid(field, f"expected alternative names of the kinds {', '.join(NameKind)} only")
    return parse_name(*raw, field=field)


def _x509_general_name(kind: NameKind, value: str) -> x509.GeneralName:
    match kind:
        case NameKind.DNS:
            return x509.DNSName(value)
        case NameKind.IP:
            return x509.IPAddress(ipaddress.ip_address(value))
        case NameKind.URI:
            return x509.UniformResourceIdentifier(value)
        case NameKind.EMAIL:
            return x509.RFC822Name(value)


def _x509_subtree(subtree: Subtree) -> x509.GeneralName:
    if subtree.kind is NameKind.IP:
        return x509.IPAddress(ipaddress.ip_network(subtree.base))
    return _x509_general_name(subtree.kind, subtree.base)


def _subtree_of(name: x509.GeneralName) -> Subtree:
    raw = raw_name(name)
    if raw is None:
        raise certificate_invalid("chain", f"expected name constraints of the kinds {', '.join(NameKind)} only")
    kind, base = raw
    return Subtree(kind, base if kind is NameKind.EMAIL and "@" in base else base.lower())
