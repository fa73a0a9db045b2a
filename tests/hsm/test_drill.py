"""A drill opens envelopes, tells those that do not open apart, and uses no key."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody, HeldKey
from kms.hsm.drill import Drill, open_envelopes
from kms.hsm.public_keys import to_pem
from tests.fixtures.softhsm import OpenHsm, settings_of
from tests.hsm.keys import identity_of, new_key
from tests.hsm.tokens import KnownKey, kcv, sealed, wrapped

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
P256 = key_spec(KeyType.SECP256R1, Purpose.SIGNING, None)


def pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def aes(kek: KnownKey, sealing: KnownKey) -> HeldKey:
    secret = os.urandom(32)
    return wrapped(identity_of(AES), secret, kcv(secret), kek, sealing)


def test_what_opens_and_what_does_not_is_told_apart(blank_token: SoftToken, keks: tuple[KnownKey, KnownKey]) -> None:
    kek, sealing = keks
    good, elsewhere, moved = aes(kek, sealing), aes(kek, KnownKey()), aes(KnownKey(), sealing)
    inside = os.urandom(32)
    raw = sealed(identity_of(AES), inside, kcv(inside), sealing)
    swapped = replace(good, identity=identity_of(AES))
    text = replace(good, identity=identity_of(AES), material=replace(good.material, envelope="x"))
    broken = wrapped(identity_of(AES), inside, kcv(inside), replace(kek, value=os.urandom(32)), sealing)
    found = open_envelopes(settings_of(blank_token), [good, elsewhere, moved, raw, swapped, text, broken])
    ids = [key.identity.key_id for key in (elsewhere, moved, swapped, text, broken)]
    assert found == Drill(2, tuple(ids[:2]), tuple(ids[2:]))


def test_an_opened_key_is_not_used(blank_token: SoftToken, keks: tuple[KnownKey, KnownKey]) -> None:
    # Its public half is another's: any use would show it.
    mine, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    key = wrapped(identity_of(P256), pkcs8(mine), to_pem(other.public_key()), *keks)
    assert open_envelopes(settings_of(blank_token), [key]).opened == 1


async def test_a_resident_key_opens_where_its_object_is(opened: OpenHsm, soft_token: SoftToken) -> None:
    hsm = await opened()
    kept, lost = await new_key(hsm, P256, Custody.RESIDENT), await new_key(hsm, P256, Custody.RESIDENT)
    await hsm.discard(lost.identity.key_id, "")
    await hsm.close()
    assert open_envelopes(settings_of(soft_token), [kept, lost]) == Drill(1, (), (lost.identity.key_id,))


def test_a_token_without_keys_of_ours_is_refused(blank_token: SoftToken, enter_blank: Callable[[], None]) -> None:
    enter_blank()
    with pytest.raises(KmsError) as caught:
        open_envelopes(settings_of(blank_token), [])
    assert caught.value.reason is Reason.HSM_KEK_MISSING
