"""What every call passes: request id, identity, limits, decoding, permission, deadline, errors; one log line, count and span.

    headers ──▶ who calls, may they call now? ──▶ message ──▶ admitted, permitted? ──▶ servicer ──▶ answer or error

The call begins with its headers: its deadline runs, and it counts for its user, before its message is there. grpc.aio by itself
answers bytes that do not parse with INTERNAL and sends the text of any exception to the client, so decoding and errors are
handled here and nowhere else. A stream of answers passes the same, and as long as it lasts we check its caller again and again.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from kms.app.access import Access
from kms.app.ports import Call, Ledger, Stranger, User
from kms.domain.errors import INTERNAL, KmsError, Reason, key_of
from kms.domain.ids import KeyId
from kms.domain.permissions import check_permitted
from kms.rpc.bystanders import Bystanders
from kms.rpc.connections import Connections
from kms.rpc.entrance import SHUT_OUT, Entrance, Identify, ShutOutError, Waste
from kms.rpc.headers import REQUEST_ID, request_id_of, seconds_left
from kms.rpc.limits import CallLimits, InFlightLimit
from kms.rpc.messages import MessageReader, decoded
from kms.rpc.peers import peer_of_call
from kms.rpc.status import CODE_NAMES, abort, internal_status, status_of
from kms.rpc.streams import sent
from kms.rpc.transport import STREAM_SECONDS_MAX
from kms.telemetry import Telemetry

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:  # generic in the stubs only
    MethodHandler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    MethodHandler = grpc.RpcMethodHandler
    Interceptor = grpc.aio.ServerInterceptor

OURS: Final = "/kms.v1."
CANCELLED: Final = "CANCELLED"
STREAMS_MAX: Final = 8
STREAMS_PER_USER_MAX: Final = 4
# Their charge looks at the caller again, or nothing is recorded of them: who he was a moment ago will do.
_RECENT_WILL_DO: Final = ("CryptoService/", "KeyService/GetPublicKey")
_UNIMPLEMENTED: Final = status_pb2.Status(code=code_pb2.UNIMPLEMENTED, message="there is no method of this name here")
_LOG = structlog.get_logger("kms.rpc")
T = TypeVar("T")


@dataclass(slots=True)
class _Progress:
    """What is known of a call while it is handled. `call` is there once its user is."""

    method: str
    context: Context
    request_id: str
    began: float = field(default_factory=time.monotonic)
    call: Call | None = None

    def know(self, user: User, address: str) -> Call:
        """Note who calls, and return the call."""
        self.call = Call(user, self.request_id, address, self.method)
        return self.call


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of ours as grpc found it: it gives one answer, or a stream of them."""

    name: str
    decode: Callable[[bytes], Message]
    call: Callable[[Message, Call], Any]


