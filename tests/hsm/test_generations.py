"""Generations of KEK and sealing key that come and go in a token that is served meanwhile.

Another process changes the token, as `kms kek` does: PKCS #11 modules are state of a process.
"""

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.envelope import Envelope, parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody, HeldKey, KeyMaterial
from kms.hsm import provision
from kms.hsm.bench import Bench
from kms.hsm.capabilities import Capabilities
from kms.hsm.envelopes import Handle
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import TokenHsm, open_hsm
from kms.hsm.wrapping_keys import Kind
from tests.fixtures.softhsm import OpenHsm, settings_of
from tests.hsm.keys import new_key, use
from tests.hsm.tokens import KnownKey, kcv, prepare, put_canary, put_kek, put_sealing_key, session_on, wrapped

AES = KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256)
SPECS = (
    AES,
    KeySpec(KeyType.SECP256K1, Purpose.SIGNING, 256),
    KeySpec(KeyType.SECP256R1, Purpose.SIGNING, 256),
    KeySpec(KeyType.ED25519, Purpose.SIGNING, 256),
    KeySpec(KeyType.RSA, Purpose.SIGNING, 2048),
    KeySpec(KeyType.RSA, Purpose.ENCRYPTION, 2048),
)


Elsewhere = Callable[..., None]


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A process that works on tokens, too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def elsewhere(other_process: ProcessPoolExecutor) -> Elsewhere:
    """Does something with a token in another process. The token is the first argument."""

    def do(work: Callable[..., object], token: SoftToken, *arguments: object) -> None:
        other_process.submit(_do, work, token, *arguments).result(60)

    return do


def _do(work: Callable[..., object], token: SoftToken, *arguments: object) -> None:
    os.environ.update(token.environment)
    work(token, *arguments)


def rotate(token: SoftToken) -> None:
    provision.rotate(settings_of(token))


def retire(token: SoftToken, generation: int) -> None:
    provision.retire(settings_of(token), generation)


def destroy(token: SoftToken, generation: int) -> None:
    provision.destroy(settings_of(token), generation)


def generation_of(hsm: TokenHsm, key: HeldKey) -> set[int]:
    """Return the generations of the KEK and the sealing key that the envelope of *key* names."""
    envelope = parse_envelope(key.material.envelope)
    return {one.generation for one in hsm.wrapping_keys().keys if one.key_id in (envelope.kek_id, envelope.sealing_key_id)}


def moved(key: HeldKey, envelope: str) -> HeldKey:
    """Return *key* in another envelope."""
    material = key.material
    return HeldKey(key.identity, KeyMaterial(material.custody, material.public_key, envelope, material.hsm_key_id), key.version)


@pytest.mark.parametrize("inline", [0.0, 1.0], ids=["lanes", "inline"])
async def test_a_new_generation_opens_at_once_and_makes_when_it_is_told_to(
    opened: OpenHsm, hsm_settings: HsmSettings, soft_token: SoftToken, elsewhere: Elsewhere, inline: float
) -> None:
    hsm = await opened(inline_p99_seconds=inline, watch_seconds=30.0)
    before = await new_key(hsm, AES)
    await use(hsm, before)
    elsewhere(rotate, soft_token)
    assert hsm.wrapping_keys().makers == (1,)
    assert (await hsm.look_at_keys()).makers == (1, 2)
    assert generation_of(hsm, await new_key(hsm, AES)) == {1}
    await hsm.make_under(3)
    assert hsm.wrapping_keys().current == 1
    await hsm.make_under(2)
    after = await new_key(hsm, AES)
    assert generation_of(hsm, after) == {2}
    for key in (before, after):
        await use(hsm, key)
        await use(hsm, key)
    assert hsm.status().sessions <= hsm_settings.sessions_needed


async def test_an_envelope_of_a_generation_that_nobody_has_seen_yet_opens(
    blank_token: SoftToken, opened: OpenHsm, enter_blank: Callable[[], None], elsewhere: Elsewhere
) -> None:
    enter_blank()
    kek, sealing, new_kek, new_sealing = (KnownKey() for _ in range(4))
    prepare(blank_token, kek, sealing)
    hsm = await opened(pin=settings_of(blank_token).pin, watch_seconds=30.0)
    old = await new_key(hsm, AES)
    await use(hsm, old)
    foreign = await new_key(hsm, AES)
    secret = bytes(range(32))
    later = wrapped(foreign.identity, secret, kcv(secret), new_kek, new_sealing)
    attempts = []

    def attempt(session: TokenSession, _: Handle) -> None:
        attempts.append(session)
        session.raw.generate_random(64)

    def work(bench: Bench) -> None:
        bench.run(lambda _: None, "a use")
        elsewhere(put_generation, blank_token, new_kek, new_sealing)
        # The session that loaded the key does the work, at the first attempt.
        bench.use(later, attempt, "a use")

    await asyncio.wrap_future(hsm._lanes.submit(work))
    assert len(attempts) == 1
    await use(hsm, later)
    assert hsm.wrapping_keys().makers == (1, 2)
    await use(hsm, old)


def put_generation(token: SoftToken, kek: KnownKey, sealing: KnownKey) -> None:
    with session_on(token) as session:
        put_kek(session, kek, 2)
        put_sealing_key(session, sealing, 2)
        put_canary(session, kek, sealing, 2)


