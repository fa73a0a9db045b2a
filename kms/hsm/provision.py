"""`kms hsm init` and what goes with it: making the token's own keys, describing a token, trying a copy of one.

Each function has the module to itself while it runs: they are for commands, not for a process that serves.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID

import pkcs11

from kms.domain.errors import KmsError, Reason
from kms.hsm.connection import as_token_session, check_complete, login
from kms.hsm.errors import MisfitError, translate, unavailable
from kms.hsm.hardening import protect_memory
from kms.hsm.module import load_module
from kms.hsm.settings import HsmSettings
from kms.hsm.wrapping_keys import (
    Inventory,
    Kind,
    MacKey,
    WrappingKey,
    check_attributes,
    check_canary,
    make_canary,
    make_mac_key,
    make_wrapping_key,
    say_records_have_macs,
    take_inventory,
)

T = TypeVar("T")
_FIRST: Final = 1


@dataclass(frozen=True, slots=True)
class TokenDescription:
    """What a token says of itself, and what of ours it holds."""

    label: str
    serial: str
    model: str
    manufacturer: str
    module: str
    wrapping_keys: tuple[WrappingKey, ...]
    mac_keys: tuple[MacKey, ...]
    canaries: int


def init(settings: HsmSettings) -> TokenDescription:
    """Make the first KEK, sealing key, MAC key and canary in the token, and return what it holds then.

    What is missing is added (after an interrupted run, or a MAC key to a token older than those) and what exists is not
    touched. Raises NAME_TAKEN if the token already has them all; HSM_UNAVAILABLE.
    """

    def make(token: pkcs11.Token, session: pkcs11.Session) -> TokenDescription:
        inventory = take_inventory(session)
        check_attributes(inventory)
        if inventory.canaries and inventory.mac_keys:
            raise KmsError(Reason.NAME_TAKEN, "the token already has all keys of ours: they are never overwritten")
        _add_missing(session, inventory)
        made = take_inventory(session)
        check_attributes(made)
        check_complete(made)
        return _described(settings, token, made)

    # PKCS #11 has no lock that outlives a call, and two that look at once would both make.
    with _alone(settings):
        return _with_token(settings, make)


def describe(settings: HsmSettings) -> TokenDescription:
    """Return what the token says and holds. Raises HSM_UNAVAILABLE."""
    return _with_token(settings, lambda token, session: _described(settings, token, take_inventory(session)))


def check_copy(settings: HsmSettings) -> TokenDescription:
    """Return what a copy of a token holds, having opened every canary in it.

    Raises HSM_KEK_MISSING for a copy without all keys and HSM_UNAVAILABLE for one that does not open what it should.
    """

    def check(token: pkcs11.Token, session: pkcs11.Session) -> TokenDescription:
        inventory = take_inventory(session)
        check_attributes(inventory)
        check_complete(inventory)
        opened = as_token_session(session, inventory, frozenset())
        try:
            for canary in inventory.canaries:
                check_canary(opened, canary)
        except MisfitError:
            raise unavailable("the copy does not open its canary: it is not a usable copy of the token") from None
        return _described(settings, token, inventory)

    return _with_token(settings, check)


@contextmanager
def token_mac(settings: HsmSettings) -> Iterator[Callable[[bytes], bytes]]:
    """Yield HMAC-SHA-256 under the token's MAC key, for a command. Raises HSM_UNAVAILABLE, and HSM_KEK_MISSING without one."""
    with _logged_in(settings) as (_, session):
        try:
            inventory = take_inventory(session)
            check_attributes(inventory)
            yield as_token_session(session, inventory, frozenset()).mac
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None


def records_have_macs(settings: HsmSettings) -> bool:
    """Whether the token says that every record of the database has a MAC."""
    return _with_token(settings, lambda _, session: take_inventory(session).says_records_have_macs)


def record_that_records_have_macs(settings: HsmSettings) -> None:
    """Record in the token, once, that every record of the database has a MAC."""

    def record(_: pkcs11.Token, session: pkcs11.Session) -> None:
        if not take_inventory(session).says_records_have_macs:
            say_records_have_macs(session)

    with _alone(settings):
        _with_token(settings, record)


def _add_missing(session: pkcs11.Session, inventory: Inventory) -> None:
    # First of all: of a token that has nothing yet there are no records, and there never will be any without a MAC.
    if not inventory.own and not inventory.canaries and not inventory.says_records_have_macs:
        say_records_have_macs(session)
    if not inventory.mac_keys:
        make_mac_key(session, _new_id(session), _FIRST)
    # A canary is made last: where there is one, its keys are there or were lost, and lost keys are not made anew.
    for kind in Kind if not inventory.canaries else ():
        if inventory.newest(kind) is None:
            make_wrapping_key(session, kind, _new_id(session), _FIRST)
    made = take_inventory(session)
    check_attributes(made)
    if not inventory.canaries:
        make_canary(as_token_session(session, made, frozenset()), _FIRST)


@contextmanager
def _alone(settings: HsmSettings) -> Iterator[None]:
    """Wait until no other process of this host provisions a token of the module: the lock is on the module's file."""
    try:
        descriptor = os.open(settings.module, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unavailable(f"the HSM module cannot be read: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _new_id(session: pkcs11.Session) -> UUID:
    return UUID(bytes=session.generate_random(128), version=4)


def _described(settings: HsmSettings, token: pkcs11.Token, inventory: Inventory) -> TokenDescription:
    return TokenDescription(
        label=token.label,
        serial=token.serial.decode("ascii", errors="replace"),
        model=token.model,
        manufacturer=token.manufacturer_id,
        module=load_module(settings.module).library.library_description,
        wrapping_keys=tuple(sorted(inventory.keys, key=lambda key: (key.kind, key.generation))),
        mac_keys=tuple(sorted(inventory.mac_keys, key=lambda key: key.generation)),
        canaries=len(inventory.canaries),
    )


def _with_token(settings: HsmSettings, work: Callable[[pkcs11.Token, pkcs11.Session], T]) -> T:
    with _logged_in(settings) as (token, session):
        try:
            return work(token, session)
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None


@contextmanager
def _logged_in(settings: HsmSettings) -> Iterator[tuple[pkcs11.Token, pkcs11.Session]]:
    protect_memory()
    module = load_module(settings.module)
    module.claim()
    try:
        yield login(module, settings)
    finally:
        module.finalise()
        module.release()
