"""`kms hsm init`, `kms kek` and what goes with them: making and removing the token's own keys, trying a copy of a token.

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
from kms.hsm.connection import as_token_session, check_complete, first_maker, login
from kms.hsm.errors import MisfitError, translate, unavailable
from kms.hsm.hardening import protect_memory
from kms.hsm.module import load_module
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.wrapping_keys import (
    Inventory,
    Kind,
    MacKey,
    TokenView,
    WrappingKey,
    check_attributes,
    check_canary,
    destroy_generation,
    destroy_unfinished,
    make_canary,
    make_mac_key,
    make_wrapping_key,
    say_records_have_macs,
    say_retired,
    take_inventory,
)

T = TypeVar("T")
_FIRST: Final = 1


@dataclass(frozen=True, slots=True)
class TokenDescription:
    """What a token says of itself, and what of ours it holds: of the wrapping keys those of `generations`, which are complete."""

    label: str
    serial: str
    model: str
    manufacturer: str
    module: str
    wrapping_keys: tuple[WrappingKey, ...]
    mac_keys: tuple[MacKey, ...]
    generations: tuple[int, ...]
    retired: frozenset[int]


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
        return _described(settings, token, _checked(session))

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
        inventory = _checked(session)
        opened = _opened(session, inventory, first_maker(inventory.names))
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
            yield _opened(session, inventory, first_maker(inventory.names)).mac
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None


def rotate(settings: HsmSettings) -> TokenDescription:
    """Make the next generation of KEK and sealing key with their canary, and return what the token holds then.

    What an interrupted run left of a generation is destroyed first. Raises HSM_UNAVAILABLE, HSM_KEK_MISSING for a token without
    keys.
    """

    def make(token: pkcs11.Token, session: pkcs11.Session) -> TokenDescription:
        # Nothing was made under a generation without its canary, and a key of it may lack its value.
        destroy_unfinished(take_inventory(session))
        inventory = _checked(session)
        # Retired generations count, too: a number is never given twice.
        _make_generation(session, inventory, max(*inventory.names.generations, *inventory.retired, 0) + 1)
        return _described(settings, token, _checked(session))

    with _alone(settings):
        return _with_token(settings, make)


def retire(settings: HsmSettings, generation: int) -> None:
    """Have the token say, once, that *generation* makes no new envelopes. Raises KEK_IN_USE unless a later one does."""

    def record(_: pkcs11.Token, session: pkcs11.Session) -> None:
        names = take_inventory(session).names
        if generation in names.retired:
            return
        if generation not in names.makers or generation == names.makers[-1]:
            raise KmsError(Reason.KEK_IN_USE, "only a generation that the token holds is retired, and never the newest")
        say_retired(session, generation)

    with _alone(settings):
        _with_token(settings, record)


def destroy(settings: HsmSettings, generation: int) -> None:
    """Remove the keys of *generation* from the token, for ever. Raises KEK_IN_USE unless the token says that it is retired."""

    def remove(_: pkcs11.Token, session: pkcs11.Session) -> None:
        inventory = take_inventory(session)
        if generation not in inventory.retired:
            raise KmsError(Reason.KEK_IN_USE, f"generation {generation} is not retired: run `kms kek retire {generation}` first")
        destroy_generation(session, generation)

    with _alone(settings):
        _with_token(settings, remove)


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
    if not inventory.keys and not inventory.mac_keys and not inventory.canaries and not inventory.says_records_have_macs:
        say_records_have_macs(session)
    if not inventory.mac_keys:
        make_mac_key(session, _new_id(session), _FIRST)
    # A canary is made last: where there is one, its keys are there or were lost, and lost keys are not made anew.
    if not inventory.canaries:
        _make_generation(session, inventory, _FIRST)


def _make_generation(session: pkcs11.Session, inventory: Inventory, generation: int) -> None:
    """Make what *generation* lacks: its KEK, its sealing key, and last their canary."""
    for kind in Kind:
        if not inventory.has(kind, generation):
            make_wrapping_key(session, kind, _new_id(session), generation)
    made = take_inventory(session)
    check_attributes(made)
    make_canary(_opened(session, made, generation), generation)


def _checked(session: pkcs11.Session) -> Inventory:
    """Return what the token holds, with the attributes it must have, and complete."""
    inventory = take_inventory(session)
    check_attributes(inventory)
    check_complete(inventory)
    return inventory


def _opened(session: pkcs11.Session, inventory: Inventory, generation: int) -> TokenSession:
    return as_token_session(session, inventory, TokenView(inventory.names, generation), frozenset())


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
        wrapping_keys=tuple(sorted(inventory.names.wrapping_keys, key=lambda key: (key.kind, key.generation))),
        mac_keys=tuple(sorted(inventory.mac_keys, key=lambda key: key.generation)),
        generations=inventory.names.generations,
        retired=inventory.retired,
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
