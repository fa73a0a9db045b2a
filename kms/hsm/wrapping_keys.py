"""The token's own keys: KEKs, sealing keys, MAC keys, and the canaries that tell a broken token from an altered envelope.

They are token objects named `neo-kms <kek, seal, mac, canary, retired or records> <generation>`. An envelope names a key by its
CKA_ID, a UUID of ours. A generation is a KEK and a sealing key with the canary of both. The canary is made last: until then the
generation does not exist for a service, which is told which generation makes new envelopes. The object `retired` says that a
generation makes none, whatever the database says, and that its keys may be removed. The newest MAC key makes MACs. The object
`records` says that every record of the database has a MAC: from then on one without it is refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import pkcs11
from pkcs11 import Attribute, MechanismFlag, ObjectClass

from kms.domain.envelope import Envelope, lengths_prefixed, parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody
from kms.hsm import mechanisms, templates
from kms.hsm.errors import ALTERED_INPUT, MisfitError
from kms.hsm.public_keys import check_value
from kms.hsm.session import TokenSession
from kms.hsm.templates import Template

APPLICATION: Final = "neo-kms"
_LABEL: Final = re.compile(r"neo-kms (kek|seal|mac|canary|retired|records) ([1-9][0-9]{0,5})")
_KEY_BITS: Final = 256


class Kind(StrEnum):
    """What a token key of ours is for. A key wraps keys or seals envelopes, never both."""

    KEK = "kek"
    SEALING = "sealing"


_WORDS: Final[dict[str, Kind]] = {"kek": Kind.KEK, "seal": Kind.SEALING}
_LABELS: Final[dict[Kind, str]] = {Kind.KEK: "neo-kms kek {}", Kind.SEALING: "neo-kms seal {}"}
_MAC: Final = "mac"
_MAC_LABEL: Final = "neo-kms mac {}"
_RECORDS: Final = "records"
_RECORDS_LABEL: Final = "neo-kms records 1"
_CANARY: Final = "canary"
_CANARY_LABEL: Final = "neo-kms canary {}"
_RETIRED: Final = "retired"
_RETIRED_LABEL: Final = "neo-kms retired {}"
_DEMANDS: Final[dict[Kind, Template]] = {Kind.KEK: templates.WRAPPING_DEMANDS, Kind.SEALING: templates.SEALING_DEMANDS}
_CAPABILITIES: Final[dict[Kind, MechanismFlag]] = {
    Kind.KEK: templates.WRAPPING_CAPABILITIES,
    Kind.SEALING: templates.SEALING_CAPABILITIES,
}


@dataclass(frozen=True, slots=True)
class WrappingKey:
    """A KEK or sealing key that the token holds."""

    kind: Kind
    key_id: UUID
    generation: int


@dataclass(frozen=True, slots=True)
class MacKey:
    """An HMAC key that the token holds. No envelope names it."""

    key_id: UUID
    generation: int


@dataclass(frozen=True, slots=True)
class Canary:
    """A known envelope: an AES key made once, under one KEK and one sealing key, with its check value."""

    generation: int
    envelope: Envelope
    check_value: str

    def encode(self) -> bytes:
        """Return what the token object holds."""
        return f"{self.envelope.encode()} {self.check_value}".encode()

    def names(self, kek_id: UUID, sealing_key_id: UUID) -> bool:
        """Whether this canary was made with that KEK or that sealing key."""
        return self.envelope.kek_id == kek_id or self.envelope.sealing_key_id == sealing_key_id


@dataclass(frozen=True, slots=True)
class TokenKeys:
    """The names of the keys that a token holds, and what it says of them. A generation without its canary is not among them."""

    wrapping_keys: frozenset[WrappingKey]
    mac_keys: frozenset[MacKey]
    canaries: tuple[Canary, ...]
    retired: frozenset[int] = frozenset()
    says_records_have_macs: bool = False

    @property
    def generations(self) -> tuple[int, ...]:
        """Return the complete generations, the oldest first: those with a KEK, a sealing key and the canary of both."""
        return tuple(canary.generation for canary in self.canaries if self._is_of_its_generation(canary))

    @property
    def makers(self) -> tuple[int, ...]:
        """Return the generations that may make new envelopes, the oldest first: complete and not retired."""
        return tuple(generation for generation in self.generations if generation not in self.retired)

    def key_id(self, kind: Kind, generation: int) -> UUID | None:
        """Return the id of the key of a kind and generation, or None."""
        return next((key.key_id for key in self.wrapping_keys if key.kind is kind and key.generation == generation), None)

    def lacks_a_canary(self) -> bool:
        """Whether a key has no canary: it was lost, since a canary is made last. A retired generation may lack its keys, too."""
        return not {key.generation for key in self.wrapping_keys} - self.retired <= set(self.generations)

    def covers(self, earlier: "TokenKeys") -> bool:
        """Whether the token still holds every key that it held *earlier*, apart from generations that are retired now."""
        removable = {key for key in earlier.wrapping_keys if key.generation in self.retired}
        return self.wrapping_keys >= earlier.wrapping_keys - removable and self.mac_keys >= earlier.mac_keys

    def _is_of_its_generation(self, canary: Canary) -> bool:
        kek, sealing = (self.key_id(kind, canary.generation) for kind in (Kind.KEK, Kind.SEALING))
        return (canary.envelope.kek_id, canary.envelope.sealing_key_id) == (kek, sealing)


@dataclass(frozen=True, slots=True)
class TokenView:
    """What a connection knows of the token's keys, and the generation that makes new envelopes. It is replaced as a whole."""

    names: TokenKeys
    generation: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """What of ours the token holds, as one session sees it: keys with their objects, canaries, retired generations."""

    keys: dict[WrappingKey, Any]
    mac_keys: dict[MacKey, Any]
    canaries: tuple[Canary, ...]
    retired: frozenset[int] = frozenset()
    says_records_have_macs: bool = False

    @property
    def names(self) -> TokenKeys:
        """Return the names alone, without a generation that is not finished yet."""
        finished = frozenset(key for key in self.keys if key.generation <= self.newest_finished)
        return TokenKeys(finished, frozenset(self.mac_keys), self.canaries, self.retired, self.says_records_have_macs)

    @property
    def newest_finished(self) -> int:
        """Return the newest generation with a canary, 0 without one. A later one is not finished yet."""
        return max((canary.generation for canary in self.canaries), default=0)

    def of(self, kind: Kind) -> dict[UUID, Any]:
        """Return the objects of one kind by id."""
        return {key.key_id: item for key, item in self.keys.items() if key.kind is kind}

    def has(self, kind: Kind, generation: int) -> bool:
        """Whether there is a key of this kind and generation."""
        return any(key.kind is kind and key.generation == generation for key in self.keys)

    def newest_mac(self) -> Any | None:  # noqa: ANN401  # the binding makes a class for each object
        """Return the object of the newest MAC key, or None."""
        return self.mac_keys[max(self.mac_keys, key=lambda key: key.generation)] if self.mac_keys else None


