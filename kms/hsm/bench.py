"""Where a lane does its work: one session and the keys loaded in it.

A bench belongs to one thread at a time. It decides what an error means: a session at fault is replaced and the work done
once more; only when the token opens its canaries well is a caller's input or a stored row to blame.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import pkcs11

from kms.domain.envelope import envelope_invalid, parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import HeldKey
from kms.hsm.connection import Connection
from kms.hsm.envelopes import Handle, open_key, rewrap
from kms.hsm.errors import ALTERED_INPUT, UNSUPPORTED, Fate, MisfitError, fate_of, translate, unavailable, unsupported
from kms.hsm.link import Link
from kms.hsm.session import TokenSession

T = TypeVar("T")


@dataclass(slots=True)
class _Loaded:
    """A handle with the whole record it was loaded for; mutable for the moment of its last use."""

    held: HeldKey
    handle: Handle
    used_at: float


class Bench:
    """A session of the current connection, opened when first needed, and a bounded LRU of loaded keys."""

    def __init__(self, link: Link, *, handles_max: int, idle_seconds: float) -> None:
        self._link = link
        self._handles_max = handles_max
        self._idle_seconds = idle_seconds
        self._connection: Connection | None = None
        self._session: TokenSession | None = None
        self._loaded: OrderedDict[KeyId, _Loaded] = OrderedDict()
        self.handle_hits = 0
        self.handle_misses = 0

    @property
    def handles(self) -> int:
        """How many keys are loaded."""
        return len(self._loaded)

    def is_outdated(self, held: HeldKey) -> bool:
        """Whether an earlier version of the key is loaded here. May be asked from another thread; the answer is a hint."""
        loaded = self._loaded.get(held.identity.key_id)
        return loaded is not None and loaded.held.version < held.version

    def holds(self, held: HeldKey) -> bool:
        """Whether the key is loaded here. May be asked from another thread; the answer is a hint."""
        loaded = self._loaded.get(held.identity.key_id)
        return loaded is not None and loaded.held.version == held.version

    def run(self, work: Callable[[TokenSession], T], mechanism: str) -> T:
        """Return what *work* returns on this bench's session, tried once more on a fresh one.

        *mechanism* is named by HSM_MECHANISM_UNSUPPORTED. Raises HSM_UNAVAILABLE.
        """
        with self._link.use() as connection:
            return self._twice(connection, lambda: work(self._open(connection)), mechanism)

    def run_alone(self, work: Callable[[TokenSession], T], mechanism: str) -> T:
        """Like `run`, for work that searches for or writes token objects: no other thread of this process does so meanwhile."""
        with self._link.use() as connection:

            def attempt() -> T:
                session = self._open(connection)
                with connection.token_objects():
                    return work(session)

            return self._twice(connection, attempt, mechanism)

    def use(self, held: HeldKey, work: Callable[[TokenSession, Handle], T], mechanism: str) -> T:
        """Return what *work* returns with the loaded key. Raises as the port says of every method with a `HeldKey`."""
        with self._link.use() as connection:
            return self._twice(connection, lambda: work(*self._load(connection, held)), mechanism)

    def use_on_input(self, held: HeldKey, work: Callable[[Handle], T], invalid: Callable[[], KmsError], mechanism: str) -> T:
        """Like `use`, for *work* on input that may be altered: *invalid* is raised where the token is well and refuses it."""

        def attempt() -> T:
            session, handle = self._load(connection, held)
            try:
                return work(handle)
            except ALTERED_INPUT:
                # The final call ended its operation: session and handles stay, or one client could empty the cache.
                connection.check_token_well(session, parse_envelope(held.material.envelope))
                raise invalid() from None

        with self._link.use() as connection:
            return self._twice(connection, attempt, mechanism)

    def rewrap(self, held: HeldKey) -> str:
        """Return the key's envelope under the generation that makes new ones. Raises as `use` does."""
        with self._link.use() as connection:
            return self._twice(connection, lambda: self._opened(connection, held, rewrap), "re-wrapping of keys")

    def look_at_keys(self) -> None:
        """Find out which keys of its own the token holds by now: whoever opens a session does. Raises HSM_UNAVAILABLE."""
        with self._link.use() as connection:
            self._twice(connection, connection.look_at_keys, "sessions")

    def drop(self, key_id: KeyId) -> None:
        """Forget a key that changed."""
        loaded = self._loaded.pop(key_id, None)
        if loaded is not None:
            with suppress(KmsError), self._link.use() as connection:
                if connection is self._connection:
                    self._give_up(loaded)

    def drop_idle(self) -> None:
        """Forget the keys that nobody used for the idle time."""
        oldest_kept = time.monotonic() - self._idle_seconds
        if not self._loaded or next(iter(self._loaded.values())).used_at >= oldest_kept:
            return
        with suppress(KmsError), self._link.use() as connection:
            if connection is not self._connection:
                self._forget()
            while self._loaded and next(iter(self._loaded.values())).used_at < oldest_kept:
                self._give_up(self._loaded.popitem(last=False)[1])

    def close(self) -> None:
        """Close the session, if the connection it belongs to still lives."""
        with suppress(KmsError), self._link.use() as connection:
            if connection is self._connection:
                self._recycle()
        self._forget()

    def _twice(self, connection: Connection, attempt: Callable[[], T], mechanism: str) -> T:
        try:
            return attempt()
        except pkcs11.PKCS11Error:
            self._recycle()
        try:
            return attempt()
        except UNSUPPORTED:
            self._recycle()
            raise unsupported(mechanism) from None
        except pkcs11.PKCS11Error as error:
            self._recycle()
            raise translate(error) from None

    def _open(self, connection: Connection) -> TokenSession:
        if self._connection is not connection:
            self._forget()
            self._connection = connection
        self._leave_outdated(connection)
        if self._session is None:
            self._session = connection.open_session()
        return self._session

    def _leave_outdated(self, connection: Connection) -> None:
        """Give the session up if the token's own keys have changed since it was opened."""
        if self._session is not None and self._session.view is not connection.view:
            self._recycle()

    def _load(self, connection: Connection, held: HeldKey) -> tuple[TokenSession, Handle]:
        """Return the loaded key with its session, which may be a newer one than before."""
        return self._opened(connection, held, lambda session, held: (session, self._load_plainly(session, held)))

    def _opened(self, connection: Connection, held: HeldKey, opening: Callable[[TokenSession, HeldKey], T]) -> T:
        """Return what *opening* makes of the key's envelope; where it fails, find out whether the envelope is at fault."""
        session = self._open(connection)
        try:
            return opening(session, held)
        except MisfitError:
            self._blame(connection, held)
        except KmsError as error:
            if error.reason is not Reason.HSM_KEK_MISSING:
                raise
            # The envelope may be of a generation that another process has just made.
            connection.look_at_keys()
            if session.view is connection.view:
                # The token lacks the key: another session does, too, and the other loaded keys stay.
                raise
        # The row is good: this session was at fault.
        self._recycle()
        try:
            return opening(self._open(connection), held)
        except MisfitError:
            raise unavailable() from None

    def _load_plainly(self, session: TokenSession, held: HeldKey) -> Handle:
        key_id = held.identity.key_id
        loaded = self._loaded.get(key_id)
        if loaded is not None:
            if loaded.held == held:
                loaded.used_at = time.monotonic()
                self._loaded.move_to_end(key_id)
                self.handle_hits += 1
                return loaded.handle
            self.drop(key_id)
        self.handle_misses += 1
        handle = open_key(session, held)
        self._loaded[key_id] = _Loaded(held, handle, time.monotonic())
        if len(self._loaded) > self._handles_max:
            self._give_up(self._loaded.popitem(last=False)[1])
        return handle

    def _blame(self, connection: Connection, held: HeldKey) -> None:
        """Raise ENVELOPE_INVALID if a fresh session refuses the row too and the canaries open there; return if it does not."""
        envelope = parse_envelope(held.material.envelope)
        with connection.spare_session() as fresh:
            try:
                open_key(fresh, held).drop()
            except MisfitError:
                connection.check_canaries(fresh, envelope)
                raise envelope_invalid() from None

    def _after(self, error: pkcs11.PKCS11Error) -> None:
        if fate_of(error) is Fate.RECYCLE:
            self._recycle()

    def _give_up(self, loaded: _Loaded) -> None:
        try:
            loaded.handle.drop()
        except pkcs11.PKCS11Error as error:
            self._after(error)

    def _recycle(self) -> None:
        # Closing a session destroys its objects, so the handles need no destroying one by one.
        session, connection = self._session, self._connection
        self._forget()
        if session is not None and connection is not None:
            connection.close_session(session)

    def _forget(self) -> None:
        self._session = None
        self._loaded.clear()
