"""Streams end as they should whatever is under way when they do, seen by a client of a real server."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kms.domain.errors import KmsError, Reason
from kms.rpc.status import abort, status_of
from kms.rpc.streams import sent

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:  # generic in the stubs only
    Handler = grpc.GenericRpcHandler[Any, Any]
else:
    Handler = grpc.GenericRpcHandler


class Streamer(Handler):
    """One method, whose stream is told to end in the middle of its first answer: by draining, or by the check."""

    def __init__(self, *, is_refused: bool) -> None:
        self._is_refused = is_refused

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the one method."""
        return grpc.unary_stream_rpc_method_handler(self._stream)

    async def _stream(self, _: bytes, context: Context) -> None:
        draining, refusing = asyncio.Event(), asyncio.Event()

        async def answers() -> AsyncIterator[Any]:
            (refusing if self._is_refused else draining).set()
            # Written at once; the loop comes to the event before grpc's thread has said that the answer is sent.
            yield b"answer"
            await asyncio.Event().wait()

        async def check() -> None:
            await refusing.wait()
            raise KmsError(Reason.PERMISSION_DENIED, "not any more")

        try:
            await sent(answers(), context, check=check, draining=draining)  # type: ignore[arg-type]  # bytes, not messages
        except KmsError as error:
            await abort(context, status_of(error))


async def outcome(monkeypatch: pytest.MonkeyPatch, *, is_refused: bool) -> tuple[list[bytes], grpc.StatusCode]:
    """Return what a client is sent, and the code with which the stream ends."""
    monkeypatch.setattr("kms.rpc.streams.RECHECK_SECONDS", 0.0)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Streamer(is_refused=is_refused),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream("/test/Stream", bytes, bytes)(b"", timeout=5)
        answers = []
        try:
            async for answer in call:
                answers.append(answer)
        except grpc.aio.AioRpcError:
            pass
        code = await call.code()
    await server.stop(0)
    return answers, code


async def test_a_stream_that_is_drained_while_it_sends_ends_with_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await outcome(monkeypatch, is_refused=False) == ([b"answer"], grpc.StatusCode.OK)


async def test_a_stream_whose_caller_is_refused_while_it_sends_ends_with_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await outcome(monkeypatch, is_refused=True) == ([b"answer"], grpc.StatusCode.PERMISSION_DENIED)
