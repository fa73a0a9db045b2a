"""The connections that grpc has accepted on our port, found among the descriptors of this process.

grpc gives no access to its connections. But their sockets are our descriptors, and to shut one down through a duplicate of
its descriptor looks to grpc as if the client had closed it. This needs `/proc`; on a system without it we close nothing.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final

from kms.rpc.peers import Peer, peer_of_socket

_DESCRIPTORS: Final = "/proc/self/fd"


class AcceptedSockets:
    """The connections to *port*, in this process. What a descriptor is, is asked once for each inode."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[tuple[int, str], Peer | None] = {}  # None: a socket that is not one of these connections
        self._open: dict[Peer, int] = {}

    def peers(self) -> dict[Peer, int]:
        """Return the peers that are connected now, with the descriptors."""
        known = {}
        for descriptor in self._descriptors():
            with suppress(OSError):  # it was closed meanwhile
                target = os.readlink(f"{_DESCRIPTORS}/{descriptor}")
                if target.startswith("socket:"):
                    place = (descriptor, target)
                    known[place] = self._known[place] if place in self._known else self._peer(descriptor)
        self._known = known
        self._open = {peer: descriptor for (descriptor, _), peer in known.items() if peer is not None}
        return self._open

    def close(self, peer: Peer) -> None:
        """End the connection to *peer*, if there is one."""
        if peer in self._open and self.shut_down(peer, self._open[peer]):
            return
        descriptor = self.peers().get(peer)
        if descriptor is not None:
            self.shut_down(peer, descriptor)

    def shut_down(self, peer: Peer, descriptor: int) -> bool:
        """End the connection to *peer*, if *descriptor* is still that one. Return whether it was."""
        # The duplicate stays what it is, also if grpc closes its own meanwhile and the number is another's.
        with suppress(OSError), _duplicated(descriptor) as found:
            if self._peer_of(found) == peer:
                found.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def _descriptors(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(_DESCRIPTORS)]
        except OSError:
            return []

    def _peer(self, descriptor: int) -> Peer | None:
        with _duplicated(descriptor) as found:
            return self._peer_of(found)

    def _peer_of(self, found: socket.socket) -> Peer | None:
        """Return the peer of an accepted connection to our port; None for every other socket."""
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return None
        try:
            return peer_of_socket(found.getpeername()) if found.getsockname()[1] == self._port else None
        except OSError:  # it listens, or its client is gone
            return None


@contextmanager
def _duplicated(descriptor: int) -> Iterator[socket.socket]:
    """Yield a socket over a duplicate of *descriptor*, or raise OSError if it is none or is closed."""
    duplicate = os.dup(descriptor)
    try:
        found = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with closing(found):
        yield found
