"""The event loop's own bench, for operations shorter than the way to another thread and back.

It must not wait: it neither retries nor opens sessions. Where anything at all is wrong it answers None, and a lane finds out
what. The watch brings it a new session when it needs one.
"""

from collections.abc import Callable
from typing import TypeVar

import pkcs11

from kms.domain.errors import KmsError
from kms.domain.keys import HeldKey
from kms.hsm.bench import Bench
from kms.hsm.connection import Connection
from kms.hsm.envelopes import Handle
from kms.hsm.errors import MisfitError
from kms.hsm.session import TokenSession

T = TypeVar("T")


class InlineBench(Bench):
    """A bench that answers at once or not at all. `offer` is called by the watch's thread, all else by the event loop's."""

    _offered: tuple[Connection, TokenSession] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a session of the current connection, or one is on offer."""
        offered = self._offered
        current = self._link.last if self._link.is_up else None
        session = self._session
        mine = self._connection if session is not None and current is not None and session.view is current.view else None
        return current is not None and (mine is current or (offered is not None and offered[0] is current))

    def offer(self, connection: Connection, session: TokenSession) -> None:
        """Bring a session; the event loop takes it at its next use."""
        self._offered = (connection, session)

    def use_if_well(self, held: HeldKey, work: Callable[[TokenSession, Handle], T]) -> T | None:
        """Return what *work* returns with the loaded key, or None."""
        return self.run_if_well(lambda session: work(session, self._load_plainly(session, held)))

    def run_if_well(self, work: Callable[[TokenSession], T]) -> T | None:
        """Return what *work* returns on the session, or None."""
        try:
            connection = self._link.enter()
        except KmsError:
            return None
        try:
            session = self._take(connection)
            return None if session is None else work(session)
        except (MisfitError, KmsError):
            return None
        except pkcs11.PKCS11Error as error:
            self._after(error)
            return None
        finally:
            self._link.leave()

    def _take(self, connection: Connection) -> TokenSession | None:
        if self._connection is not connection:
            self._forget()
            self._connection = connection
        self._leave_outdated(connection)
        if self._session is None and self._offered is not None:
            # In this order, so that the watch never sees neither and brings a second one.
            self._session = self._offered[1] if self._offered[0] is connection else None
            self._offered = None
        return self._session
