"""A client of HTTP/2 that does what no library does: calls without messages, streams over the limit, pings, silence.

It answers what the server asks of its connection (settings, pings), and notes what the server says of each stream.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kms.domain.ids import UserId, identity_uri
from tests.fixtures.server import DEPLOYMENT, Deployment

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _CONTINUATION = 0, 1, 3, 4, 6, 7, 9
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_CANCEL: Final = 8
_FRAME_HEADER_BYTES: Final = 9


@dataclass(slots=True)
class RawConnection:
    """A connection. `ended` has what ended each stream: the bytes of its last HEADERS, or the code of its RST_STREAM."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: dict[int, bytes | int] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    pings_answered: int = 0
    goaway: bytes = b""
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _next_stream: int = 1

    def call(self, method: str, message: bytes | None = None, *, is_last: bool = False) -> int:
        """Begin a call of *method* (`package.Service/Method`) and return its stream; send *message* if there is one."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        headers = {
            ":method": "POST",
            ":scheme": "https",
            ":path": f"/{method}",
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers.items())
        self._send(_HEADERS, _END_HEADERS | (_END_STREAM if is_last else 0), stream, block)
        if message is not None:
            self.data(stream, b"\x00" + len(message).to_bytes(4) + message, is_last=True)
        return stream

    def data(self, stream: int, payload: bytes, *, is_last: bool = False) -> None:
        """Send a part of a message."""
        self._send(_DATA, _END_STREAM if is_last else 0, stream, payload)

    def reset(self, stream: int) -> None:
        """Cancel a call."""
        self._send(_RST_STREAM, 0, stream, _CANCEL.to_bytes(4))

    def ping(self) -> None:
        """Send a ping."""
        self._send(_PING, 0, 0, bytes(8))

    async def read(self) -> None:
        """Read what the server sends until the connection ends."""
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                header = await self.reader.readexactly(_FRAME_HEADER_BYTES)
                payload = await self.reader.readexactly(int.from_bytes(header[:3]))
                self._take(header[3], header[4], int.from_bytes(header[5:]), payload)
        self.closed.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self._send(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and flags & _ACK:
            self.pings_answered += 1
        elif kind == _PING:
            self._send(_PING, _ACK, 0, payload)
        elif kind == _GOAWAY:
            self.goaway = payload
        elif kind == _RST_STREAM:
            self.ended.setdefault(stream, int.from_bytes(payload))
        elif kind == _HEADERS and flags & _END_STREAM:
            self.ended[stream] = payload
        elif kind == _DATA:
            self.answered.add(stream)

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        frame = len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload
        if not self.closed.is_set():
            self.writer.write(_PREFACE + frame if kind == _SETTINGS and not flags else frame)

    def greet(self) -> None:
        """Send what begins a connection."""
        self._send(_SETTINGS, 0, 0, b"")


class RawClient:
    """Opens connections with the certificate of one user."""

    def __init__(self, deployment: Deployment, address: str, user_id: UserId, deployment_id: str) -> None:
        directory = deployment.directory
        certificate, key = (directory / f"raw-{user_id}.{kind}" for kind in ("crt", "key"))
        if not certificate.exists():
            deployment.certificate(identity_uri(deployment_id, user_id)).write(certificate, key)
        self._context = _tls(directory / "authority.crt", certificate, key)
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._reading: set[asyncio.Task[None]] = set()
        self.connections: list[RawConnection] = []

    async def connect(self, source: str = "127.0.0.1") -> RawConnection:
        """Open a connection from the address *source*. Raises OSError where the server does not take it."""
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._context, server_hostname="localhost", local_addr=(source, 0)
        )
        connection = RawConnection(reader, writer)
        connection.greet()
        self.connections.append(connection)
        task = asyncio.create_task(connection.read())
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return connection

    async def connect_many(self, count: int, source: str = "127.0.0.1") -> list[RawConnection]:
        """Open *count* connections one after the other, those that the server takes."""
        opened = []
        for _ in range(count):
            with suppress(OSError):
                opened.append(await self.connect(source))
        return opened

    async def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            connection.writer.transport.abort()
        for task in list(self._reading):
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)


@asynccontextmanager
async def raw_client(
    deployment: Deployment, address: str, user_id: UserId, deployment_id: str = DEPLOYMENT
) -> AsyncIterator[RawClient]:
    """A client whose connections are closed after the block."""
    client = RawClient(deployment, address, user_id, deployment_id)
    try:
        yield client
    finally:
        await client.close()


def _tls(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def _text(text: str) -> bytes:
    """Return a string as HPACK has it, of less than 127 bytes and without Huffman's code (RFC 7541 section 5.2)."""
    return len(text).to_bytes(1) + text.encode()
