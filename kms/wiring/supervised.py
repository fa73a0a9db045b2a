"""How a service is told to end, and a worker's end of the connection to its supervisor."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from kms.wiring.control import Order, Refusal, Report


class Stopping:
    """The way to the end: calls in flight are waited for, unless it is hurried. Both can be asked for many times."""

    def __init__(self) -> None:
        self.is_draining = asyncio.Event()
        self.is_hurried = asyncio.Event()

    def drain(self) -> None:
        """Take no new call."""
        self.is_draining.set()

    def hurry(self) -> None:
        """Take no new call, and give up those in flight."""
        self.is_draining.set()
        self.is_hurried.set()

    def insist(self) -> None:
        """Drain; when asked again, hurry."""
        if self.is_draining.is_set():
            self.is_hurried.set()
        self.is_draining.set()


class Supervised:
    """Worker *number*, from 1, as it speaks with its supervisor, and the socket on which it is seen."""

    def __init__(self, connection: Connection, number: int, metrics: Path | None) -> None:
        self.number = number
        self.metrics = metrics
        self._connection = connection
        self._log_status: Callable[[], None] | None = None

    @property
    def has_served(self) -> bool:
        """Whether the worker has come so far as to serve."""
        return self._log_status is not None

    def attend(self, stopping: Stopping) -> None:
        """Follow orders on the running event loop from now on; drain when the supervisor is gone."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._obey, stopping)

    def serving(self, log_status: Callable[[], None]) -> None:
        """Say that this worker serves. *log_status* is done when the supervisor asks for it."""
        self._log_status = log_status
        self.say(Report.SERVING)

    def say(self, report: Report | Refusal) -> None:
        """Send *report*; a supervisor that is gone need not hear it."""
        with suppress(OSError):
            self._connection.send(report)

    def _obey(self, stopping: Stopping) -> None:
        match self._heard():
            case Order.ANSWER:
                self.say(Report.ANSWER)
            case Order.STATUS if self._log_status is not None:
                self._log_status()
            case Order.DRAIN:
                stopping.drain()
            case Order.HURRY:
                stopping.hurry()

    def _heard(self) -> Order:
        try:
            order: Order = self._connection.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            return Order.DRAIN
        return order