@pytest.fixture
async def rotated(opened: OpenHsm, soft_token: SoftToken, elsewhere: Elsewhere) -> TokenHsm:
    """A token with keys of two generations, of which the second makes new envelopes."""
    hsm = await opened()
    elsewhere(rotate, soft_token)
    await hsm.look_at_keys()
    return hsm


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.key_type}-{spec.purpose}")
async def test_a_key_of_each_type_is_moved_to_the_new_generation_and_works(rotated: TokenHsm, spec: KeySpec) -> None:
    for custody in (None, Custody.RESIDENT):
        key = await new_key(rotated, spec, custody)
        await rotated.make_under(2)
        again = moved(key, await rotated.rewrap(key))
        assert generation_of(rotated, again) == {2}
        assert parse_envelope(again.material.envelope).custody is key.material.custody
        await use(rotated, again)
        await use(rotated, key)
        await rotated.make_under(1)


async def test_what_does_not_open_is_not_moved(rotated: TokenHsm) -> None:
    key, other = await new_key(rotated, AES), await new_key(rotated, AES)
    await rotated.make_under(2)
    flipped = parse_envelope(key.material.envelope)
    broken = Envelope(flipped.custody, flipped.kek_id, flipped.sealing_key_id, flipped.nonce, bytes(len(flipped.sealed))).encode()
    for planted in (moved(key, broken), moved(key, other.material.envelope), moved(key, "")):
        with pytest.raises(KmsError) as caught:
            await rotated.rewrap(planted)
        assert caught.value.reason is Reason.ENVELOPE_INVALID
    assert rotated.is_available()


async def test_a_retired_generation_opens_and_makes_nothing_whoever_asks(
    rotated: TokenHsm, soft_token: SoftToken, elsewhere: Elsewhere
) -> None:
    key = await new_key(rotated, AES)
    assert generation_of(rotated, key) == {1}
    elsewhere(retire, soft_token, 1)
    await rotated.look_at_keys()
    for told in (1, 2, 1):
        await rotated.make_under(told)
        assert generation_of(rotated, await new_key(rotated, AES)) == {2}
    await use(rotated, key)


async def test_a_generation_is_destroyed_under_a_service_that_runs(
    rotated: TokenHsm, soft_token: SoftToken, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, kept = await new_key(rotated, AES), await new_key(rotated, AES)
    await rotated.make_under(2)
    kept = moved(kept, await rotated.rewrap(kept))
    lost = []
    monkeypatch.setattr(rotated._lanes, "after_loss", lambda: lost.append(1))
    connection = rotated._link.last
    before = connection.open_session()
    elsewhere(retire, soft_token, 1)
    elsewhere(destroy, soft_token, 1)
    connection.look(before)
    connection.close_session(before)
    for _ in range(3):
        with pytest.raises(KmsError) as caught:
            await use(rotated, key)
        assert caught.value.reason is Reason.HSM_KEK_MISSING
        await use(rotated, kept)
        await rotated.look_at_keys()
    assert rotated.wrapping_keys().makers == (2,)
    assert {one.generation for one in rotated.wrapping_keys().keys} == {2}
    assert lost == []
    elsewhere(destroy, soft_token, 1)


async def test_a_service_starts_on_a_token_whose_first_generation_is_gone(
    rotated: TokenHsm, hsm_settings: HsmSettings, soft_capabilities: Capabilities
) -> None:
    await rotated.make_under(2)
    key = await new_key(rotated, AES)
    await rotated.close()
    provision.retire(hsm_settings, 1)
    provision.destroy(hsm_settings, 1)
    assert provision.check_copy(hsm_settings).generations == (2,)
    again = await open_hsm(hsm_settings, known=soft_capabilities)
    await use(again, key)
    assert generation_of(again, await new_key(again, AES)) == {2}
    await again.close()
    assert provision.rotate(hsm_settings).generations == (2, 3)


def test_an_interrupted_rotation_is_made_anew_and_harms_nobody_meanwhile(
    soft_token: SoftToken, hsm_settings: HsmSettings
) -> None:
    kek = KnownKey()
    with session_on(soft_token) as session:
        put_kek(session, kek, 2)
    assert provision.check_copy(hsm_settings).generations == (1,)
    made = provision.rotate(hsm_settings)
    assert made.generations == (1, 2)
    assert kek.key_id not in {key.key_id for key in made.wrapping_keys}
    assert [key.generation for key in made.wrapping_keys if key.kind is Kind.KEK] == [1, 2]
    assert provision.rotate(hsm_settings).generations == (1, 2, 3)


@pytest.mark.parametrize("generation", [2, 3])
def test_the_newest_generation_and_one_that_is_not_there_are_not_retired(
    soft_token: SoftToken, hsm_settings: HsmSettings, generation: int
) -> None:
    provision.rotate(hsm_settings)
    for refused in (provision.retire, provision.destroy):
        with pytest.raises(KmsError) as caught:
            refused(hsm_settings, generation)
        assert caught.value.reason is Reason.KEK_IN_USE
    assert provision.describe(hsm_settings).retired == frozenset()


async def test_a_key_whose_generation_is_missing_leaves_the_other_loaded_keys(
    rotated: TokenHsm, soft_token: SoftToken, elsewhere: Elsewhere
) -> None:
    lost = await new_key(rotated, AES)
    await rotated.make_under(2)
    kept = await new_key(rotated, AES)
    elsewhere(retire, soft_token, 1)
    elsewhere(destroy, soft_token, 1)
    await rotated.look_at_keys()

    def work(bench: Bench) -> None:
        bench.use(kept, lambda *_: None, "a use")
        for _ in range(2):
            with pytest.raises(KmsError) as caught:
                bench.use(lost, lambda *_: None, "a use")
            assert caught.value.reason is Reason.HSM_KEK_MISSING
            assert bench.holds(kept)

    await asyncio.wrap_future(rotated._lanes.submit(work))