class Edge(Interceptor):
    """Wraps every method: ours, and health and reflection, which ask for a certificate that is good and for no more."""

    def __init__(
        self,
        identify: Identify,
        access: Access,
        ledger: Ledger,
        telemetry: Telemetry,
        connections: Connections,
        limits: CallLimits,
    ) -> None:
        self._identify = identify
        self._access = access
        self._ledger = ledger
        self._telemetry = telemetry
        self._call_seconds_max = limits.call_seconds_max
        waste = Waste()
        messages, checks = (MessageReader(limits.message_seconds_max, waiting_max=limits.calls_max) for _ in range(2))
        self._entrance = Entrance(identify, connections, messages, waste)
        self._calls = InFlightLimit("calls", limits.calls_per_user_max, limits.calls_max)
        # Each method has its own: anybody may watch a rotation, and that must leave auditors their places.
        self._streams = defaultdict[str, InFlightLimit](lambda: InFlightLimit("streams", STREAMS_PER_USER_MAX, STREAMS_MAX))
        self._draining = asyncio.Event()
        entrance = Entrance(identify, connections, checks, waste)
        self._bystanders = Bystanders(self._note_bystander, self._draining, entrance)

    def end_streams(self) -> None:
        """End the streams, which would go on, as if they had said all: the server is about to stop."""
        self._draining.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[MethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> MethodHandler:
        """Return the handler, wrapped if it is ours, or one that answers UNIMPLEMENTED."""
        handler: MethodHandler | None = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_unary_rpc_method_handler(self._unknown)
        if not handler_call_details.method.startswith(OURS):
            return self._bystanders.guarded(handler_call_details.method, handler)
        decode, inner = handler.request_deserializer, handler.unary_unary or handler.unary_stream
        if decode is None or inner is None:
            raise TypeError(f"{handler_call_details.method} takes a stream, and the edge knows single requests only")
        method = _Method(handler_call_details.method.removeprefix(OURS), decode, cast(Any, inner))

        async def answer(_: object, context: Context) -> Message:
            self._entrance.check_open(context)
            seconds = seconds_left(context, self._call_seconds_max)
            with self._telemetry.spans.call(method.name, context.invocation_metadata() or ()):
                return await self._guarded(
                    method, context, self._calls, seconds, lambda body, call: method.call(decoded(method.decode, body), call)
                )

        async def stream(_: object, context: Context) -> None:
            self._entrance.check_open(context)
            seconds = seconds_left(context, STREAM_SECONDS_MAX)
            limit = self._streams[method.name]
            await self._guarded(method, context, limit, seconds, lambda body, call: self._stream(method, body, call, context))

        # Handlers of streams of requests begin with the headers. `MessageReader` reads the one message.
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)
        return grpc.stream_stream_rpc_method_handler(stream, response_serializer=handler.response_serializer)

    async def _unknown(self, _: object, context: Context) -> Message:
        try:
            self._entrance.unknown(context)
        except ShutOutError:
            return await abort(context, SHUT_OUT)
        except KmsError as error:
            return await abort(context, status_of(error))
        return await abort(context, _UNIMPLEMENTED)

    async def _guarded(
        self,
        method: _Method,
        context: Context,
        limit: InFlightLimit,
        seconds: float,
        act: Callable[[bytes, Call], Awaitable[T]],
    ) -> T:
        """Return what *act* returns for a caller who may make the call, or end the call with an error."""
        progress = _Progress(method.name, context, request_id_of(context))
        context.set_trailing_metadata(((REQUEST_ID, progress.request_id),))
        # grpc handles each call in a context of its own.
        structlog.contextvars.bind_contextvars(request_id=progress.request_id)
        try:
            async with asyncio.timeout(seconds):
                response = await self._admitted(progress, limit, act)
        except ShutOutError:
            return await abort(context, SHUT_OUT)
        except TimeoutError:
            error: Exception = KmsError(Reason.DEADLINE_EXCEEDED, "the call took longer than it may")
        except asyncio.CancelledError:
            self._end(progress, CANCELLED)
            raise
        except KmsError as refusal:
            error = refusal
        except Exception as bug:  # noqa: BLE001 - the boundary: a bug is logged here and told as "internal error"
            _LOG.exception("bug", method=method.name)
            error = bug
        else:
            self._end(progress, "OK")
            return response
        return await self._refused(progress, error)

    async def _refused(self, progress: _Progress, error: Exception) -> NoReturn:
        """End the call with *error*: a `KmsError`, or a bug."""
        reason, status = INTERNAL, internal_status(progress.request_id)
        if isinstance(error, KmsError):
            reason, status = error.reason, status_of(error)
        key = key_of(error)
        key_id = None if key is None else KeyId(key)
        self._end(progress, reason)
        who = progress.call or self._stranger(progress.context, progress.request_id)
        self._ledger.note_refusal(who, progress.method.rpartition("/")[2], key_id, reason)
        await abort(progress.context, status)

    async def _admitted(self, progress: _Progress, limit: InFlightLimit, act: Callable[[bytes, Call], Awaitable[T]]) -> T:
        """Return what *act* returns for the message of the call. Raises what keeps its caller from making it, now or at all."""
        peer, user_id = self._entrance.caller(progress.context)
        if (known := limit.over_limit_user(user_id)) is not None:
            progress.know(known, peer.address)  # the trail names a user whom we know, also in a refusal
        async with self._entrance.message(progress.context, peer, user_id, limit) as body:
            user = await self._access.admit(user_id, recent=progress.method.startswith(_RECENT_WILL_DO))
            limit.know(user)
            call = progress.know(user, peer.address)
            check_permitted(user.permissions, progress.method)
            return await act(body, call)

    async def _stream(self, method: _Method, body: bytes, call: Call, context: Context) -> None:
        async def check() -> None:
            user = await self._access.admit(self._identify(context.auth_context()))
            check_permitted(user.permissions, method.name)

        await sent(method.call(decoded(method.decode, body), call), context, check=check, draining=self._draining)

    def _note_bystander(self, method: str, context: Context, error: KmsError) -> None:
        self._ledger.note_refusal(self._stranger(context, request_id_of(context)), method.rpartition("/")[2], None, error.reason)

    def _stranger(self, context: Context, request_id: str) -> Stranger:
        return Stranger(request_id, peer_of_call(context.peer()).address, self._identify.claimed(context.auth_context()))

    def _end(self, progress: _Progress, outcome: str) -> None:
        seconds = time.monotonic() - progress.began
        self._telemetry.ended(progress.method, outcome, CODE_NAMES[outcome], progress.request_id, seconds)
        _LOG.info(
            "call",
            method=progress.method,
            outcome=outcome,
            user=str(progress.call.user.user_id) if progress.call else None,
            milliseconds=round(seconds * 1000, 2),
        )
