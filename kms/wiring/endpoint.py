"""The address on which the service is seen from outside: GET /metrics, /livez and /readyz, over plain HTTP.

A thread answers, so that a scrape delays no call for longer than it computes. Nothing secret is there, and nobody is asked who
he is: it belongs on an address that only monitoring reaches.
"""

import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from kms.domain.errors import malformed
from kms.telemetry import Telemetry
from kms.wiring.condition import Condition, ConditionCollector
from kms.wiring.jobs import repeating

Look = Callable[[], tuple[bool, str]]
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_PATIENCE_SECONDS: Final = 10.0
_PULSE_SECONDS: Final = 1.0
_STILL_SECONDS_MAX: Final = 10.0
_LOG = structlog.get_logger("kms")


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_SECONDS  # for a client that connects and says nothing

    def address_string(self) -> str:
        return ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as the library names it
        """Log nothing: a scrape is no event."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask for the host's name
        self.server_name, self.server_port = "kms", 0
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX


def endpoint_app(metrics: Collector, *, alive: Look, ready: Look) -> App:
    """Return the application: each look says whether it is well, and the text to answer with 200 or 503."""
    scrape = make_wsgi_app(metrics)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            found: Iterable[bytes] = scrape(environ, start_response)
            return found
        look = {"/livez": alive, "/readyz": ready}.get(path)
        if look is None:
            return _answer(start_response, "404 Not Found", "there are /metrics, /livez and /readyz")
        is_well, text = look()
        return _answer(start_response, "200 OK" if is_well else "503 Service Unavailable", text)

    return app


@asynccontextmanager
async def seen(address: str | Path | None, telemetry: Telemetry, condition: Condition) -> AsyncIterator[None]:
    """Let the process be seen on *address* (see `served`) within the block; None: it is not seen."""
    if address is None:
        yield
        return
    telemetry.registry.register(ConditionCollector(condition))
    ProcessCollector(registry=telemetry.registry)
    pulse = _Pulse()
    app = endpoint_app(telemetry.registry, alive=pulse.look, ready=condition.look)
    async with repeating("pulse", _PULSE_SECONDS, pulse.beat):
        with served(address, app) as port:
            _LOG.info("seen from outside", address=str(address), port=port)
            yield


class _Pulse:
    """Whether the event loop turns: it says so every second, and a thread that still answers is no sign of it."""

    def __init__(self) -> None:
        self._beaten_at = monotonic()

    async def beat(self) -> None:
        self._beaten_at = monotonic()

    def look(self) -> tuple[bool, str]:
        is_alive = monotonic() - self._beaten_at < _STILL_SECONDS_MAX
        return is_alive, "alive" if is_alive else f"nothing has moved for {_STILL_SECONDS_MAX:.0f} seconds"


@contextmanager
def served(address: str | Path, app: App) -> Iterator[int]:
    """Answer on *address*, `host:port` or the path of a socket to be made, within the block; yield the port (0 for a path).

    Raises MALFORMED where it cannot listen there.
    """
    try:
        server = _server(address)
    except OSError as error:
        raise malformed("metrics.listen", f"cannot listen on {address}: {error.strerror or error}") from None
    server.set_app(app)
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
        return _UnixServer(str(address), _Handler)  # type: ignore[arg-type]  # a path is an address too
    host, _, port = address.rpartition(":")
    kind = _ServerV6 if host.startswith("[") else _Server
    return kind((host.strip("[]"), int(port)), _Handler)


def _answer(start_response: Callable[..., Any], status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode() + b"\n"]
