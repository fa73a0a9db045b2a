"""RESIDENT keys and marks in a token, for a command: one session, and no thread but the caller's."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import pkcs11

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import HeldKey
from kms.domain.residents import Holdings
from kms.hsm import residents
from kms.hsm.connection import Connection, connect
from kms.hsm.drill import Outcome, outcome_of
from kms.hsm.errors import PinRefusedError, translate
from kms.hsm.hardening import protect_memory
from kms.hsm.module import Module, load_module
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings

T = TypeVar("T")

_PAUSES_SECONDS: Final = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True, slots=True)
class OneSession:
    """The part of `Hsm` that reconciliation needs. Its coroutines hold up the event loop."""

    connection: Connection

    async def holdings(self) -> Holdings:
        """See `Hsm.holdings`."""
        return self._run(lambda session: residents.take_holdings(session.raw))

    async def confirm(self, key_id: KeyId) -> None:
        """See `Hsm.confirm`."""
        self._run(lambda session: residents.confirm(session.raw, key_id))

    async def abandon(self, key_id: KeyId) -> None:
        """See `Hsm.abandon`."""
        self._run(lambda session: residents.abandon(session.raw, key_id))

    async def discard(self, key_id: KeyId, bound_to: str) -> None:
        """See `Hsm.discard`."""
        self._run(lambda session: residents.discard(session.raw, key_id, bound_to))

    async def opens(self, key: HeldKey) -> bool:
        """See `Hsm.opens`."""
        return self._run(lambda session: outcome_of(session, key)) is Outcome.OPENED

    async def mac(self, data: bytes) -> bytes:
        """See `Hsm.mac`."""
        return self._run(lambda session: session.mac(data))

    def _run(self, work: Callable[[TokenSession], T]) -> T:
        # The service writes to the token too, and makes a search fail for a moment.
        for pause in _PAUSES_SECONDS:
            try:
                return self._run_once(work)
            except pkcs11.PKCS11Error:
                time.sleep(pause)
        try:
            return self._run_once(work)
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None

    def _run_once(self, work: Callable[[TokenSession], T]) -> T:
        session = self.connection.open_session()
        try:
            return work(session)
        finally:
            self.connection.close_session(session)


def _connected(module: Module, settings: HsmSettings) -> Connection:
    for pause in _PAUSES_SECONDS:
        try:
            return connect(module, settings)
        except PinRefusedError:
            raise
        except KmsError as error:
            if error.reason is not Reason.HSM_UNAVAILABLE:
                raise
        time.sleep(pause)
    return connect(module, settings)


@contextmanager
def one_session(settings: HsmSettings) -> Iterator[OneSession]:
    """Log in, and yield the token. Has the module to itself. Raises HSM_UNAVAILABLE and HSM_KEK_MISSING."""
    protect_memory()
    module = load_module(settings.module)
    module.claim()
    try:
        yield OneSession(_connected(module, settings))
    finally:
        module.finalise()
        module.release()
