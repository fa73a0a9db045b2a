"""The gate between the threads that use the token and the one that connects it anew.

Finalising the module while a thread is inside a call crashes the process, and session handles of one life of the module
mean something else in the next. So every use of the token goes through `Link.use`, and `reconnect` waits for the last.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from kms.hsm.connection import Connection, connect
from kms.hsm.errors import kek_missing, unavailable
from kms.hsm.module import Module
from kms.hsm.settings import HsmSettings

_log = structlog.get_logger(__name__)


class Link:
    """The current connection, or none while the token is away."""

    def __init__(self, module: Module, settings: HsmSettings, connection: Connection) -> None:
        self._module = module
        self._settings = settings
        self._current: Connection | None = connection
        self._last = connection
        self._users = 0
        self._changed = threading.Condition(threading.Lock())
        self._connecting = threading.Lock()
        self._is_closed = False

    @property
    def is_up(self) -> bool:
        """Whether there is a connection."""
        return self._current is not None

    @property
    def last(self) -> Connection:
        """The current connection, or the one that was lost: for what it knows, not for its sessions."""
        return self._last

    @contextmanager
    def use(self) -> Iterator[Connection]:
        """Enter the token. Raises HSM_UNAVAILABLE at once while there is none."""
        connection = self.enter()
        try:
            yield connection
        finally:
            self.leave()

    def enter(self) -> Connection:
        """Begin what `leave` ends; `use` is the form for all but the hottest paths."""
        with self._changed:
            if self._current is None:
                raise unavailable()
            self._users += 1
            return self._current

    def leave(self) -> None:
        """Leave the token."""
        with self._changed:
            self._users -= 1
            if self._users == 0:
                self._changed.notify_all()

    def lose(self) -> bool:
        """Refuse every use from now on; return whether there was a connection."""
        with self._changed:
            was_up = self._current is not None
            self._current = None
            return was_up

    def reconnect(self, patience_seconds: float) -> bool:
        """Connect anew; return whether that was possible, which it is not while a thread is inside a call.

        Raises HSM_UNAVAILABLE or HSM_KEK_MISSING if the token is not back with all the keys it had. A clone is welcome.
        """
        with self._connecting:
            return not self._is_closed and self._is_unused(patience_seconds) and self._connect()

    def _connect(self) -> bool:
        fresh = connect(self._module, self._settings)
        if not fresh.names.covers(self._last.names):
            raise kek_missing()
        if fresh.token.serial != self._last.token.serial:
            _log.warning("hsm_serial_changed", before=self._last.serial, now=fresh.serial)
        fresh.oaep_hashes = self._last.oaep_hashes
        fresh.make_under(self._last.view.generation)
        with self._changed:
            self._current = self._last = fresh
        return True

    def close(self, patience_seconds: float) -> bool:
        """End the module and give it back; return False, leaving it as it is, while a thread stays inside a call."""
        self.lose()
        self._is_closed = True
        if not self._connecting.acquire(timeout=patience_seconds):
            return False
        try:
            if not self._is_unused(patience_seconds):
                return False
            self._last.close()
            self._module.release()
            return True
        finally:
            self._connecting.release()

    def _is_unused(self, patience_seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._users == 0, patience_seconds)
