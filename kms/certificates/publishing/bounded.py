"""HTTP for whoever comes: connections are few and short, and requests are small."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from kms.domain.errors import malformed

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_HEADERS_MAX: Final = 64
_FIELD_BYTES_MAX: Final = 4096
_STOP_SECONDS: Final = 1.0
# aiohttp logs each request that it cannot read, with a traceback. Our own bugs are logged by whoever answers.
_UNHEARD: Final = logging.getLogger("kms.publishing.aiohttp")
_UNHEARD.disabled = True


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How many connections may be open at a time, and how long each of them and each answer may take."""

    connections_max: int = 256
    connection_seconds: float = 30.0
    answer_seconds: float = 10.0


class BoundedServer(web.Server):
    """Answers so many connections at a time, each for so long, whatever its client does."""

    def __init__(self, answer: Answer, limits: HttpLimits, request_bytes_max: int) -> None:
        super().__init__(
            answer,
            request_factory=self._bounded_request,
            keepalive_timeout=5.0,
            max_headers=_HEADERS_MAX,
            max_field_size=_FIELD_BYTES_MAX,
            lingering_time=0.0,
            auto_decompress=False,
            access_log=None,
            logger=_UNHEARD,
        )
        self._limits = limits
        self._request_bytes_max = request_bytes_max
        self._ends: dict[RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection. One too many is cut at once."""
        super().connection_made(handler, transport)
        if len(self._ends) >= self._limits.connections_max:
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._ends[handler] = loop.call_later(self._limits.connection_seconds, transport.abort)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        if (end := self._ends.pop(handler, None)) is not None:
            end.cancel()
        super().connection_lost(handler, exc)

    def _bounded_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=self._request_bytes_max)


@asynccontextmanager
async def listening(
    address: str, server: BoundedServer, *, setting: str, shares_port: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen on *address* (`host:port`) within the block, and yield the port. *shares_port*: other workers listen there too.

    Raises MALFORMED, naming the *setting*, where the process cannot listen there.
    """
    host, _, port = address.rpartition(":")
    runner = web.ServerRunner(server, shutdown_timeout=_STOP_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port), reuse_port=shares_port, ssl_context=tls).start()
        except OSError as error:
            raise malformed(setting, f"cannot listen on {address}: {error.strerror or error}") from None
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
