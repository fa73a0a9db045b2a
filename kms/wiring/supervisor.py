"""The supervisor of `kms serve --workers N`: starts workers on one port, watches them, replaces those that end or are stuck.

It reads the secrets, once, and hands them over; it has no login of its own, neither to the token nor to the database, and no
gRPC, so that what makes a worker end does not end it. A worker is asked again and again whether its event loop runs, and follows
the end of the connection: without a supervisor it drains.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import structlog

from kms.config import Config, needed
from kms.hsm.hardening import protect_memory
from kms.wiring.control import Order, Refusal, Report, Task
from kms.wiring.descriptors import raise_descriptor_limit
from kms.wiring.gathered import gathered, worker_socket
from kms.wiring.log import configure_log
from kms.wiring.shared_port import reserved

_QUESTIONS: Final = 10  # so many without an answer mean that a worker is stuck
_LOOPLESS_SECONDS: Final = 60.0  # for loading before the event loop runs, and for unloading after it
_STOP_SECONDS: Final = 30.0  # for the ledger and the token after the last call
_PAUSE_SECONDS_MAX: Final = 30.0
_RETRY_SECONDS: Final = 1.0
_STEADY_SECONDS: Final = 60.0  # a worker that has lived so long is not in a loop of crashes
_LOG = structlog.get_logger("kms")


def supervise(config: Config) -> int:
    """Run as many workers as *config* says until SIGTERM or SIGINT, let them drain, and return the exit code.

    Raises what the first worker refuses to start with, and OSError if somebody listens on the port.
    """
    configure_log(config.log_level)
    protect_memory()
    raise_descriptor_limit()
    server = needed(config.server)
    secrets = {"hsm": needed(config.hsm).with_secret("hsm"), "database": needed(config.database).with_secret("database")}
    with ExitStack() as stack:
        ports: dict[str, object] = {"server": server.model_copy(update={"listen": stack.enter_context(reserved(server.listen))})}
        if (publishing := config.publishing) is not None:
            ports["publishing"] = publishing.model_copy(update={"listen": stack.enter_context(reserved(publishing.listen))})
        if (acme := config.acme) is not None:
            ports["acme"] = acme.model_copy(update={"listen": stack.enter_context(reserved(acme.listen))})
        metrics = stack.enter_context(gathered(config.metrics))
        return asyncio.run(_Supervisor(config.model_copy(update={**secrets, **ports}), metrics).run())


def pause_seconds(crashes: int, *, is_served: bool) -> float:
    """Return how long to wait after so many crashes in a row: 0, 1, 2, 4, … at most 30 seconds, at most 1 if nobody serves."""
    longest = _PAUSE_SECONDS_MAX if is_served else _RETRY_SECONDS
    return 0.0 if crashes <= 1 else min(2.0 ** min(crashes - 2, 10), longest)


class _Phase(Enum):
    """How far a worker is. Its event loop runs from STARTING to SERVING."""

    LOADING = "loading"
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as the supervisor knows it. It changes with what the worker says."""

    number: int
    process: Process
    control: Connection
    began_at: float
    unanswered: int = 0
    phase: _Phase = _Phase.LOADING
    refusal: Refusal | None = None

    @property
    def is_serving(self) -> bool:
        """Whether it takes calls."""
        return self.phase is _Phase.SERVING

    def is_stuck(self, interval_seconds: float) -> bool:
        """Whether it has left too many questions without an answer, one having been asked every *interval_seconds*."""
        has_loop = self.phase in (_Phase.STARTING, _Phase.SERVING)
        return self.unanswered > (_QUESTIONS if has_loop else _LOOPLESS_SECONDS / interval_seconds)

    def tell(self, order: Order) -> None:
        """Send *order*; a worker that has ended need not hear it."""
        with suppress(OSError):
            self.control.send(order)

    def hear(self) -> bool:
        """Take in one message; return whether there may be another."""
        try:
            message = self.control.recv()
        except (EOFError, OSError):
            return False
        self.unanswered = 0
        match message:
            case Refusal():
                self.refusal, self.phase = message, _Phase.ENDING
            case Report.SERVING:
                self.phase = _Phase.SERVING
            case Report.STOPPED:
                self.phase = _Phase.ENDING
            case Report.ANSWER if self.phase is _Phase.LOADING:
                self.phase = _Phase.STARTING
        return True

    def kill(self) -> None:
        """End the process whatever it does."""
        with suppress(ProcessLookupError):
            self.process.kill()


