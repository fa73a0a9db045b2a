"""What every call passes: request id, identity, limits, decoding, permission, deadline, errors; one log line, count and span.

    headers ──▶ who calls, may they call now? ──▶ message ──▶ admitted, permitted? ──▶ servicer ──▶ answer or error

The call begins with its headers: its deadline runs, and it counts for its user, before its message is there. grpc.aio by itself
answers bytes that do not parse with INTERNAL and sends the text of any exception to the client, so decoding and errors are
handled here and nowhere else. A stream of answers passes the same, and as long as it lasts we check its caller again and again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from kms.app.access import Access
from kms.app.keyring import refused_key
from kms.app.ports import Call, Ledger, Stranger
from kms.domain.errors import INTERNAL, KmsError, Reason
from kms.domain.ids import UserId
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
_CALL: ContextVar[Call] = ContextVar("call")
_LOG = structlog.get_logger("kms.rpc")
T = TypeVar("T")


def current() -> Call:
    """Return the call being handled: who makes it, its id, and where from."""
    return _CALL.get()


def caller() -> UserId:
    """Return who makes the call being handled."""
    return _CALL.get().user.user_id


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of ours as grpc found it: it gives one answer, or a stream of them."""

    name: str
    decode: Callable[[bytes], Message]
    call: Callable[[Message, Context], Any]


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
        self._streams = InFlightLimit("streams", STREAMS_PER_USER_MAX, STREAMS_MAX)
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
                    method, context, self._calls, seconds, lambda body: method.call(decoded(method.decode, body), context)
                )

        async def stream(_: object, context: Context) -> None:
            self._entrance.check_open(context)
            seconds = seconds_left(context, STREAM_SECONDS_MAX)
            await self._guarded(method, context, self._streams, seconds, lambda body: self._stream(method, body, context))

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
        self, method: _Method, context: Context, limit: InFlightLimit, seconds: float, act: Callable[[bytes], Awaitable[T]]
    ) -> T:
        """Return what *act* returns for a caller who may make the call, or end the call with an error."""
        request_id = request_id_of(context)
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        structlog.contextvars.bind_contextvars(request_id=request_id)  # grpc handles each call in a context of its own
        began = time.monotonic()
        refusal: status_pb2.Status
        try:
            async with asyncio.timeout(seconds):
                response = await self._admitted(method, context, limit, request_id, act)
        except ShutOutError:
            return await abort(context, SHUT_OUT)
        except TimeoutError:
            reason, refusal = _refused(KmsError(Reason.DEADLINE_EXCEEDED, "the call took longer than it may"))
        except KmsError as error:
            reason, refusal = _refused(error)
        except asyncio.CancelledError:
            self._end(method.name, request_id, began, CANCELLED)
            raise
        except Exception:  # noqa: BLE001 - the boundary: a bug is logged here and told as "internal error"
            _LOG.exception("bug", method=method.name)
            reason, refusal = INTERNAL, internal_status(request_id)
        else:
            self._end(method.name, request_id, began, "OK")
            return response
        self._end(method.name, request_id, began, reason)
        self._note(method.name, context, request_id, reason)
        return await abort(context, refusal)

    async def _admitted(
        self, method: _Method, context: Context, limit: InFlightLimit, request_id: str, act: Callable[[bytes], Awaitable[T]]
    ) -> T:
        """Return what *act* returns for the message of the call. Raises what keeps its caller from making it, now or at all."""
        peer, user_id = self._entrance.caller(context)
        if (known := limit.over_limit_user(user_id)) is not None:
            _CALL.set(Call(known, request_id, peer.address))  # the refusal of a user we know is theirs in the trail
        async with self._entrance.message(context, peer, user_id, limit) as body:
            user = await self._access.admit(user_id, recent=method.name.startswith(_RECENT_WILL_DO))
            limit.know(user)
            _CALL.set(Call(user, request_id, peer.address))
            check_permitted(user.permissions, method.name)
            return await act(body)

    async def _stream(self, method: _Method, body: bytes, context: Context) -> None:
        async def check() -> None:
            user = await self._access.admit(self._identify(context.auth_context()))
            check_permitted(user.permissions, method.name)

        await sent(method.call(decoded(method.decode, body), context), context, check=check, draining=self._draining)

    def _note(self, method: str, context: Context, request_id: str, reason: str) -> None:
        who = _CALL.get(None) or self._stranger(context, request_id)
        self._ledger.note_refusal(who, method.rpartition("/")[2], refused_key(reason), reason)

    def _note_bystander(self, method: str, context: Context, error: KmsError) -> None:
        self._ledger.note_refusal(self._stranger(context, request_id_of(context)), method.rpartition("/")[2], None, error.reason)

    def _stranger(self, context: Context, request_id: str) -> Stranger:
        return Stranger(request_id, peer_of_call(context.peer()).address, self._identify.claimed(context.auth_context()))

    def _end(self, method: str, request_id: str, began: float, outcome: str) -> None:
        call, seconds = _CALL.get(None), time.monotonic() - began
        self._telemetry.ended(method, outcome, CODE_NAMES[outcome], request_id, seconds)
        _LOG.info(
            "call",
            method=method,
            outcome=outcome,
            user=str(call.user.user_id) if call else None,
            milliseconds=round(seconds * 1000, 2),
        )


def _refused(error: KmsError) -> tuple[str, status_pb2.Status]:
    return error.reason, status_of(error)