def take_inventory(session: pkcs11.Session) -> Inventory:
    """Return what the token holds. Cheap as long as the token has few objects; raises HSM_UNAVAILABLE for an ambiguous one."""
    keys: dict[WrappingKey, Any] = {}
    mac_keys: dict[MacKey, Any] = {}
    for item in list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True})):
        named = _name(item)
        if named is not None and named[0] in _WORDS:
            keys[WrappingKey(_WORDS[named[0]], _uuid(item), named[1])] = item
        elif named is not None and named[0] == _MAC:
            mac_keys[MacKey(_uuid(item), named[1])] = item
    canaries, retired, says_records_have_macs = [], set(), False
    for named, item in _data_objects(session):
        if named[0] == _CANARY:
            canaries.append(_read_canary(named[1], bytes(item[Attribute.VALUE])))
        elif named[0] == _RETIRED:
            retired.add(named[1])
        says_records_have_macs = says_records_have_macs or named[0] == _RECORDS
    _refuse_doubles([(key.kind, key.generation, key.key_id) for key in keys])
    _refuse_doubles([(_MAC, key.generation, key.key_id) for key in mac_keys])
    canaries.sort(key=lambda canary: canary.generation)
    return Inventory(keys, mac_keys, tuple(canaries), frozenset(retired), says_records_have_macs)


def check_attributes(inventory: Inventory) -> None:
    """Raise HSM_UNAVAILABLE if a key of ours could do what its purpose excludes, or left the token's keeping."""
    for key, item in inventory.keys.items():
        _check_attributes(item, _DEMANDS[key.kind], f"{key.kind} key {key.key_id}")
    for mac_key, item in inventory.mac_keys.items():
        _check_attributes(item, templates.MAC_DEMANDS, f"MAC key {mac_key.key_id}")


def _check_attributes(item: Any, demands: Template, name: str) -> None:  # noqa: ANN401  # the binding makes a class for each object
    wrong = [attribute.name for attribute, value in demands.items() if _attribute(item, attribute) != value]
    if wrong:
        raise KmsError(Reason.HSM_UNAVAILABLE, f"the token's {name} has wrong attributes ({', '.join(wrong)}): it is not used")


def make_wrapping_key(session: pkcs11.Session, kind: Kind, key_id: UUID, generation: int) -> None:
    """Make a KEK or a sealing key as a token object: AES-256, one purpose, not extractable, not modifiable, not copyable."""
    session.generate_key(
        pkcs11.KeyType.AES,
        _KEY_BITS,
        id=key_id.bytes,
        label=_LABELS[kind].format(generation),
        store=True,
        capabilities=_CAPABILITIES[kind],
        template=dict(templates.TOKEN_KEY),
    )


def make_mac_key(session: pkcs11.Session, key_id: UUID, generation: int) -> None:
    """Make a MAC key as a token object: 32 bytes (RFC 2104 section 3), signs and verifies only, kept like the others."""
    session.generate_key(
        pkcs11.KeyType.GENERIC_SECRET,
        _KEY_BITS,
        id=key_id.bytes,
        label=_MAC_LABEL.format(generation),
        store=True,
        capabilities=templates.MAC_CAPABILITIES,
        template=dict(templates.TOKEN_KEY),
    )


