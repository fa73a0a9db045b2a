"""A client of HTTP/2 that calls a method and leaves no room for an answer.

Its flow-control window is zero (RFC 9113 section 5.2).
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE: Final = 4


@contextmanager
def unread(address: str, method: str, *, ca: Path, certificate: Path, key: Path) -> Iterator[None]:
    """Call *method* (`package.Service/Method`) with an empty message, and keep the connection within the block."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/{method}",
        ":authority": host,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain, server_hostname=host) as connection:
        settings = _INITIAL_WINDOW_SIZE.to_bytes(2) + bytes(4)
        block = b"".join(_literal(name) + _literal(value, prefix=b"") for name, value in headers.items())
        connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        connection.sendall(_frame(_HEADERS, _END_HEADERS, 1, block) + _frame(_DATA, _END_STREAM, 1, bytes(5)))
        yield


def _literal(text: str, prefix: bytes = b"\x00") -> bytes:
    """Return a string of a header field that no table has (RFC 7541 section 6.2.2)."""
    return prefix + len(text).to_bytes(1) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload
