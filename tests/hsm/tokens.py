"""Token keys with known values, put into a test's own token with C_CreateObject, and envelopes made from them outside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import pkcs11
from cryptography.hazmat.primitives import cmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from pkcs11 import Attribute, ObjectClass

from kms.dev.softhsm import SoftToken
from kms.domain.envelope import Envelope, associated_data, lengths_prefixed
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial
from kms.hsm.connection import login
from kms.hsm.module import load_module
from tests.fixtures.softhsm import settings_of


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A KEK or sealing key whose value the test knows."""

    key_id: UUID = field(default_factory=uuid4)
    value: bytes = field(default_factory=lambda: os.urandom(32))


@contextmanager
def session_on(token: SoftToken) -> Iterator[pkcs11.Session]:
    """A logged-in session on *token*, which nothing else in this process may use meanwhile."""
    module = load_module(token.module)
    module.claim()
    try:
        yield login(module, settings_of(token))[1]
    finally:
        module.finalise()
        module.release()


def put_kek(session: pkcs11.Session, key: KnownKey, generation: int = 1, **changes: bool) -> None:
    """Import *key* as a KEK; *changes* are attributes that differ from what they should be."""
    _put(session, key, f"neo-kms kek {generation}", {Attribute.WRAP, Attribute.UNWRAP}, changes)


def put_sealing_key(session: pkcs11.Session, key: KnownKey, generation: int = 1) -> None:
    """Import *key* as a sealing key."""
    _put(session, key, f"neo-kms seal {generation}", {Attribute.ENCRYPT, Attribute.DECRYPT}, {})


def put_mac_key(session: pkcs11.Session, key: KnownKey, generation: int = 1, **changes: bool) -> None:
    """Import *key* as a MAC key; *changes* as for `put_kek`."""
    operations = {Attribute.SIGN, Attribute.VERIFY}
    _put(session, key, f"neo-kms mac {generation}", operations, changes, pkcs11.KeyType.GENERIC_SECRET)


def put_canary(session: pkcs11.Session, kek: KnownKey, sealing: KnownKey, generation: int = 1) -> None:
    """Make a canary of both keys outside the token and import it."""
    secret, nonce = os.urandom(32), os.urandom(12)
    aad = lengths_prefixed(b"canary", kek.key_id.bytes, sealing.key_id.bytes)
    sealed = AESGCM(sealing.value).encrypt(nonce, aes_key_wrap_with_padding(kek.value, secret), aad)
    envelope = Envelope(Custody.WRAPPED, kek.key_id, sealing.key_id, nonce, sealed)
    put_canary_text(session, f"{envelope.encode()} {kcv(secret)}", generation)


def put_canary_text(session: pkcs11.Session, text: str, generation: int = 1) -> None:
    """Import *text* as a canary."""
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.APPLICATION: "neo-kms",
            Attribute.LABEL: f"neo-kms canary {generation}",
            Attribute.VALUE: text.encode(),
        }
    )


def prepare(token: SoftToken, kek: KnownKey, sealing: KnownKey, mac: KnownKey | None = None) -> None:
    """Give a blank *token* known keys and their canary."""
    with session_on(token) as session:
        put_kek(session, kek)
        put_sealing_key(session, sealing)
        put_mac_key(session, mac or KnownKey())
        put_canary(session, kek, sealing)


def kcv(secret: bytes) -> str:
    """Return the check value of an AES key."""
    mac = cmac.CMAC(AES(secret))
    mac.update(bytes(16))
    return "kcv:" + mac.finalize()[:3].hex()


def wrapped(identity: KeyIdentity, secret: bytes, public_key: str, kek: KnownKey, sealing: KnownKey) -> HeldKey:
    """Return *secret* (PKCS #8, or the bare AES key) in a WRAPPED envelope made here."""
    inner = aes_key_wrap_with_padding(kek.value, secret)
    return _sealed(identity, Custody.WRAPPED, inner, public_key, kek.key_id, sealing)


def sealed(identity: KeyIdentity, secret: bytes, public_key: str, sealing: KnownKey) -> HeldKey:
    """Return *secret* (the raw private key) in a SEALED envelope made here."""
    return _sealed(identity, Custody.SEALED, secret, public_key, UUID(int=0), sealing)


def _sealed(identity: KeyIdentity, custody: Custody, inner: bytes, public_key: str, kek_id: UUID, sealing: KnownKey) -> HeldKey:
    nonce = os.urandom(12)
    aad = associated_data(identity, custody=custody, public_key=public_key, sealing_key_id=sealing.key_id, kek_id=kek_id)
    envelope = Envelope(custody, kek_id, sealing.key_id, nonce, AESGCM(sealing.value).encrypt(nonce, inner, aad))
    return HeldKey(identity, KeyMaterial(custody, public_key, envelope.encode()), version=1)


def _put(
    session: pkcs11.Session,
    key: KnownKey,
    label: str,
    operations: set[Attribute],
    changes: dict[str, bool],
    key_type: pkcs11.KeyType = pkcs11.KeyType.AES,
) -> None:
    names = ("WRAP", "UNWRAP", "ENCRYPT", "DECRYPT", "SIGN", "VERIFY", "DERIVE")
    attributes: dict[Attribute, Any] = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.VALUE: key.value,
        Attribute.ID: key.key_id.bytes,
        Attribute.LABEL: label,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.MODIFIABLE: False,
        Attribute.COPYABLE: False,
        **{Attribute[name]: Attribute[name] in operations for name in names},
        **{Attribute[name]: value for name, value in changes.items()},
    }
    session.create_object(attributes)
