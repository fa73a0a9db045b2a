"""Who is at the other end of a connection, as grpc and as sockets say it."""

from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import unquote


class Peer(NamedTuple):
    """The address and the port of a client; both are empty where it has none."""

    address: str
    port: int


def peer_of_call(text: str) -> Peer:
    """Return the peer in what grpc says of one: `ipv4:192.0.2.1:5000` or `ipv6:%5Bfe80::1%252%5D:5000`.

    Without the zone (RFC 6874): PostgreSQL's inet, in which the address is recorded, knows none.
    """
    kind, _, rest = unquote(text).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return Peer("", 0)
    host, _, port = rest.rpartition(":")
    return Peer(host.strip("[]").partition("%")[0], int(port))


def peer_of_socket(name: tuple[str, int] | tuple[str, int, int, int]) -> Peer:
    """Return the peer in what `getpeername` of a TCP socket says; an IPv4 address on an IPv6 socket as grpc says it."""
    address = name[0].partition("%")[0]
    mapped = IPv6Address(address).ipv4_mapped if ":" in address else None
    return Peer(str(mapped) if mapped is not None else address, name[1])
