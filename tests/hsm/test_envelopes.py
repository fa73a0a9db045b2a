"""Envelopes: made as documented, bound to their rows, and never blamed for what the token or its keys lack."""

import base64
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import KeySpec, KeyType, Purpose, key_spec
from kms.domain.envelope import parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody, HeldKey
from kms.hsm import connection
from kms.hsm.capabilities import Capabilities
from kms.hsm.public_keys import to_pem
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import TokenHsm, open_hsm
from kms.hsm.wrapping_keys import Canary, check_canary
from tests.fixtures.softhsm import OpenHsm, settings_of
from tests.hsm.keys import identity_of, new_key, use
from tests.hsm.tokens import KnownKey, kcv, prepare, put_canary, put_kek, put_sealing_key, sealed, session_on, wrapped

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
ED25519 = key_spec(KeyType.ED25519, Purpose.SIGNING, None)
RSA_ENCRYPTION = key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048)
RSA_SIGNING = key_spec(KeyType.RSA, Purpose.SIGNING, 2048)

Private = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


async def reason_of_use(hsm: TokenHsm, key: HeldKey) -> Reason:
    with pytest.raises(KmsError) as caught:
        await use(hsm, key)
    return caught.value.reason


def with_envelope(key: HeldKey, raw: bytes) -> HeldKey:
    return replace(key, material=replace(key.material, envelope=base64.b64encode(raw).decode()))


def pkcs8(private: Private) -> bytes:
    form = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.private_bytes(*form)


