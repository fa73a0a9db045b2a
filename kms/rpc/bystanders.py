"""Health and reflection: services of grpc's own, for whoever has a good certificate, in a room of their own.

They go on without the database, so the certificate alone decides: authority, validity, revocation, form of the name.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.rpc.status import abort, status_of
from kms.rpc.streams import begin, first

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:  # generic in the stubs only
    MethodHandler = grpc.RpcMethodHandler[Any, Any]
else:
    MethodHandler = grpc.RpcMethodHandler

Note = Callable[[str, Context, KmsError], None]

BYSTANDERS_MAX: Final = 64
_STREAM_SECONDS_MAX: Final = 3600.0


class Identify(Protocol):
    """Finds who calls from what TLS knows of the peer, `grpc.ServicerContext.auth_context()`."""

    def __call__(self, auth_context: Mapping[str, Iterable[bytes]], /) -> UserId:
        """Return the user that the certificate names, or raise CREDENTIALS_INVALID."""
        ...

    def claimed(self, auth_context: Mapping[str, Iterable[bytes]], /) -> UserId | None:
        """Return whom the certificate names, be it good or not."""
        ...


class Bystanders:
    """Guards methods that are not ours. *note* is told of each refusal, with the method's name.

    Their streams end when *draining* is set.
    """

    def __init__(self, identify: Identify, note: Note, draining: asyncio.Event) -> None:
        self._identify = identify
        self._note = note
        self._draining = draining
        self._present = 0

    def guarded(self, name: str, handler: MethodHandler) -> MethodHandler:
        """Return *handler* behind the check of the certificate and the limit of their number and duration."""
        inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream or handler.stream_unary
        forms = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}

        async def answer(request: Any, context: Context) -> Any:  # noqa: ANN401 - a message of grpc's own services
            try:
                with self._admitted(context):
                    return await inner(request, context)
            except KmsError as error:
                self._note(name, context, error)
                return await abort(context, status_of(error))

        async def stream(request: Any, context: Context) -> None:  # noqa: ANN401 - as above
            try:
                with self._admitted(context):
                    async with asyncio.timeout(_STREAM_SECONDS_MAX):
                        await begin(context)
                        await first(_written(inner(request, context), context), self._drained())
            except TimeoutError:
                late = KmsError(Reason.DEADLINE_EXCEEDED, "the stream has lasted long enough; open another")
                await abort(context, status_of(late))
            except KmsError as error:
                self._note(name, context, error)
                await abort(context, status_of(error))

        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(answer, **forms)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(stream, **forms)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(stream, **forms)
        raise TypeError("a method that takes a stream and gives one answer is not expected here")

    async def _drained(self) -> None:
        await self._draining.wait()

    @contextmanager
    def _admitted(self, context: Context) -> Iterator[None]:
        self._identify(context.auth_context())
        if self._present >= BYSTANDERS_MAX:
            raise KmsError(Reason.RATE_LIMITED, f"{BYSTANDERS_MAX} calls of health and reflection are there already")
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1


async def _written(answer: Any, context: Context) -> None:  # noqa: ANN401 - grpc's services stream in two ways
    """Send what *answer* yields, or let it send what it writes itself."""
    if not isinstance(answer, AsyncIterator):
        await answer
        return
    async for message in answer:
        await context.write(message)
