"""The watch: a thread that never calls the token itself, and so is never stuck in it.

It looks whether the token is there (through a lane of its own), connects anew when it is back, replaces a lane whose call
does not return, and ends the process when the event loop or too many lanes are stuck: the supervisor starts another.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Protocol

import structlog

from kms.domain.errors import KmsError
from kms.hsm.bench import Bench
from kms.hsm.errors import PinRefusedError
from kms.hsm.lane import Lane
from kms.hsm.link import Link
from kms.hsm.settings import HsmSettings

EXIT_STUCK: Final = 70
_BACKOFF_SECONDS_MAX: Final = 2.0
_PATIENCE_SECONDS: Final = 0.2

_log = structlog.get_logger(__name__)


class Lanes(Protocol):
    """The lanes under watch."""

    def all(self) -> list[Lane]:
        """Return every lane in use, the watch's own excepted."""
        ...

    def replace(self, stuck: Lane) -> None:
        """Abandon *stuck* and put another in its place."""
        ...

    def abandoned(self) -> int:
        """Return how many abandoned lanes are still inside a call."""
        ...

    def tend_inline(self) -> None:
        """Drop what the event loop's bench no longer needs; called on the event loop."""
        ...

    def after_loss(self) -> None:
        """Fail what waits: the token is away."""
        ...

    def after_return(self) -> None:
        """The token is back or a session was lost: make ready again what only the watch makes ready."""
        ...


class Watch:
    """Runs from `start` to `stop`."""

    def __init__(
        self,
        link: Link,
        lanes: Lanes,
        settings: HsmSettings,
        loop: asyncio.AbstractEventLoop,
        *,
        end_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._link = link
        self._lanes = lanes
        self._settings = settings
        self._loop = loop
        self._end_process = end_process
        self._lane = self._new_lane()
        self._looking: Future[bool] | None = None
        self._beats_missed = 0
        self._failures = 0
        self._next_try_at = 0.0
        self._blocked_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hsm-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; returns when the thread has."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._lane.close()
        self._lane.join(self._settings.watch_seconds)

    def _run(self) -> None:
        while not self._stopped.wait(self._settings.watch_seconds):
            self._check_loop()
            self._check_lanes()
            self._check_token()

    def _check_loop(self) -> None:
        # Counted in ticks of this thread, so that a process that was stopped for a while does not count as stuck.
        self._beats_missed += 1
        if self._beats_missed * self._settings.watch_seconds > self._settings.stuck_seconds:
            self._end("the event loop is stuck")
        try:
            self._loop.call_soon_threadsafe(self._beat)
        except RuntimeError:
            self._beats_missed = 0  # the loop has ended: nothing is left that could be stuck

    def _beat(self) -> None:
        self._beats_missed = 0
        self._lanes.tend_inline()

    def _check_lanes(self) -> None:
        for lane in self._lanes.all():
            if lane.is_stuck:
                _log.error("hsm_lane_abandoned", lane=lane.name, after_seconds=lane.stuck_seconds)
                self._lanes.replace(lane)
        if self._lanes.abandoned() > self._settings.abandoned_max:
            self._end("too many HSM calls do not return")

    def _check_token(self) -> None:
        if self._lane.is_stuck:
            # The look itself hangs. It goes on hanging in its daemon thread; meanwhile the token counts as away.
            self._lost("it does not answer")
            self._end("the HSM does not answer the watch")
        if self._looking is not None and not self._looking.done():
            return
        finished, self._looking = self._looking, None
        if finished is not None:
            self._judge(finished)
        if self._link.is_up:
            self._looking = self._lane.submit(self._look)
        elif time.monotonic() >= self._next_try_at:
            self._looking = self._lane.submit(self._reconnect)

    def _look(self, bench: Bench) -> bool:
        with self._link.use() as connection:
            bench.run(connection.look, "the watch's look")
        self._lanes.after_return()
        return True

    def _reconnect(self, _bench: Bench) -> bool:
        if not self._link.reconnect(_PATIENCE_SECONDS):
            self._check_blocked()
            return False
        self._blocked_since = None
        self._lanes.after_return()
        _log.info("hsm_back", serial=self._link.last.serial)
        return True

    def _check_blocked(self) -> None:
        # A call that never returns keeps the module from being finalised, and so the token from coming back.
        now = time.monotonic()
        self._blocked_since = self._blocked_since or now
        if now - self._blocked_since > self._settings.stuck_seconds:
            self._end("an HSM call that does not return prevents connecting anew")

    def _judge(self, finished: "Future[bool]") -> None:
        error = finished.exception()
        if error is None:
            self._failures = 0
            return
        if not isinstance(error, KmsError):
            _log.error("hsm_watch_failed", error=type(error).__name__)
        self._lost(error.message if isinstance(error, KmsError) else "the look failed")
        self._failures += 1
        pause = min(self._settings.watch_seconds * 2.0 ** min(self._failures - 1, 10), _BACKOFF_SECONDS_MAX)
        if isinstance(error, PinRefusedError):
            pause = math.inf  # a token locks after a few wrong PINs: only a restart tries again
            _log.error("hsm_pin_refused", what="not tried again before a restart")
        self._next_try_at = time.monotonic() + pause

    def _lost(self, why: str) -> None:
        if self._link.lose():
            _log.error("hsm_lost", why=why)
            self._lanes.after_loss()

    def _end(self, why: str) -> None:
        _log.critical("hsm_watch_ends_process", why=why, status=EXIT_STUCK)
        self._end_process(EXIT_STUCK)

    def _new_lane(self) -> Lane:
        bench = Bench(self._link, handles_max=1, idle_seconds=self._settings.handle_idle_seconds)
        return Lane("watch", bench, stuck_seconds=self._settings.stuck_seconds, idle_seconds=self._settings.handle_idle_seconds)
