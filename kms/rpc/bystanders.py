"""Health and reflection: services of grpc's own, for whoever has a good certificate, with limits of their own.

They go on without the database, so the certificate alone decides: authority, validity, revocation, form of the name. Three
groups of methods share no places: Check and List, which answer at once; Watch; and reflection.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final

import grpc

from kms.domain.errors import KmsError, Reason
from kms.rpc.entrance import SHUT_OUT, Entrance, ShutOutError
from kms.rpc.limits import InFlightLimit
from kms.rpc.messages import decoded
from kms.rpc.status import abort, status_of
from kms.rpc.streams import begin, first
from kms.rpc.transport import STREAM_SECONDS_MAX

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:  # generic in the stubs only
    MethodHandler = grpc.RpcMethodHandler[Any, Any]
else:
    MethodHandler = grpc.RpcMethodHandler

Note = Callable[[str, Context, KmsError], None]

CHECKS_PER_USER_MAX: Final = 16
WATCHES_PER_USER_MAX: Final = 4
REFLECTIONS_PER_USER_MAX: Final = 4
_CHECKS_MAX: Final = 1024
_WATCHES_MAX: Final = 64
_REFLECTIONS_MAX: Final = 64
_REFLECTION_SECONDS_MAX: Final = 60.0


class Bystanders:
    """Guards methods that are not ours. *note* is told of each refusal, with the method's name.

    Their streams end when *draining* is set.
    """

    def __init__(self, note: Note, draining: asyncio.Event, entrance: Entrance) -> None:
        self._note = note
        self._draining = draining
        self._entrance = entrance
        self._checks = InFlightLimit("calls of health", CHECKS_PER_USER_MAX, _CHECKS_MAX)
        self._watches = InFlightLimit("streams of health", WATCHES_PER_USER_MAX, _WATCHES_MAX)
        self._reflections = InFlightLimit("streams of reflection", REFLECTIONS_PER_USER_MAX, _REFLECTIONS_MAX)

    def guarded(self, name: str, handler: MethodHandler) -> MethodHandler:
        """Return *handler* after a check of the certificate, of the number of calls, and of their duration."""
        if handler.unary_unary is not None:
            return self._check(name, handler)
        if handler.unary_stream is not None:
            return self._watch(name, handler)
        if handler.stream_stream is not None:
            return self._reflection(name, handler)
        raise TypeError("a method that takes a stream and gives one answer is not expected here")

    def _check(self, name: str, handler: MethodHandler) -> MethodHandler:
        decode, inner = _parts(handler)

        async def answer(_: object, context: Context) -> Any:  # noqa: ANN401 - a message of grpc's own services
            try:
                async with self._message(context, self._checks) as message:
                    return await inner(decoded(decode, message), context)
            except ShutOutError:
                return await abort(context, SHUT_OUT)
            except KmsError as error:
                self._note(name, context, error)
                return await abort(context, status_of(error))

        return grpc.stream_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    def _watch(self, name: str, handler: MethodHandler) -> MethodHandler:
        decode, inner = _parts(handler)

        async def stream(_: object, context: Context) -> None:
            async with self._message(context, self._watches) as message:
                await self._lasting(inner(decoded(decode, message), context), context, STREAM_SECONDS_MAX)

        return self._stream(name, stream, response_serializer=handler.response_serializer)

    def _reflection(self, name: str, handler: MethodHandler) -> MethodHandler:
        decode, inner = _parts(handler)

        async def stream(bodies: AsyncIterator[bytes], context: Context) -> None:
            with self._entrance.stream(*self._entrance.caller(context), self._reflections):
                requests = (decoded(decode, body) async for body in bodies)
                await self._lasting(inner(requests, context), context, _REFLECTION_SECONDS_MAX)

        return self._stream(name, stream, response_serializer=handler.response_serializer)

    def _stream(
        self,
        name: str,
        stream: Callable[[AsyncIterator[bytes], Context], Awaitable[None]],
        *,
        response_serializer: Callable[[Any], bytes] | None,
    ) -> MethodHandler:
        async def refusing(bodies: AsyncIterator[bytes], context: Context) -> None:
            try:
                await stream(bodies, context)
            except ShutOutError:
                await abort(context, SHUT_OUT)
            except KmsError as error:
                self._note(name, context, error)
                await abort(context, status_of(error))

        return grpc.stream_stream_rpc_method_handler(refusing, response_serializer=response_serializer)

    async def _lasting(self, answer: Any, context: Context, seconds_max: float) -> None:  # noqa: ANN401 - as `_written`
        try:
            async with asyncio.timeout(seconds_max):
                await begin(context)
                await first(_written(answer, context), self._drained())
        except TimeoutError:
            late = KmsError(Reason.DEADLINE_EXCEEDED, "the stream has lasted long enough; open another")
            await abort(context, status_of(late))

    async def _drained(self) -> None:
        await self._draining.wait()

    def _message(self, context: Context, limit: InFlightLimit) -> AbstractAsyncContextManager[bytes]:
        return self._entrance.message(context, *self._entrance.caller(context), limit)


def _parts(handler: MethodHandler) -> tuple[Callable[[bytes], Any], Any]:
    decode: Any = handler.request_deserializer
    return decode, handler.unary_unary or handler.unary_stream or handler.stream_stream


async def _written(answer: Any, context: Context) -> None:  # noqa: ANN401 - grpc's services stream in two ways
    """Send what *answer* yields, or let it send what it writes itself."""
    if not isinstance(answer, AsyncIterator):
        await answer
        return
    async for message in answer:
        await context.write(message)
