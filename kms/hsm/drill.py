"""Opening envelopes without using what is in them: whether a token and a backup belong together.

An envelope is unsealed, and a WRAPPED key unwrapped into the token and destroyed there. Nothing is signed, encrypted or
decrypted with it. The seal binds the whole record, public key included, so that an opened envelope is the record's own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import pkcs11

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import Custody, HeldKey
from kms.hsm.connection import connect
from kms.hsm.envelopes import unsealed, unwrap_for_use
from kms.hsm.errors import ALTERED_INPUT, MisfitError, translate
from kms.hsm.module import load_module
from kms.hsm.residents import find_resident
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings


class Outcome(StrEnum):
    """What became of an envelope. KEK_MISSING: this token lacks a key of its own that the envelope names."""

    OPENED = "opened"
    KEK_MISSING = "kek_missing"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Drill:
    """How many envelopes came to which outcome, and the keys of those that did not open."""

    opened: int
    kek_missing: tuple[KeyId, ...]
    invalid: tuple[KeyId, ...]


def open_envelopes(settings: HsmSettings, keys: Iterable[HeldKey]) -> Drill:
    """Open the envelope of each of *keys* in the token, which opens its own canaries first, and return what became of them.

    Raises HSM_UNAVAILABLE, or HSM_KEK_MISSING for a token without any keys of ours. Has the module to itself.
    """
    module = load_module(settings.module)
    module.claim()
    try:
        connection = connect(module, settings)
        try:
            session = connection.open_session()
            found = [(key.identity.key_id, outcome_of(session, key)) for key in keys]
        except pkcs11.PKCS11Error as error:
            raise translate(error) from None
    finally:
        module.finalise()
        module.release()

    def of(outcome: Outcome) -> tuple[KeyId, ...]:
        return tuple(key_id for key_id, each in found if each is outcome)

    return Drill(len(of(Outcome.OPENED)), of(Outcome.KEK_MISSING), of(Outcome.INVALID))


def outcome_of(session: TokenSession, key: HeldKey) -> Outcome:
    """Open the envelope of *key* and return what became of it. Raises HSM_UNAVAILABLE, and the binding's errors."""
    try:
        _open(session, key)
    except KmsError as error:
        if error.reason is Reason.HSM_KEK_MISSING:
            return Outcome.KEK_MISSING
        if error.reason is Reason.ENVELOPE_INVALID:
            return Outcome.INVALID
        raise
    except (MisfitError, *ALTERED_INPUT):
        return Outcome.INVALID
    return Outcome.OPENED


def _open(session: TokenSession, key: HeldKey) -> None:
    envelope, inner = unsealed(session, key)
    if envelope.custody is Custody.WRAPPED:
        unwrap_for_use(session, key.identity.spec, envelope.kek_id, inner).destroy()
    elif envelope.custody is Custody.RESIDENT and len(find_resident(session.raw, inner)) != 1:
        raise MisfitError
