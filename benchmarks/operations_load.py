"""The load generator of `operations.py`: processes of clients over mutual TLS, each client with a connection of its own.

An answer with another status than OK, or one that is not what was asked for, ends the run: nothing is ever counted that was
not right.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import uvloop

from benchmarks.operations_calls import Calls, Known, echo_calls, service_calls
from kms.config import ClientConfig

ECHO: Final = "echo"
_SPAWN: Final = multiprocessing.get_context("spawn")  # grpc does not survive a fork


@dataclass(frozen=True, slots=True)
class Order:
    """What a process of clients is to do. Moments are of the monotonic clock, which all processes share."""

    operation: str
    clients: int
    counted_from: float
    ends_at: float


@dataclass(slots=True)
class Tally:
    """What came of it: the results of all calls, and of those in the counted time their number and how many seconds each took.

    A call of which a part lies in the counted time counts as that part, so that long calls are counted fairly.
    """

    items: int = 1
    results: int = 0
    calls: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Take in what another process counted."""
        self.items = max(self.items, other.items)  # a process without a client has made none
        self.results += other.results
        self.calls += other.calls
        self.seconds += other.seconds


class Child:
    """A process that answers one order after the other, and ends with this one."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, order: object) -> None:
        """Give it an order."""
        self._pipe.send(order)

    def answer(self) -> Any:  # noqa: ANN401  # each kind of child has its own
        """Return what it says next. Raises what went wrong there."""
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()


class Load:
    """The processes of clients."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [child.pid for child in self._children]

    def begin(self, operation: str, clients: int, *, warm_seconds: float, seconds: float) -> Order:
        """Let *clients* repeat *operation*, and return when they are counted."""
        share, more = divmod(clients, len(self._children))
        counted_from = time.monotonic() + warm_seconds
        for number, child in enumerate(self._children):
            child.send(Order(operation, share + (number < more), counted_from, counted_from + seconds))
        return Order(operation, clients, counted_from, counted_from + seconds)

    def result(self) -> Tally:
        """Wait for the calls in flight, and return what all clients together have had. Raises what any of them met."""
        tally = Tally()
        for child in self._children:
            tally.add(child.answer())
        return tally


@contextmanager
def load_processes(processes: int, clients_max: int, service: ClientConfig, echo: str, known: Known) -> Iterator[Load]:
    """Run the generator's *processes*, for up to *clients_max* clients of the *service* and of the *echo* (an address)."""
    each = -(-clients_max // processes)
    children = [Child(_generate, each, service, echo, known) for _ in range(processes)]
    try:
        for child in children:
            child.answer()
        yield Load(children)
    finally:
        for child in children:
            child.stop()


def _generate(pipe: Connection, clients: int, service: ClientConfig, echo: str, known: Known) -> None:
    uvloop.run(_answer_orders(pipe, clients, service, echo, known))


async def _answer_orders(pipe: Connection, clients: int, service: ClientConfig, echo: str, known: Known) -> None:
    files = (service.ca_file, service.key_file, service.cert_file)
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    # Without this all channels of a process would share one connection.
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = {
        address: [grpc.aio.secure_channel(address, credentials, options=options) for _ in range(clients)]
        for address in (service.server, echo)
    }
    await asyncio.gather(*(channel.channel_ready() for each in channels.values() for channel in each))
    pipe.send(None)
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        where = channels[echo if order.operation == ECHO else service.server][: order.clients]
        calls = [
            echo_calls(channel) if order.operation == ECHO else service_calls(order.operation, channel, known)
            for channel in where
        ]
        pipe.send(await _outcome(order, calls))


async def _outcome(order: Order, calls: Sequence[Calls]) -> Tally | Exception:
    tally = Tally()
    try:
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(_repeat(order, each, tally)) for each in calls]
        for client, each in zip(clients, calls, strict=True):
            for answer in client.result():
                await each.prove(answer)
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent ends the run with it
        return RuntimeError(f"{order.operation}: {_causes(error)}")
    return tally


async def _repeat(order: Order, calls: Calls, tally: Tally) -> list[Any]:
    """Call until the end; return the first and the last answer."""
    kept: list[Any] = []
    tally.items = calls.items
    while (sent := time.monotonic()) < order.ends_at:
        answer = await calls.send()
        answered = time.monotonic()
        tally.results += calls.items
        counted = min(answered, order.ends_at) - max(sent, order.counted_from)
        if counted > 0:
            tally.calls += counted / (answered - sent)
            tally.seconds.append(answered - sent)
        kept[1:] = [answer]
    return kept


def _causes(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(sorted({_causes(each) for each in error.exceptions}))
    return repr(error)
