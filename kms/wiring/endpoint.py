"""The address on which the service is seen from outside: GET /metrics, /livez and /readyz, over plain HTTP.

A thread answers, so that a scrape delays no call for longer than it computes. Nothing secret is there, and nobody is asked who
he is: it belongs on an address that only monitoring reaches. Whoever else reaches it can take up this address and nothing more:
connections are few, and short.
"""

import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.registry import Collector

from kms.domain.errors import malformed
from kms.domain.text import escaped

Look = Callable[[], tuple[bool, str]]
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_CONNECTIONS_MAX: Final = 16
_CONNECTION_SECONDS: Final = 5.0
_LOG = structlog.get_logger("kms")


class _Handler(WSGIRequestHandler):
    def get_stderr(self) -> StringIO:
        return StringIO()  # where wsgiref would write a traceback: every line of the log is JSON

    def address_string(self) -> str:
        return ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as the library names it
        """Log nothing: a scrape is no event."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Answers a few connections at a time, each until its time is up, whether it is the client that is slow or the answer."""

    daemon_threads = True
    request_queue_size = _CONNECTIONS_MAX
    connection_seconds = _CONNECTION_SECONDS

    def __init__(self, address: Any, handler: type[_Handler]) -> None:  # noqa: ANN401  # as the library has it
        self._open: dict[socket.socket, float] = {}  # with the moment at which its time is up
        self._lock = threading.Lock()  # so that nothing is cut that was closed: its descriptor may be another's by then
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as the library has it
        with self._lock:
            is_full = len(self._open) >= _CONNECTIONS_MAX
            if not is_full:
                self._open[request] = monotonic() + self.connection_seconds
        if is_full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Cut those whose time is up: what their threads read or write ends."""
        with self._lock:
            for request, ends_at in self._open.items():
                if ends_at <= monotonic():
                    with suppress(OSError):  # its client may have ended it
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401  # as the library has it
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask for the host's name
        self.server_name, self.server_port = "kms", 0
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        _LOG.warning("scrape failed", error=type(sys.exception()).__name__)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        return self.socket.accept()[0], ("", 0)  # its clients have no address, and wsgiref looks for one


def endpoint_app(metrics: Collector, *, alive: Look, ready: Look) -> App:
    """Return the application: each look says whether it is well, and the text to answer with 200 or 503."""
    scrape, looks = make_wsgi_app(metrics), {"/livez": alive, "/readyz": ready}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        try:
            if path == "/metrics":
                found: Iterable[bytes] = scrape(environ, start_response)
                return found
            look = looks.get(path)
            if look is None:
                return _answer(start_response, "404 Not Found", "there are /metrics, /livez and /readyz")
            is_well, text = look()
        except Exception:  # a bug here is told to the log, and to whoever scrapes as 500
            _LOG.exception("bug", path=path)
            raise
        return _answer(start_response, "200 OK" if is_well else "503 Service Unavailable", text)

    return app


@contextmanager
def served(address: str | Path, app: App, *, connection_seconds: float = _CONNECTION_SECONDS) -> Iterator[int]:
    """Answer on *address*, `host:port` or the path of a socket to be made, within the block; yield the port (0 for a path).

    At most 16 connections at a time are answered, each for at most *connection_seconds*. Raises MALFORMED where it cannot
    listen there.
    """
    try:
        server = _server(address)
    except OSError as error:
        raise malformed("metrics.listen", f"cannot listen on {address}: {error.strerror or error}") from None
    server.set_app(app)
    server.connection_seconds = connection_seconds
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    try:
        yield 0 if isinstance(address, Path) else int(server.socket.getsockname()[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _server(address: str | Path) -> _Server:
    if isinstance(address, Path):
        address.unlink(missing_ok=True)  # of a worker that was replaced
        return _UnixServer(str(address), _Handler)
    host, _, port = address.rpartition(":")
    kind = _ServerV6 if host.startswith("[") else _Server
    return kind((host.strip("[]"), int(port)), _Handler)


def _answer(start_response: Callable[..., Any], status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [escaped(text, keep="\n").encode() + b"\n"]  # shown by curl in a terminal
