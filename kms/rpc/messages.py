"""The message of a call that has one: when it must be there, and how many calls may wait for theirs.

grpc.aio starts the handler of a single request only when the message is there. Our handlers start with the headers, as those of
streams do, and read the message here. On the wire there is no difference.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError

from kms.domain.errors import KmsError, Reason, malformed

Context = grpc.aio.ServicerContext[Any, Any]

_CANCEL_SECONDS: Final = 0.05
T = TypeVar("T")


class MessageReader:
    """Reads messages, for the calls of all users. Only the event loop uses it."""

    def __init__(self, seconds_max: float, waiting_max: int) -> None:
        """Let each message take *seconds_max*, and *waiting_max* calls wait for theirs at a time."""
        self._seconds_max = seconds_max
        self._waiting_max = waiting_max
        self._waiting: dict[asyncio.Timeout, None] = {}  # the first has waited longest

    async def read(self, context: Context) -> bytes:
        """Return the message of a call, or raise DEADLINE_EXCEEDED, MALFORMED if there is none, or RATE_LIMITED.

        If too many calls wait, the one that has waited longest is refused: an honest client sends its message with the headers.
        """
        if len(self._waiting) >= self._waiting_max:
            longest = next(iter(self._waiting))
            del self._waiting[longest]
            if not longest.expired():
                longest.reschedule(asyncio.get_running_loop().time())
        timeout = asyncio.timeout(self._seconds_max)
        try:
            async with timeout:
                self._waiting[timeout] = None
                message = await context.read()
        except TimeoutError:
            if timeout not in self._waiting:
                reason = f"{self._waiting_max} newer calls wait for their messages"
                raise KmsError(Reason.RATE_LIMITED, reason) from None
            reason = f"the message of the request did not arrive within {self._seconds_max:g} seconds"
            raise KmsError(Reason.DEADLINE_EXCEEDED, reason) from None
        finally:
            self._waiting.pop(timeout, None)
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs leave it out
            # A client that has cancelled looks the same for a moment; then its cancellation ends this sleep.
            await asyncio.sleep(_CANCEL_SECONDS)
            raise malformed("request", "expected one message")
        return bytes(message)


def decoded(decode: Callable[[bytes], T], body: bytes) -> T:
    """Return the message in *body*, or raise MALFORMED: grpc itself would answer INTERNAL to bytes that do not parse."""
    try:
        return decode(body)
    except DecodeError:
        raise malformed("request", "expected a protocol buffer of the request's type, with UTF-8 in its strings") from None
