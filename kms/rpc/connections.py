"""The connections of clients: how many there may be of one user, of one address and of all, and which one goes first.

grpc refuses every new connection once there are too many. It neither knows users nor closes a connection that is idle only for
a while. So we count ourselves, well below grpc's limit, and close what is over the limit:

    opened ──▶ never called ──▶ idle since ──▶ closed: first who never called, then who has been idle longest
                                  ▲    │
                                  │    ▼
                                has calls in flight: never closed

A connection of a new client survives others that were opened earlier and never called. Pings do not count as calls.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.rpc.peers import Peer


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections one process holds: of all clients, of one user, of one address; how many calls one connection has."""

    total_max: int
    per_user_max: int
    per_address_max: int
    calls_max: int


@dataclass(slots=True, eq=False)
class _Connection:
    """What we know of a connection. It changes with each call."""

    peer: Peer
    idle_since: float
    calls: int = 0
    user: UserId | None = None
    has_called: bool = False
    is_superseded: bool = False
    is_shut: bool = False

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The first in this order is the first to be closed."""
        return not self.is_superseded, self.has_called, self.idle_since


@dataclass(slots=True)
class Connections:
    """Knows the connections of this process, and decides which to close. Only the event loop uses it.

    `close` ends one at once, whatever goes on there. Until it is set, nothing can be closed.
    """

    limits: ConnectionLimits
    clock: Callable[[], float] = time.monotonic
    close: Callable[[Peer], None] = lambda _: None
    _all: dict[Peer, _Connection] = field(default_factory=dict)
    _of_user: dict[UserId, dict[_Connection, None]] = field(default_factory=dict)

    @contextmanager
    def calling(self, peer: Peer, user: UserId) -> Iterator[None]:
        """Count a call of *user* on the connection of *peer* within the block.

        Raises RATE_LIMITED where the user has as many other connections as they may, each with a call in flight. If one of them
        is idle, it is closed soon instead. Raises RATE_LIMITED also for one call too many on this connection: grpc keeps that
        limit only once the client has acknowledged it.
        """
        connection = self._of(peer)
        if connection.calls >= self.limits.calls_max:
            message = f"you have {self.limits.calls_max} calls in flight on one connection, which is as many as you may have"
            raise KmsError(Reason.RATE_LIMITED, message)
        if connection.user != user:
            self._give(connection, user)
        connection.calls += 1
        connection.has_called = True
        try:
            yield
        finally:
            connection.calls -= 1
            connection.idle_since = self.clock()

    def shut(self, peer: Peer) -> None:
        """Close the connection of *peer* at once. Calls that came in before find that it `is_shut`."""
        connection = self._of(peer)
        if not connection.is_shut:
            connection.is_shut = True
            self.close(peer)

    def is_shut(self, peer: Peer) -> bool:
        """Return whether the connection of *peer* is one that we shut."""
        connection = self._all.get(peer)
        return connection is not None and connection.is_shut

    def to_close(self, present: Collection[Peer]) -> list[Peer]:
        """Return those of *present*, which are all connections that are open now, that are to be closed."""
        now = self.clock()
        for peer in [peer for peer, connection in self._all.items() if peer not in present and not connection.calls]:
            self._take_away(self._all.pop(peer))
        for peer in present:
            if peer not in self._all:
                self._all[peer] = _Connection(peer, now)
        addresses = Counter(peer.address for peer in self._all)
        excess = {address: count - self.limits.per_address_max for address, count in addresses.items()}
        closing = [connection for connection in self._all.values() if connection.is_superseded and not connection.calls]
        if len(self._all) > self.limits.total_max or max(excess.values(), default=0) > 0:
            closing = self._over_limit(excess)
        return [connection.peer for connection in closing]

    def _of(self, peer: Peer) -> _Connection:
        connection = self._all.get(peer)
        if connection is None:
            connection = self._all[peer] = _Connection(peer, self.clock())
        return connection

    def _over_limit(self, excess: dict[str, int]) -> list[_Connection]:
        """Return what must go so that no address, and not all together, have too many."""
        closing, staying = [], []
        for connection in sorted(self._idle(), key=attrgetter("rank")):
            if connection.is_superseded or excess[connection.peer.address] > 0:
                excess[connection.peer.address] -= 1
                closing.append(connection)
            else:
                staying.append(connection)
        over = len(self._all) - len(closing) - self.limits.total_max
        return closing + staying[: max(0, over)]

    def _idle(self) -> Iterable[_Connection]:
        return (connection for connection in self._all.values() if not connection.calls)

    def _give(self, connection: _Connection, user: UserId) -> None:
        others = self._of_user.get(user, {})
        if len(others) >= self.limits.per_user_max:
            idle = min((other for other in others if not other.calls), key=attrgetter("idle_since"), default=None)
            if idle is None:
                message = f"you have calls in flight on {self.limits.per_user_max} connections, which is as many as you may have"
                raise KmsError(Reason.RATE_LIMITED, message)
            self._take_away(idle)
            idle.is_superseded = True
        self._take_away(connection)
        connection.user, connection.is_superseded = user, False
        self._of_user.setdefault(user, {})[connection] = None

    def _take_away(self, connection: _Connection) -> None:
        if connection.user is not None:
            of_user = self._of_user[connection.user]
            del of_user[connection]
            if not of_user:
                del self._of_user[connection.user]
            connection.user = None
