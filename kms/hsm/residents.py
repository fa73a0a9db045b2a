"""RESIDENT keys in the token, and the marks of those whose creation has not ended; within one session.

A RESIDENT key is a private or secret key of the token with a label of ours. Its CKA_ID is the key's id. The label names what
the key is bound to, and cannot be changed. A mark is a private data object that names the key in its label and holds a time.
"""

import re
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import pkcs11
from pkcs11 import Attribute, ObjectClass

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.residents import Holdings, Mark
from kms.hsm import templates
from kms.hsm.errors import unavailable

APPLICATION: Final = "neo-kms"
_MARK_LABEL: Final = "neo-kms pending {}"
_MARK: Final = re.compile(r"neo-kms pending ([0-9a-f]{32})")
_LABEL: Final = re.compile(rf"{templates.RESIDENT_LABEL}(?: (.+))?")
_ID_BYTES: Final = 16
_KEY_CLASSES: Final = (ObjectClass.PRIVATE_KEY, ObjectClass.SECRET_KEY)
_Objects = list[Any]  # the binding makes a class for each object


def resident_label(bound_to: str) -> str:
    """Return the label of a RESIDENT key that is bound to *bound_to*, or to nothing where that is empty."""
    return f"{templates.RESIDENT_LABEL} {bound_to}" if bound_to else templates.RESIDENT_LABEL


def find_resident(session: pkcs11.Session, key_id: bytes) -> _Objects:
    """Return the RESIDENT keys with this CKA_ID. No other object of the token is returned, whatever its id."""
    found: _Objects = []
    for kind in _KEY_CLASSES:
        found += session.get_objects({Attribute.CLASS: kind, Attribute.TOKEN: True, Attribute.ID: key_id})
    return [item for item in found if _bound_to(item) is not None]


def take_holdings(session: pkcs11.Session) -> Holdings:
    """Return the RESIDENT keys and the marks of the token. Objects come first: a key is marked before it is made."""
    return Holdings(resident_keys(session), _marks(session))


def resident_keys(session: pkcs11.Session) -> dict[KeyId, str]:
    """Return the RESIDENT keys of the token, each with what it is bound to."""
    found: dict[KeyId, str] = {}
    for kind in _KEY_CLASSES:
        for item in list(session.get_objects({Attribute.CLASS: kind, Attribute.TOKEN: True})):
            if (bound_to := _bound_to(item)) is not None and len(key_id := bytes(item[Attribute.ID])) == _ID_BYTES:
                found[KeyId(UUID(bytes=key_id))] = bound_to
    return found


def write_mark(session: pkcs11.Session, key_id: KeyId) -> None:
    """Write the mark of a key that is about to be made, unless it is there."""
    now = datetime.now(UTC)  # noqa: TID251  # the evidence of an unfinished key must not come from the database
    if not _marks_of(session, key_id):
        session.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.TOKEN: True,
                Attribute.PRIVATE: True,
                Attribute.APPLICATION: APPLICATION,
                Attribute.LABEL: _MARK_LABEL.format(key_id.hex),
                Attribute.VALUE: now.isoformat().encode(),
            }
        )


def confirm(session: pkcs11.Session, key_id: KeyId) -> None:
    """Remove the mark of a key whose row is stored. Raises HSM_UNAVAILABLE where the token does not hold the key."""
    if not find_resident(session, key_id.bytes):
        raise unavailable("the token does not hold the key")
    _destroy(_marks_of(session, key_id))


def abandon(session: pkcs11.Session, key_id: KeyId) -> bool:
    """Remove a key that has a mark, then the mark. Leaves a key without a mark alone: that key was finished.

    Returns whether the token is without the key now.
    """
    found, marks = find_resident(session, key_id.bytes), _marks_of(session, key_id)
    if marks:
        _destroy(found)
        _destroy(marks)
    return bool(marks) or not found


def discard(session: pkcs11.Session, key_id: KeyId, bound_to: str) -> None:
    """Remove a finished key and any mark. Raises WRONG_PURPOSE for a key that is bound, here or in the token."""
    found = find_resident(session, key_id.bytes)
    if bound_to or any(_bound_to(item) for item in found):
        raise KmsError(Reason.WRONG_PURPOSE, "this key belongs to the service itself, and is never removed from the token")
    _destroy(found)
    _destroy(_marks_of(session, key_id))


def _marks(session: pkcs11.Session) -> dict[KeyId, Mark]:
    found: dict[KeyId, Mark] = {}
    for item in list(session.get_objects({Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True})):
        if match := _MARK.fullmatch(_label(item)):
            found[KeyId(UUID(match[1]))] = Mark(_moment(bytes(item[Attribute.VALUE])))
    return found


def _marks_of(session: pkcs11.Session, key_id: KeyId) -> _Objects:
    label = _MARK_LABEL.format(key_id.hex)
    return list(session.get_objects({Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True, Attribute.LABEL: label}))


def _moment(value: bytes) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value.decode("ascii"))
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


def _bound_to(item: Any) -> str | None:  # noqa: ANN401  # the binding makes a class for each object
    match = _LABEL.fullmatch(_label(item))
    return None if match is None else match[1] or ""


def _label(item: Any) -> str:  # noqa: ANN401  # as above
    try:
        return item[Attribute.LABEL] or ""
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive, UnicodeDecodeError, IndexError):
        return ""


def _destroy(items: _Objects) -> None:
    for item in items:
        item.destroy()
