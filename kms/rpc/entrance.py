"""How a call comes in: its place, its message, and what becomes of a client that wastes calls.

    headers ──▶ shut out? ──▶ of_user ──▶ the message arrives ──▶ of_all ──▶ the call is handled

A wasted call is one that is cancelled, or that ends before its message is there. Beginning and cancelling calls costs a client
next to nothing, and us the better part of a call. So each user may waste so many. A user who wastes more is shut out for a while:
the first call on each of their connections closes it, and such a call is neither logged nor recorded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc
import structlog

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.rpc.connections import Connections
from kms.rpc.limits import InFlightLimit
from kms.rpc.messages import MessageReader
from kms.rpc.peers import Peer, peer_of_call
from kms.rpc.status import status_of

Context = grpc.aio.ServicerContext[Any, Any]

WASTED_MAX: Final = 1000
WASTED_PER_SECOND: Final = 100.0
SHUT_OUT_SECONDS: Final = WASTED_MAX / WASTED_PER_SECOND
SHUT_OUT: Final = status_of(KmsError(Reason.RATE_LIMITED, "you have cancelled, or begun in vain, too many calls; wait"))
_REMEMBERED_MAX: Final = 10_000
_LOG = structlog.get_logger("kms.rpc")


class ShutOutError(Exception):
    """The caller has wasted too many calls. The answer is `SHUT_OUT`, if the connection still takes one."""


class Identify(Protocol):
    """Finds who calls from what TLS knows of the peer, `grpc.ServicerContext.auth_context()`."""

    def __call__(self, auth_context: Mapping[str, Iterable[bytes]], /) -> UserId:
        """Return the user that the certificate names, or raise CREDENTIALS_INVALID."""
        ...

    def claimed(self, auth_context: Mapping[str, Iterable[bytes]], /) -> UserId | None:
        """Return whom the certificate names, be it good or not."""
        ...


@dataclass(slots=True)
class _Wasted:
    """What one client has wasted: so many calls as of a moment, and until when that client is shut out."""

    count: float
    counted_at: float
    out_until: float


@dataclass(slots=True)
class Waste:
    """Counts wasted calls by who wastes them: a user, or the address of a caller whose certificate names none."""

    clock: Callable[[], float] = time.monotonic
    _all: dict[UserId | str, _Wasted] = field(default_factory=dict)

    def is_shut_out(self, who: UserId | str) -> bool:
        """Return whether *who* has wasted too many calls a moment ago."""
        wasted = self._all.get(who)
        return wasted is not None and self.clock() < wasted.out_until

    def note(self, who: UserId | str) -> bool:
        """Count a wasted call. Return whether it shuts *who* out, which starts a new count."""
        now = self.clock()
        wasted = self._all.pop(who, None) or _Wasted(0.0, now, now)
        if len(self._all) >= _REMEMBERED_MAX:
            del self._all[next(iter(self._all))]  # the one who has wasted none for longest
        self._all[who] = wasted
        if now < wasted.out_until:
            return False
        wasted.count = max(0.0, wasted.count - (now - wasted.counted_at) * WASTED_PER_SECOND) + 1
        wasted.counted_at = now
        if wasted.count <= WASTED_MAX:
            return False
        wasted.count, wasted.out_until = 0.0, now + SHUT_OUT_SECONDS
        return True


class Entrance:
    """Lets calls in: by what their callers have wasted, by the limits of connections, and of what is in flight."""

    def __init__(self, identify: Identify, connections: Connections, messages: MessageReader, waste: Waste) -> None:
        self._identify = identify
        self._connections = connections
        self._messages = messages
        self._waste = waste

    def check_open(self, context: Context) -> None:
        """Cancel a call whose connection we have shut, at the least cost: no answer would reach its client."""
        if self._connections.is_shut(peer_of_call(context.peer())):
            raise asyncio.CancelledError

    def caller(self, context: Context) -> tuple[Peer, UserId]:
        """Return who calls, and from where. Raises CREDENTIALS_INVALID; `ShutOutError` for callers who are shut out."""
        self.check_open(context)
        peer = peer_of_call(context.peer())
        try:
            user_id = self._identify(context.auth_context())
        except KmsError:
            self._check(peer, peer.address)
            self._note(peer, None)
            raise
        self._check(peer, user_id)
        return peer, user_id

    def unknown(self, context: Context) -> None:
        """Count a call of a method that does not exist. Raises as `caller`."""
        self._note(*self.caller(context))

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
                    except Exception:  # raised again: a call that was refused was answered; one that was cancelled is wasted
                        is_wasted = False
                        raise
                    is_wasted = False
        finally:
            if is_wasted:
                self._note(peer, user_id)

    @contextmanager
    def stream(self, peer: Peer, user_id: UserId, limit: InFlightLimit) -> Iterator[None]:
        """Hold the places of a stream of requests within the block: there is no one message to wait for. Raises RATE_LIMITED."""
        try:
            with limit.of_user(user_id), self._connections.calling(peer, user_id), limit.of_all():
                yield
        except (asyncio.CancelledError, KmsError):
            self._note(peer, user_id)
            raise

    def _check(self, peer: Peer, who: UserId | str) -> None:
        if self._waste.is_shut_out(who):
            self._connections.shut(peer)
            raise ShutOutError

    def _note(self, peer: Peer, user_id: UserId | None) -> None:
        if self._waste.note(user_id or peer.address):
            _LOG.warning("client shut out", user=str(user_id) if user_id else None, client=peer.address, seconds=SHUT_OUT_SECONDS)
            self._connections.shut(peer)
