"""How a call comes in: its place, its message, and what becomes of a client that wastes calls.

A wasted call is one that is cancelled, or that ends before its message is there. Beginning and cancelling calls costs a client
next to nothing, and us the better part of a call. So each user may waste so many, and then loses the connections on which more
are wasted.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from kms.domain.errors import KmsError
from kms.domain.ids import UserId
from kms.rpc.connections import Connections
from kms.rpc.limits import InFlightLimit
from kms.rpc.messages import MessageReader
from kms.rpc.peers import Peer

Context = grpc.aio.ServicerContext[Any, Any]

WASTED_MAX: Final = 1000
WASTED_PER_SECOND: Final = 100.0
_REMEMBERED_MAX: Final = 10_000


@dataclass(slots=True)
class Waste:
    """Counts wasted calls by who wastes them: a user, or the address of a caller whose certificate names none."""

    close: Callable[[Peer], None]
    clock: Callable[[], float] = time.monotonic
    _counts: dict[UserId | str, tuple[float, float]] = field(default_factory=dict)  # how many, as of when

    def note(self, peer: Peer, user_id: UserId | None) -> None:
        """Count a wasted call, and close its connection if there were too many."""
        who, now = user_id or peer.address, self.clock()
        count, then = self._counts.pop(who, (0.0, now))
        count = max(0.0, count - (now - then) * WASTED_PER_SECOND) + 1
        if len(self._counts) >= _REMEMBERED_MAX:
            del self._counts[next(iter(self._counts))]  # the one who has wasted none for longest
        self._counts[who] = (min(count, WASTED_MAX + 1.0), now)
        if count > WASTED_MAX:
            self.close(peer)


class Entrance:
    """Lets calls in, by the limits of connections and of what is in flight."""

    def __init__(self, connections: Connections, messages: MessageReader, waste: Waste) -> None:
        self._connections = connections
        self._messages = messages
        self.waste = waste

    @asynccontextmanager
    async def message(self, context: Context, peer: Peer, user_id: UserId, limit: InFlightLimit) -> AsyncIterator[bytes]:
        """Yield the message of a call, which holds its places within the block. Raises what the reader and the limits raise."""
        is_wasted = True
        try:
            with limit.of_user(user_id), self._connections.calling(peer, user_id):
                body = await self._messages.read(context)
                with limit.of_all():
                    try:
                        yield body
                    except Exception:
                        is_wasted = False
                        raise
                    is_wasted = False
        finally:
            if is_wasted:
                self.waste.note(peer, user_id)

    @contextmanager
    def stream(self, peer: Peer, user_id: UserId, limit: InFlightLimit) -> Iterator[None]:
        """Hold the places of a stream of requests within the block: there is no one message to wait for. Raises RATE_LIMITED."""
        try:
            with limit.of_user(user_id), self._connections.calling(peer, user_id), limit.of_all():
                yield
        except (asyncio.CancelledError, KmsError):
            self.waste.note(peer, user_id)
            raise
