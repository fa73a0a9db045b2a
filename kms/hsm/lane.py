"""A lane: one thread with a bench of its own, and a queue of work for it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from kms.hsm.bench import Bench
from kms.hsm.errors import unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job(Generic[T]):
    """Work and the future that waits for it. A future that was cancelled in the queue is never begun."""

    work: Callable[[Bench], T]
    future: "Future[T]"

    def perform(self, bench: Bench) -> Callable[[], None]:
        """Do the work and return what tells the caller: the lane is free again before anybody hears of it."""
        if not self.future.set_running_or_notify_cancel():
            return lambda: None
        try:
            result = self.work(bench)
        except BaseException as error:  # noqa: BLE001  # whoever waits for the future raises it again
            return partial(self.fail, error)
        return partial(self.succeed, result)

    def succeed(self, result: T) -> None:
        with suppress(InvalidStateError):  # the lane was abandoned and its caller told so
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled, or told before
            self.future.set_exception(error)


class Lane:
    """A thread that works off its queue. `stuck_seconds` is for the watch: how long one call may take."""

    def __init__(self, name: str, bench: Bench, *, stuck_seconds: float, idle_seconds: float) -> None:
        self.name = name
        self.bench = bench
        self.stuck_seconds = stuck_seconds
        self._idle_seconds = idle_seconds
        self._jobs: deque[_Job[Any]] = deque()
        self._current: _Job[Any] | None = None
        self._busy_since: float | None = None
        self._is_closed = False
        self._wake = threading.Condition(threading.Lock())
        # A daemon: a call that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"hsm-{name}", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """How many jobs wait or run."""
        return len(self._jobs) + (self._current is not None)

    @property
    def is_stuck(self) -> bool:
        """Whether the present call has run longer than `stuck_seconds`."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self.stuck_seconds

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs, be it inside a call that never returns."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[Bench], T]) -> "Future[T]":
        """Queue *work*. Raises HSM_UNAVAILABLE if the lane was closed or abandoned."""
        future: Future[T] = Future()
        with self._wake:
            if self._is_closed:
                raise unavailable()
            self._jobs.append(_Job(work, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Take no more work and fail what waits; the thread ends after its present call."""
        with self._wake:
            self._is_closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._wake.notify()
        for job in waiting:
            job.fail(unavailable())

    def fail_waiting(self) -> None:
        """Fail what waits in the queue: the token is away."""
        with self._wake:
            waiting = list(self._jobs)
            self._jobs.clear()
        for job in waiting:
            job.fail(unavailable())

    def abandon(self) -> None:
        """Give up on the present call: fail it and what waits behind it."""
        job = self._current
        self.close()
        if job is not None:
            job.fail(unavailable("the HSM did not answer in time"))

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread of a closed lane; return whether it ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._busy_since = time.monotonic()
            tell = job.perform(self.bench)
            self._busy_since = self._current = None
            tell()
            del job, tell  # a finished job's plaintext is not kept until the next one comes
        self.bench.close()

    def _next(self) -> _Job[Any] | None:
        with self._wake:
            while not self._jobs:
                if self._is_closed:
                    return None
                if not self._wake.wait(self._idle_seconds if self.bench.handles else None):
                    self._drop_idle()
            self._current = self._jobs.popleft()
            return self._current

    def _drop_idle(self) -> None:
        self._wake.release()
        self._busy_since = time.monotonic()
        try:
            self.bench.drop_idle()
        finally:
            self._busy_since = None
            self._wake.acquire()