def make_canary(session: TokenSession, generation: int) -> Canary:
    """Make the canary of the session's current KEK and sealing key and keep it in the token."""
    key = session.raw.generate_key(
        pkcs11.KeyType.AES, _KEY_BITS, capabilities=MechanismFlag.SIGN, template=dict(templates.CREATION)
    )
    value = check_value(key)
    wrapped = session.kek(session.kek_id).wrap_key(key, mechanism=mechanisms.WRAP)
    key.destroy()
    nonce, sealed = session.seal(wrapped, _canary_data(session.kek_id, session.sealing_key_id))
    envelope = Envelope(Custody.WRAPPED, session.kek_id, session.sealing_key_id, nonce, sealed)
    canary = Canary(generation, envelope, value)
    _write(session.raw, _CANARY_LABEL.format(generation), canary.encode())
    return canary


def say_records_have_macs(session: pkcs11.Session) -> None:
    """Record in the token that every record of the database has a MAC."""
    _write(session, _RECORDS_LABEL, b"1")


def say_retired(session: pkcs11.Session, generation: int) -> None:
    """Record in the token that a generation makes no new envelopes, and that its keys may be removed."""
    _write(session, _RETIRED_LABEL.format(generation), b"1")


def destroy_generation(session: pkcs11.Session, generation: int) -> None:
    """Remove the keys and the canary of a generation from the token, for ever. What says that it is retired stays.

    The canary goes first, so that nobody takes its failure for that of the token. What an interrupted run left is removed, too.
    """
    for named, item in _data_objects(session):
        if named == (_CANARY, generation):
            item.destroy()
    for key, item in take_inventory(session).keys.items():
        if key.generation == generation:
            item.destroy()


def destroy_unfinished(inventory: Inventory) -> None:
    """Remove the keys of a generation that has no canary yet. Does nothing to a token without a canary."""
    if not inventory.canaries:
        return
    for key, item in inventory.keys.items():
        if key.generation > max(inventory.newest_finished, *inventory.retired, 0):
            item.destroy()


def check_canary(session: TokenSession, canary: Canary) -> None:
    """Open *canary*. Raises `MisfitError` if it does not open to what it was, HSM_KEK_MISSING, or the binding's errors."""
    envelope = canary.envelope
    aad = _canary_data(envelope.kek_id, envelope.sealing_key_id)
    try:
        wrapped = session.unseal(envelope.sealing_key_id, envelope.nonce, envelope.sealed, aad)
        key = session.kek(envelope.kek_id).unwrap_key(
            ObjectClass.SECRET_KEY,
            pkcs11.KeyType.AES,
            wrapped,
            mechanism=mechanisms.WRAP,
            capabilities=MechanismFlag.SIGN,
            template=dict(templates.USE),
        )
    except ALTERED_INPUT:
        raise MisfitError from None
    try:
        if check_value(key) != canary.check_value:
            raise MisfitError
    finally:
        key.destroy()


def _write(session: pkcs11.Session, label: str, value: bytes) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.APPLICATION: APPLICATION,
            Attribute.LABEL: label,
            Attribute.VALUE: value,
        }
    )


def _data_objects(session: pkcs11.Session) -> list[tuple[tuple[str, int], Any]]:
    """Return the data objects of ours with what their labels say."""
    found = list(session.get_objects({Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True}))
    return [(named, item) for item in found if (named := _name(item)) is not None]


def _canary_data(kek_id: UUID, sealing_key_id: UUID) -> bytes:
    return lengths_prefixed(b"canary", kek_id.bytes, sealing_key_id.bytes)


def _name(item: Any) -> tuple[str, int] | None:  # noqa: ANN401  # the binding makes a class for each object
    match = _LABEL.fullmatch(_attribute(item, Attribute.LABEL) or "")
    return None if match is None else (match[1], int(match[2]))


def _attribute(item: Any, name: Attribute) -> Any:  # noqa: ANN401  # as above
    try:
        return item[name]
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive, UnicodeDecodeError, IndexError):
        return None


def _uuid(item: Any) -> UUID:  # noqa: ANN401  # as above
    value = bytes(_attribute(item, Attribute.ID) or b"")
    if len(value) != 16:
        raise KmsError(Reason.HSM_UNAVAILABLE, "the token has a key of ours whose CKA_ID is not a UUID of 16 bytes")
    return UUID(bytes=value)


def _read_canary(generation: int, value: bytes) -> Canary:
    envelope, _, check = value.decode("ascii", errors="replace").partition(" ")
    try:
        return Canary(generation, parse_envelope(envelope), check)
    except KmsError:
        raise KmsError(Reason.HSM_UNAVAILABLE, f"the token's canary {generation} cannot be read; restore the token") from None


def _refuse_doubles(keys: Iterable[tuple[str, int, UUID]]) -> None:
    names = [(kind, name) for kind, *both in keys for name in both]
    if len(set(names)) != len(names):
        raise KmsError(Reason.HSM_UNAVAILABLE, "the token has two keys of ours of one generation or one id")
