"""A port that several processes of ours listen on, and nobody else."""

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextmanager
def reserved(address: str) -> Iterator[str]:
    """Hold *address* (`host:port`, port 0 for a free one) within the block; yield it with the port.

    Whoever sets SO_REUSEPORT, as our workers do, can listen there meanwhile. Raises OSError where somebody listens already: with
    SO_REUSEPORT alone a second service would be given half of the first one's calls.
    """
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        try:
            places = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            held = _reserve([(family, str(place[0])) for family, _, _, _, place in places], int(port), stack)
        except OSError as error:
            raise OSError(f"cannot listen on {address}: {error.strerror}") from None
        yield f"{host}:{held}"


def _reserve(places: list[tuple[socket.AddressFamily, str]], port: int, stack: ExitStack) -> int:
    """Hold the port at each of *places*; return it. `localhost` may name a place that this host has not."""
    absent: list[OSError] = []
    for family, host in places:
        try:
            port = _free(family, (host, port))
            stack.enter_context(_held(family, (host, port)))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            absent.append(error)
    if len(absent) == len(places):
        raise absent[0]
    return port


def _free(family: socket.AddressFamily, place: tuple[str, int]) -> int:
    """Return the port, having found that nobody listens there: to listen is what tells, to bind is allowed to several."""
    with _bound(family, place) as probe:
        probe.listen(1)
        return int(probe.getsockname()[1])


def _held(family: socket.AddressFamily, place: tuple[str, int]) -> socket.socket:
    held = _bound(family, place, socket.SO_REUSEPORT)
    # It was needed to bind beside connections of an earlier service; left on, it would let another service pass the probe.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def _bound(family: socket.AddressFamily, place: tuple[str, int], *options: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        if family is socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(place)
    except BaseException:
        bound.close()
        raise
    return bound
