"""Name constraints: the part of all names that an authority may certify (RFC 5280 section 4.2.1.10).

A subtree is written as a certificate holds it:

    dns:example.com       the host and all below it         email:example.com    all mailboxes of the host
    ip:192.0.2.0/24       all addresses of the network      email:.example.com   all mailboxes of the hosts below
    uri:example.com       URIs of the host                  email:a@example.com  this mailbox
    uri:.example.com      URIs of the hosts below
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kms.certificates.names import GeneralName, NameKind, certificate_invalid, parse_domain, parse_name

_NETWORK: Final = ipaddress.ip_network


@dataclass(frozen=True, slots=True)
class Subtree:
    """All names of a kind that lie under `base`. Made by `parse_subtrees`."""

    kind: NameKind
    base: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.base}"

    def contains(self, name: GeneralName) -> bool:
        """Whether the whole of *name* lies in the subtree: of a wildcard, all hosts."""
        if name.kind is not self.kind:
            return False
        match self.kind:
            case NameKind.IP:
                address, network = ipaddress.ip_address(name.value), _NETWORK(self.base)
                return address.version == network.version and address in network
            case NameKind.EMAIL if "@" in self.base:
                return name.value == self.base
            case NameKind.DNS:
                return name.value == self.base or _is_below(name.value, self.base)
            case NameKind.EMAIL | NameKind.URI:
                return name.host == self.base or (self.base.startswith(".") and _is_below(name.host or "", self.base))

    def touches(self, name: GeneralName) -> bool:
        """Whether some of *name* lies in the subtree: of a wildcard, one host."""
        if self.contains(name):
            return True
        # The star stands for one label, so a subtree one label below the wildcard's domain has a host of it.
        return name.is_wildcard and self.kind is NameKind.DNS and self.base.partition(".")[2] == name.host


@dataclass(frozen=True, slots=True)
class NameConstraints:
    """The names that an authority may certify, and those that it may not. A kind without a permitted subtree is not limited."""

    permitted: tuple[Subtree, ...] = ()
    excluded: tuple[Subtree, ...] = ()

    def check(self, names: Iterable[GeneralName]) -> None:
        """Raise CERTIFICATE_INVALID for a name outside the constraints. A URI without a host is outside all of them."""
        for number, name in enumerate(names, 1):
            of_kind = [subtree for subtree in self.permitted if subtree.kind is name.kind]
            if of_kind and not any(subtree.contains(name) for subtree in of_kind):
                raise certificate_invalid("names", f"expected only names that the authority may certify, unlike name {number}")
            is_homeless = name.host is None and any(subtree.kind is name.kind for subtree in self.excluded)
            if is_homeless or any(subtree.touches(name) for subtree in self.excluded):
                raise certificate_invalid("names", f"expected no name that is excluded from the authority, like name {number}")


def parse_constraints(permitted: Sequence[str], excluded: Sequence[str]) -> NameConstraints | None:
    """Return the constraints that the texts write; None where there are none. Raises CERTIFICATE_INVALID."""
    if not permitted and not excluded:
        return None
    return NameConstraints(_parse_subtrees(permitted, "permitted"), _parse_subtrees(excluded, "excluded"))


def _parse_subtrees(texts: Sequence[str], field: str) -> tuple[Subtree, ...]:
    subtrees = []
    for text in texts:
        kind, separator, base = text.partition(":")
        if not separator or kind not in tuple(NameKind):
            raise certificate_invalid(field, "expected subtrees like dns:example.com, of kind dns, ip, uri or email")
        subtrees.append(Subtree(NameKind(kind), _parse_base(NameKind(kind), base, field)))
    if len(set(subtrees)) != len(subtrees):
        raise certificate_invalid(field, "expected each subtree once")
    return tuple(subtrees)


def _parse_base(kind: NameKind, text: str, field: str) -> str:
    match kind:
        case NameKind.IP:
            try:
                return str(_NETWORK(text))
            except ValueError:
                raise certificate_invalid(
                    field, "expected a network like 192.0.2.0/24, without bits set after its prefix"
                ) from None
        case NameKind.DNS:
            return parse_domain(text, field=field)
        case NameKind.EMAIL if "@" in text:
            return parse_name(kind, text, field=field).value
        case NameKind.EMAIL | NameKind.URI:
            dot = "." if text.startswith(".") else ""
            return dot + parse_domain(text.removeprefix("."), field=field)


def _is_below(host: str, domain: str) -> bool:
    """Whether *host* is below *domain*, which may begin with a dot. All hosts are below the empty domain."""
    return not domain or host.endswith(f".{domain.removeprefix('.')}")