async def test_no_byte_of_an_envelope_can_be_changed(hsm: TokenHsm) -> None:
    key = await new_key(hsm, AES)
    raw = base64.b64decode(key.material.envelope)
    for position in range(len(raw)):
        altered = with_envelope(key, raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        # An id that no key of the token has: the envelope may be sound and the key elsewhere.
        names_another_sealing_key = 18 <= position < 34
        expected = Reason.HSM_KEK_MISSING if names_another_sealing_key else Reason.ENVELOPE_INVALID
        assert await reason_of_use(hsm, altered) is expected, position
    await use(hsm, key)
    assert hsm.is_available()


async def test_a_truncated_or_lengthened_envelope_is_invalid(hsm: TokenHsm) -> None:
    key = await new_key(hsm, SECP256K1)
    raw = base64.b64decode(key.material.envelope)
    for altered in (b"", raw[:1], raw[:46], raw[:62], raw[:-1], raw + b"\0"):
        assert await reason_of_use(hsm, with_envelope(key, altered)) is Reason.ENVELOPE_INVALID
    text = replace(key, material=replace(key.material, envelope="not base64!"))
    assert await reason_of_use(hsm, text) is Reason.ENVELOPE_INVALID


async def test_a_bad_row_costs_the_others_nothing(opened: OpenHsm) -> None:
    hsm = await opened(lanes=1, watch_seconds=30.0)  # the watch opens its session at its first look
    keys = [await new_key(hsm, SECP256K1) for _ in range(4)]
    for key in keys:
        await use(hsm, key)
    before = hsm.status()
    for key in keys:
        bad = replace(key, identity=identity_of(SECP256K1))
        assert await reason_of_use(hsm, bad) is Reason.ENVELOPE_INVALID
    after = hsm.status()
    assert (after.handles, after.sessions) == (before.handles, before.sessions)


@pytest.mark.parametrize("curve", ["secp256k1", "secp256r1"])
@pytest.mark.parametrize("scalar", [1, 2**240, 2**255 + 12345], ids=["1", "31 bytes", "32 bytes"])
async def test_a_wrapped_envelope_made_elsewhere_as_documented_opens(
    known: TokenHsm, keks: tuple[KnownKey, KnownKey], curve: str, scalar: int
) -> None:
    private = ec.derive_private_key(scalar, ec.SECP256K1() if curve == "secp256k1" else ec.SECP256R1())
    spec = key_spec(KeyType(curve), Purpose.SIGNING, None)
    await use(known, wrapped(identity_of(spec), pkcs8(private), to_pem(private.public_key()), *keks))


async def test_an_aes_key_wrapped_elsewhere_opens(known: TokenHsm, keks: tuple[KnownKey, KnownKey]) -> None:
    for bits in (128, 192, 256):
        secret = os.urandom(bits // 8)
        spec = key_spec(KeyType.AES, Purpose.ENCRYPTION, bits)
        await use(known, wrapped(identity_of(spec), secret, kcv(secret), *keks))


async def test_an_ed25519_key_sealed_elsewhere_opens(known: TokenHsm, keks: tuple[KnownKey, KnownKey]) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    await use(known, sealed(identity_of(ED25519), private.private_bytes_raw(), to_pem(private.public_key()), keks[1]))


@pytest.mark.parametrize("scalar", [1, 2**240], ids=["1", "31 bytes"])
async def test_a_short_scalar_sealed_elsewhere_opens(known: TokenHsm, keks: tuple[KnownKey, KnownKey], scalar: int) -> None:
    private = ec.derive_private_key(scalar, ec.SECP256K1())
    await use(known, sealed(identity_of(SECP256K1), scalar.to_bytes(32, "big"), to_pem(private.public_key()), keks[1]))


def a_pair(spec: KeySpec) -> tuple[bytes, str]:
    """Return a private key as an envelope holds it, and its public key or check value."""
    if spec.is_symmetric:
        secret = os.urandom(32)
        return secret, kcv(secret)
    private: Private = (
        rsa.generate_private_key(65537, 2048) if spec.key_type is KeyType.RSA else ec.generate_private_key(ec.SECP256K1())
    )
    return pkcs8(private), to_pem(private.public_key())


@pytest.mark.parametrize(
    "spec", [SECP256K1, RSA_SIGNING, RSA_ENCRYPTION, AES], ids=lambda spec: f"{spec.key_type} {spec.purpose}"
)
async def test_a_key_that_does_not_fit_its_public_half_is_never_used(
    known: TokenHsm, keks: tuple[KnownKey, KnownKey], spec: KeySpec
) -> None:
    # Made by somebody who has the token's keys and swaps the private half: only the proof before first use can tell.
    (secret, public), (other_secret, _) = a_pair(spec), a_pair(spec)
    await use(known, wrapped(identity_of(spec), secret, public, *keks))
    assert await reason_of_use(known, wrapped(identity_of(spec), other_secret, public, *keks)) is Reason.ENVELOPE_INVALID


async def test_a_key_under_a_kek_that_is_not_in_the_token_is_missing_not_lost(
    known: TokenHsm, keks: tuple[KnownKey, KnownKey]
) -> None:
    secret = os.urandom(32)
    elsewhere = wrapped(identity_of(AES), secret, kcv(secret), KnownKey(), keks[1])
    assert await reason_of_use(known, elsewhere) is Reason.HSM_KEK_MISSING
    sealed_elsewhere = wrapped(identity_of(AES), secret, kcv(secret), keks[0], KnownKey())
    assert await reason_of_use(known, sealed_elsewhere) is Reason.HSM_KEK_MISSING


async def test_the_token_is_blamed_when_its_canary_does_not_open_either(
    blank_token: SoftToken, opened: OpenHsm, enter_blank: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_blank()
    kek, sealing = KnownKey(), KnownKey()
    prepare(blank_token, kek, sealing)
    hsm = await opened(pin=settings_of(blank_token).pin, watch_seconds=30.0)
    key = await new_key(hsm, AES)
    bad = replace(key, identity=identity_of(AES))
    assert await reason_of_use(hsm, bad) is Reason.ENVELOPE_INVALID

    # As if the KEK's value had changed in the token: its canary has another check value.
    def check_other(session: TokenSession, canary: Canary) -> None:
        check_canary(session, replace(canary, check_value="kcv:000000"))

    monkeypatch.setattr(connection, "check_canary", check_other)
    assert await reason_of_use(hsm, bad) is Reason.HSM_UNAVAILABLE
    sealed_data = await hsm.encrypt(key, b"x", b"aad")
    with pytest.raises(KmsError) as caught:
        await hsm.decrypt(key, sealed_data, b"other")
    assert caught.value.reason is Reason.HSM_UNAVAILABLE
    await use(hsm, key)


async def test_old_generations_open_and_the_one_that_is_named_makes(
    blank_token: SoftToken, opened: OpenHsm, enter_blank: Callable[[], None]
) -> None:
    enter_blank()
    old_kek, new_kek, sealing = KnownKey(), KnownKey(), KnownKey()
    prepare(blank_token, old_kek, sealing)
    secret = os.urandom(32)
    old = wrapped(identity_of(AES), secret, kcv(secret), old_kek, sealing)
    new_sealing = KnownKey()
    with session_on(blank_token) as session:
        put_kek(session, new_kek, 2)
        put_sealing_key(session, new_sealing, 2)
        put_canary(session, new_kek, new_sealing, 2)
    hsm = await opened(pin=settings_of(blank_token).pin)
    await use(hsm, old)
    await hsm.make_under(2)
    made = parse_envelope((await new_key(hsm, AES)).material.envelope)
    assert (made.custody, made.kek_id, made.sealing_key_id) == (Custody.WRAPPED, new_kek.key_id, new_sealing.key_id)
    assert sorted((key.kind.value, key.generation) for key in hsm.wrapping_keys().keys) == [
        ("kek", 1),
        ("kek", 2),
        ("sealing", 1),
        ("sealing", 2),
    ]


async def test_what_was_made_before_a_restart_opens_after_it(hsm_settings: HsmSettings, soft_capabilities: Capabilities) -> None:
    first = await open_hsm(hsm_settings, known=soft_capabilities)
    keys = [await new_key(first, spec) for spec in (AES, SECP256K1, ED25519)]
    await first.close()
    second = await open_hsm(hsm_settings, known=soft_capabilities)
    for key in keys:
        await use(second, key)
    await second.close()
