"""One life of the initialised module: the login, the token's own keys, and the sessions opened from it.

`Session.close()` of the binding logs the whole token out and a second login is refused, so one session logs in and stays;
every other session opens without the PIN.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import pkcs11

from kms.domain.algorithms import Hash
from kms.domain.envelope import Envelope
from kms.domain.errors import KmsError, Reason
from kms.hsm.errors import MisfitError, translate, unavailable
from kms.hsm.module import Module
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.wrapping_keys import Canary, Inventory, Kind, WrappingKey, check_attributes, check_canary, take_inventory

_SPARE_WAIT_SECONDS: Final = 2.0
_CANARY_SHARED_SECONDS: Final = 0.02
_LOOK_ATTEMPTS: Final = 3
_LOOK_PAUSE_SECONDS: Final = 0.02


class Connection:
    """A logged-in token. Ends with `close` or when the module is initialised anew; sessions of it are then void."""

    def __init__(self, module: Module, token: pkcs11.Token, login: pkcs11.Session, inventory: Inventory) -> None:
        self.module = module
        self.token = token
        self._login = login
        self.wrapping_keys: tuple[WrappingKey, ...] = tuple(inventory.keys)
        self.own_keys = inventory.own
        self.says_records_have_macs = inventory.says_records_have_macs
        self.canaries: tuple[Canary, ...] = inventory.canaries
        self.oaep_hashes: frozenset[Hash] = frozenset()
        self.sessions = 1
        self._counting = threading.Lock()
        self._spare = threading.Semaphore(1)
        self._searching = threading.Lock()
        self._canary_good_at = 0.0

    @property
    def serial(self) -> str:
        """The token's serial number as text."""
        return self.token.serial.decode("ascii", errors="replace")

    @contextmanager
    def token_objects(self) -> Iterator[None]:
        """Hold this while searching for or writing token objects: SoftHSM fails a search during another session's write."""
        with self._searching:
            yield

    def open_session(self) -> TokenSession:
        """Open a session that sees the token's keys. Raises HSM_UNAVAILABLE or the binding's errors."""
        raw = self.token.open(rw=True)
        with self._counting:
            self.sessions += 1
        try:
            with self.token_objects():
                inventory = take_inventory(raw)
            # SoftHSM opens sessions on a token whose files are gone; they see no keys.
            if not inventory.own >= self.own_keys:
                raise unavailable("the token no longer shows its keys")
            return as_token_session(raw, inventory, self.oaep_hashes)
        except BaseException:
            self._close(raw)
            raise

    def close_session(self, session: TokenSession) -> None:
        """Close a session of this connection; one that the token no longer knows is simply gone."""
        self._close(session.raw)

    @contextmanager
    def spare_session(self) -> Iterator[TokenSession]:
        """Lend the one spare session, freshly opened. Raises HSM_UNAVAILABLE while others hold it too long."""
        if not self._spare.acquire(timeout=_SPARE_WAIT_SECONDS):
            raise unavailable()
        try:
            session = self.open_session()
            try:
                yield session
            finally:
                self.close_session(session)
        finally:
            self._spare.release()

    def check_canaries(self, session: TokenSession, envelope: Envelope | None) -> None:
        """Raise HSM_UNAVAILABLE unless the canaries open that *envelope*'s keys concern; None means all of them."""
        try:
            for canary in self.canaries:
                if envelope is None or canary.names(envelope.kek_id, envelope.sealing_key_id):
                    check_canary(session, canary)
        except MisfitError:
            raise unavailable("the HSM does not open its own canary") from None
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None

    def check_token_well(self, session: TokenSession, envelope: Envelope) -> None:
        """Like `check_canaries`, but callers of the same moment share one result, so that a flood costs one probe."""
        if time.monotonic() - self._canary_good_at < _CANARY_SHARED_SECONDS:
            return
        self.check_canaries(session, envelope)
        self._canary_good_at = time.monotonic()

    def look(self, session: TokenSession) -> None:
        """Raise HSM_UNAVAILABLE if the token is gone, was exchanged or does not open its canaries.

        SoftHSM goes on working from memory when its directory is gone; only C_GetTokenInfo looks at the files.
        """
        for attempt in range(1, _LOOK_ATTEMPTS + 1):
            try:
                seen = self.token.slot.get_token()
                if seen.serial != self.token.serial or seen.label != self.token.label:
                    raise unavailable("another token is in the place of ours")
                break
            except pkcs11.PKCS11Error as error:
                # Another process that writes to the token makes this fail for a moment.
                if attempt == _LOOK_ATTEMPTS:
                    raise translate(error) from None
                time.sleep(_LOOK_PAUSE_SECONDS)
        self.check_canaries(session, None)

    def close(self) -> None:
        """Log out and end the module. No thread may be inside a call."""
        with suppress(pkcs11.PKCS11Error):  # a token that is gone cannot be logged out of
            self._login.close()
        self.module.finalise()

    def _close(self, raw: pkcs11.Session) -> None:
        with self._counting:
            self.sessions -= 1
        with suppress(pkcs11.PKCS11Error):  # a session that the token dropped needs no closing
            raw.close()


