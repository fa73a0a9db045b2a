"""The address of the metrics, against clients that keep it busy. What it tells: tests/conformance/test_metrics.py."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prometheus_client import CollectorRegistry

from kms.wiring.descriptors import raise_descriptor_limit
from kms.wiring.endpoint import endpoint_app, served

GET = b"GET /livez HTTP/1.0\r\n\r\n"


@contextmanager
def seen(*, connection_seconds: float) -> Iterator[int]:
    app = endpoint_app(CollectorRegistry(), alive=lambda: (True, "alive"), ready=lambda: (True, "ready"))
    with served("127.0.0.1:0", app, connection_seconds=connection_seconds) as port:
        yield port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def answered(port: int) -> bool:
    """Whether a client that asks has an answer: not where it is closed at once."""
    with connected(port) as client:
        try:
            client.sendall(GET)
            return client.recv(100).startswith(b"HTTP/1.0 200")
        except ConnectionError:
            return False


def until_answered(port: int) -> bool:
    ends_at = time.monotonic() + 5
    while not answered(port):
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.01)
    return True


def test_more_than_sixteen_connections_are_closed_at_once_and_one_that_ends_makes_room() -> None:
    with seen(connection_seconds=60) as port, ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(16)]
        assert not answered(port)
        assert not answered(port)
        silent[0].close()
        assert until_answered(port)


def test_a_client_that_never_comes_to_an_end_is_cut_when_its_time_is_up() -> None:
    with seen(connection_seconds=0.3) as port, connected(port) as slow:
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 60:
                slow.sendall(b"G")  # each byte well within any patience for a single one
                time.sleep(0.05)
        assert 0.3 <= time.monotonic() - began < 30


def test_silent_clients_keep_the_address_no_longer_than_their_time() -> None:
    with seen(connection_seconds=0.3) as port, ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(connected(port))
        assert until_answered(port)


def test_the_limit_of_descriptors_becomes_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
