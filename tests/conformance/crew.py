"""Servers of one deployment that are killed and come back on the same port."""

import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.fixtures import fork_server
from tests.fixtures.fork_server import Process
from tests.fixtures.server import Deployment

START_SECONDS = 100.0


@dataclass(slots=True)
class Member:
    """A server. Its process changes when it was killed."""

    deployment: Deployment
    number: int
    port: int
    process: Process
    starts: int = 1

    @property
    def is_serving(self) -> bool:
        """Whether the process has got as far as serving."""
        return self._log().count('"event": "serving"') >= self.starts

    @property
    def address(self) -> str:
        """Where it listens, also after it was killed."""
        return f"127.0.0.1:{self.port}"

    def await_serving(self) -> None:
        """Wait until it serves."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_serving:
            assert self.process.poll() is None, self._log()
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.05)

    def _log(self) -> str:
        return (self.deployment.directory / f"member-{self.number}.log").read_text()

    def kill(self) -> None:
        """Kill the process without warning."""
        self.process.kill()
        self.process.wait()

    def begin_again(self) -> None:
        """Start another process in its place; it needs a while until it serves."""
        self.process = _process(self.deployment, self.number, self.port)
        self.starts += 1

    def stop(self) -> None:
        """Ask the process to end, which it must do without an error."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0


@contextmanager
def crew(deployment: Deployment, count: int) -> Iterator[list[Member]]:
    """Run *count* servers of *deployment*."""
    members: list[Member] = []
    try:
        for number in range(count):
            port = _free_port()
            members.append(Member(deployment, number, port, _process(deployment, number, port)))
        for member in members:
            member.await_serving()
        yield members
        for member in members:
            member.await_serving()
            member.stop()
    finally:
        for member in members:
            member.kill()


def _free_port() -> int:
    """Return a port below those that the system gives to clients: a client that calls in vain could have it as its own."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _process(deployment: Deployment, number: int, port: int) -> Process:
    config_file = deployment.directory / f"member-{number}.toml"
    text = deployment.config_file.read_text()
    config_file.write_text(text.replace('[server]\nlisten = "127.0.0.1:0"', f'[server]\nlisten = "127.0.0.1:{port}"'))
    with (deployment.directory / f"member-{number}.log").open("ab") as log:
        return fork_server.kms(["--config", str(config_file), "serve"], deployment.environment, stdout=log, stderr=log)
