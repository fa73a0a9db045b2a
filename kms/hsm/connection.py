"""One life of the initialised module: the login, the token's own keys, and the sessions opened from it.

`Session.close()` of the binding logs the whole token out and a second login is refused, so one session logs in and stays;
every other session opens without the PIN.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import pkcs11
import structlog

from kms.domain.algorithms import Hash
from kms.domain.envelope import Envelope
from kms.domain.errors import KmsError, Reason
from kms.hsm.errors import MisfitError, translate, unavailable
from kms.hsm.module import Module
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.wrapping_keys import Inventory, Kind, TokenKeys, TokenView, check_attributes, check_canary, take_inventory

_SPARE_WAIT_SECONDS: Final = 2.0
_CANARY_SHARED_SECONDS: Final = 0.02
_LOOK_ATTEMPTS: Final = 3
_LOOK_PAUSE_SECONDS: Final = 0.02

_log = structlog.get_logger(__name__)


class Connection:
    """A logged-in token. Ends with `close` or when the module is initialised anew; sessions of it are then void."""

    def __init__(self, module: Module, token: pkcs11.Token, login: pkcs11.Session, inventory: Inventory) -> None:
        self.module = module
        self.token = token
        self._login = login
        self.view = TokenView(inventory.names, first_maker(inventory.names))
        self.oaep_hashes: frozenset[Hash] = frozenset()
        self.sessions = 1
        self._counting = threading.Lock()
        self._spare = threading.Semaphore(1)
        self._searching = threading.Lock()
        self._canary_good_at = 0.0
        self._looking = threading.Lock()
        self._looked_at = 0.0

    @property
    def serial(self) -> str:
        """The token's serial number as text."""
        return self.token.serial.decode("ascii", errors="replace")

    @property
    def names(self) -> TokenKeys:
        """What is known of the token's own keys. It changes while the connection lives."""
        return self.view.names

    @contextmanager
    def token_objects(self) -> Iterator[None]:
        """Hold this while searching for or writing token objects: SoftHSM fails a search during another session's write."""
        with self._searching:
            yield

    def open_session(self) -> TokenSession:
        """Open a session that sees the token's keys, and note keys that are new or gone. Sessions from before are outdated then.

        Raises HSM_UNAVAILABLE or the binding's errors.
        """
        raw = self.token.open(rw=True)
        with self._counting:
            self.sessions += 1
        try:
            with self.token_objects():
                inventory = take_inventory(raw)
                view = self._seen(raw, inventory)
            return as_token_session(raw, inventory, view, self.oaep_hashes)
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

    def look_at_keys(self) -> None:
        """Note keys of the token's own that are new or gone. Callers of the same moment share a look that began after they asked.

        Raises as `spare_session` does.
        """
        asked_at = time.monotonic()
        with self._looking:
            began_at = time.monotonic()
            if self._looked_at < asked_at:
                with self.spare_session():
                    self._looked_at = began_at

    def make_under(self, generation: int) -> None:
        """Make new envelopes under *generation* from now on. Does nothing if the token lacks it, or says that it is retired."""
        with self.token_objects():
            if generation != self.view.generation and generation in self.names.makers:
                self.view = TokenView(self.names, generation)

    def _seen(self, raw: pkcs11.Session, inventory: Inventory) -> TokenView:
        names = inventory.names
        if names == self.names:
            return self.view
        # SoftHSM opens sessions on a token whose files are gone; they see no keys.
        if not names.covers(self.names):
            raise unavailable("the token no longer shows its keys")
        check_attributes(inventory)
        generation = self.view.generation if self.view.generation in names.makers else first_maker(names)
        view = TokenView(names, generation)
        self.check_canaries(as_token_session(raw, inventory, view, self.oaep_hashes), None)
        self.view = view
        _log.info("hsm_keys_changed", generations=names.generations, retired=sorted(names.retired), makes=generation)
        return view

    def check_canaries(self, session: TokenSession, envelope: Envelope | None) -> None:
        """Raise HSM_UNAVAILABLE unless the canaries open that *envelope*'s keys concern; None means all of them."""
        try:
            for canary in session.view.names.canaries:
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
        try:
            self.check_canaries(session, None)
        except KmsError:
            # Keys of a retired generation may have been removed since this session was opened.
            with self.spare_session() as fresh:
                self.check_canaries(fresh, None)

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
        check_complete(inventory)
        connection = Connection(module, token, session, inventory)
        connection.check_canaries(as_token_session(session, inventory, connection.view, frozenset()), None)
    except pkcs11.PKCS11Error as error:
        raise translate(error) from None
    return connection


def check_complete(inventory: Inventory) -> None:
    """Raise HSM_KEK_MISSING unless there is a generation that makes envelopes, and no key has lost its canary."""
    first_maker(inventory.names)
    if inventory.names.lacks_a_canary():
        raise _not_initialised()


def first_maker(names: TokenKeys) -> int:
    """Return the oldest generation that makes envelopes: the one until another is named. Raises HSM_KEK_MISSING."""
    if not names.makers:
        raise _not_initialised()
    return names.makers[0]


def as_token_session(raw: pkcs11.Session, inventory: Inventory, view: TokenView, oaep_hashes: frozenset[Hash]) -> TokenSession:
    """Return *raw* with the keys of *inventory*, which it took. Raises HSM_KEK_MISSING where one is not there."""
    keks, sealing_keys = inventory.of(Kind.KEK), inventory.of(Kind.SEALING)
    made = {key.kind: key.key_id for key in inventory.keys if key.generation == view.generation}
    mac_key = inventory.newest_mac()
    if made.keys() != set(Kind):
        raise _not_initialised()
    if mac_key is None:
        raise _no_mac_key()
    return TokenSession(raw, keks, sealing_keys, made[Kind.KEK], made[Kind.SEALING], mac_key, oaep_hashes, view)


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