class _Supervisor:
    """Runs once. The first worker starts alone: what it refuses is told once, and a wrong PIN is tried once."""

    def __init__(self, config: Config, metrics: tuple[Path, int] | None) -> None:
        self._config = config
        self._metrics = metrics
        self._server = needed(config.server)
        self._workers: dict[int, _Worker] = {}
        self._serves = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_complete = False  # once: that all workers serve is told at the start
        self._failure: Exception | None = None
        self._exit_code = 0

    async def run(self) -> int:
        """Return the exit code, or raise what a worker refused to start with."""
        self._follow_signals()
        places = [self._place(1)]
        await _either(self._serves, self._stopping)
        if self._metrics is not None and self._serves.is_set():
            _LOG.info("seen from outside", address=needed(self._config.metrics).listen, port=self._metrics[1])
        places += [self._place(number) for number in range(2, self._server.workers + 1)]
        await self._stopping.wait()
        if self._workers:
            _LOG.info("draining", workers=len(self._workers), seconds=self._server.call_seconds_max)
        self._tell(Order.DRAIN)
        _, late = await asyncio.wait(places, timeout=self._server.call_seconds_max + _STOP_SECONDS)
        for worker in self._workers.values() if late else ():
            self._kill(worker, "it does not end")
        await asyncio.gather(*places)
        if self._failure is not None:
            raise self._failure
        _LOG.info("stopped")
        return self._exit_code

    def _follow_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGUSR1, self._tell, Order.STATUS)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._tell(Order.HURRY)
        self._stopping.set()

    def _tell(self, order: Order) -> None:
        for worker in self._workers.values():
            worker.tell(order)

    def _place(self, number: int) -> asyncio.Task[None]:
        place = asyncio.create_task(self._keep(number))
        place.add_done_callback(lambda _: self._stopping.set())  # it ends with all, or by a bug, which `run` raises
        return place

    async def _keep(self, number: int) -> None:
        """Have a worker in this place until it is time to stop."""
        crashes = 0
        while not self._stopping.is_set():
            try:
                worker = self._workers[number] = await self._started(number)
            except (OSError, RuntimeError) as error:  # the latter where there is no thread left to wait for it
                await self._not_started(number, error)
                continue
            if self._stopping.is_set():  # meanwhile: it has not heard the order
                worker.tell(Order.DRAIN)
            code = await self._attended(worker)
            del self._workers[number]
            if self._stopping.is_set():
                self._exit_code = self._exit_code or _as_exit_code(code)
                return
            is_steady = asyncio.get_running_loop().time() - worker.began_at > _STEADY_SECONDS
            crashes = 1 if is_steady else crashes + 1
            if not self._is_final(worker, code):
                pause = pause_seconds(crashes, is_served=self._is_served())
                _LOG.warning("worker replaced", number=number, pid=worker.process.pid, code=code, pause_seconds=pause)
                await _either(self._stopping, seconds=pause)

    async def _not_started(self, number: int, error: OSError | RuntimeError) -> None:
        """Wait for another try: the host has no process or descriptor to spare. Where nobody serves yet, it ends everything."""
        if not self._serves.is_set():
            self._failure = error
            self._stopping.set()
            return
        _LOG.error("worker not started", number=number, error=str(error), pause_seconds=_RETRY_SECONDS)
        await _either(self._stopping, seconds=_RETRY_SECONDS)

    async def _started(self, number: int) -> _Worker:
        ours, theirs = Pipe()
        try:
            # -P and the path: the same modules as here, whatever lies in the working directory.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "kms.wiring.worker", str(theirs.fileno())),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=(theirs.fileno(),),
                stdin=DEVNULL,
            )
        except BaseException:
            ours.close()  # a process that was started all the same ends with it
            raise
        finally:
            theirs.close()
        worker = _Worker(number, process, ours, asyncio.get_running_loop().time())
        with suppress(OSError):
            ours.send(Task(number, self._config, self._metrics and worker_socket(self._metrics[0], number)))
        return worker

    async def _attended(self, worker: _Worker) -> int:
        """Hear and question *worker* until it has ended; return how."""
        loop, control = asyncio.get_running_loop(), worker.control

        def hear() -> None:
            if not worker.hear():
                loop.remove_reader(control.fileno())
            self._take_note(worker)

        loop.add_reader(control.fileno(), hear)
        ended = asyncio.create_task(worker.process.wait())
        while not ended.done():
            self._question(worker)
            await asyncio.wait({ended}, timeout=self._server.stuck_seconds / _QUESTIONS)
        loop.remove_reader(control.fileno())
        while control.poll() and worker.hear():
            pass
        control.close()
        return ended.result()

    def _take_note(self, worker: _Worker) -> None:
        if worker.is_serving:
            self._serves.set()
        if not self._is_complete and sum(each.is_serving for each in self._workers.values()) == self._server.workers:
            self._is_complete = True
            port = int(self._server.listen.rpartition(":")[2])
            _LOG.info("serving", address=self._server.listen, port=port, workers=self._server.workers, pid=os.getpid())

    def _question(self, worker: _Worker) -> None:
        # Counted in questions, so that it is no worker's fault if this process was stopped for a while.
        if worker.is_stuck(self._server.stuck_seconds / _QUESTIONS):
            self._kill(worker, "it does not answer")
        worker.unanswered += 1
        worker.tell(Order.ANSWER)

    def _kill(self, worker: _Worker, why: str) -> None:
        _LOG.error("worker killed", number=worker.number, pid=worker.process.pid, why=why)
        worker.kill()

    def _is_final(self, worker: _Worker, code: int) -> bool:
        """Whether the end of *worker* ends everything: it did not start, and trying again would not help."""
        if worker.refusal is not None and not (worker.refusal.may_pass and self._serves.is_set()):
            self._failure = worker.refusal.error
        elif not self._serves.is_set():
            self._exit_code = _as_exit_code(code) or 1
        else:
            return False
        self._stopping.set()
        return True

    def _is_served(self) -> bool:
        return any(worker.is_serving for worker in self._workers.values())


async def _either(*events: asyncio.Event, seconds: float | None = None) -> None:
    """Return when one of *events* is set, or after *seconds*."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _as_exit_code(code: int) -> int:
    """Return *code* as a shell tells it: 128 and the signal, where it was one."""
    return code if code >= 0 else 128 - code