def login(module: Module, settings: HsmSettings) -> tuple[pkcs11.Token, pkcs11.Session]:
    """Initialise *module* anew, find the token by its label and log in.

    Raises HSM_UNAVAILABLE, as `PinRefusedError` for a PIN that the token refuses: that must not be tried again at once.
    """
    module.initialise()
    token = find_token(module, settings.token_label)
    try:
        return token, token.open(rw=True, user_pin=settings.pin.reveal().decode())
    except pkcs11.PKCS11Error as error:
        raise translate(error) from None


def find_token(module: Module, label: str) -> pkcs11.Token:
    """Return the one token with that label, by whatever slot. Raises HSM_UNAVAILABLE."""
    found = []
    try:
        slots = module.library.get_slots(True)
    except pkcs11.PKCS11Error as error:
        raise translate(error) from None
    for slot in slots:
        try:
            token = slot.get_token()
        except pkcs11.PKCS11Error:
            continue  # somebody else's token in another slot may be as broken as it likes
        if token.label == label:
            found.append(token)
    if len(found) != 1:
        raise unavailable("the HSM has no token of the configured label" if not found else "two tokens have the configured label")
    return found[0]


def connect(module: Module, settings: HsmSettings) -> Connection:
    """Log in, verify the attributes of every key of ours and open every canary.

    Raises HSM_UNAVAILABLE, or HSM_KEK_MISSING where `kms hsm init` has not been run on this token.
    """
    token, session = login(module, settings)
    try:
        inventory = take_inventory(session)
        check_attributes(inventory)
        connection = Connection(module, token, session, inventory)
        connection.check_canaries(as_token_session(session, inventory, frozenset()), None)
        check_complete(inventory)
    except pkcs11.PKCS11Error as error:
        raise translate(error) from None
    return connection


def check_complete(inventory: Inventory) -> None:
    """Raise HSM_KEK_MISSING unless each KEK and sealing key has a canary, and there is one of each."""
    for keys in (inventory.of(Kind.KEK), inventory.of(Kind.SEALING)):
        if not keys or not all(any(c.names(key, key) for c in inventory.canaries) for key in keys):
            raise _not_initialised()


def as_token_session(raw: pkcs11.Session, inventory: Inventory, oaep_hashes: frozenset[Hash]) -> TokenSession:
    """Return *raw* with the keys of *inventory*, which it took. Raises HSM_KEK_MISSING where one is not there."""
    kek, sealing, mac_key = inventory.newest(Kind.KEK), inventory.newest(Kind.SEALING), inventory.newest_mac()
    if kek is None or sealing is None:
        raise _not_initialised()
    if mac_key is None:
        raise _no_mac_key()
    keks: dict[Any, Any] = inventory.of(Kind.KEK)
    return TokenSession(raw, keks, inventory.of(Kind.SEALING), kek.key_id, sealing.key_id, mac_key, oaep_hashes)


def _not_initialised() -> KmsError:
    return KmsError(
        Reason.HSM_KEK_MISSING,
        "the token has no wrapping keys of ours, or not all of them: configure the token that has them (hsm.module, "
        "hsm.token_label), or, for a new deployment, run `kms hsm init`",
    )


def _no_mac_key() -> KmsError:
    return KmsError(
        Reason.HSM_KEK_MISSING, "the token has no MAC key of ours: run `kms hsm init`, which adds it and touches nothing else"
    )
