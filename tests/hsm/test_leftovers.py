"""Making and using keys leaves nothing behind in the token or in its sessions."""

import asyncio
import os
import subprocess
import sys

import pkcs11
import pytest
from pkcs11 import Attribute

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import KeySpec, KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import Custody, KeyIdentity, KeyMaterial
from kms.domain.residents import Holdings
from kms.hsm import envelopes, provision, residents, token_hsm
from kms.hsm.envelopes import make_key
from kms.hsm.session import TokenSession
from kms.hsm.token_hsm import TokenHsm
from tests.fixtures.softhsm import OpenHsm
from tests.hsm.keys import new_key, use

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SPECS = (
    key_spec(KeyType.SECP256K1, Purpose.SIGNING, None),
    key_spec(KeyType.ED25519, Purpose.SIGNING, None),
    key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048),
    AES,
)


async def objects(hsm: TokenHsm, *, in_token: bool) -> int:
    """Return how many objects any session of this process sees."""

    def count(session: TokenSession) -> int:
        return len(list(session.raw.get_objects({Attribute.TOKEN: in_token})))

    return await asyncio.wrap_future(hsm._lanes.submit(lambda bench: bench.run(count, "a search")))


async def come_to(hsm: TokenHsm, *, session: int, token: int) -> None:
    """Wait until so many objects are left: the watch opens its canaries meanwhile, which takes an object for a moment."""
    seen = None
    async with asyncio.timeout(60):
        while seen != (session, token):
            seen = await objects(hsm, in_token=False), await objects(hsm, in_token=True)


async def least(hsm: TokenHsm) -> tuple[int, int]:
    """Return how many objects there are while the watch has none."""
    counts = [(await objects(hsm, in_token=False), await objects(hsm, in_token=True)) for _ in range(10)]
    return min(counts)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.key_type))
async def test_making_a_key_leaves_no_object(hsm: TokenHsm, spec: KeySpec) -> None:
    session, token = await least(hsm)
    await new_key(hsm, spec)
    await come_to(hsm, session=session, token=token)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.key_type))
async def test_a_used_key_is_one_session_object(hsm: TokenHsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec)
    session, token = await least(hsm)
    for _ in range(3):
        await use(hsm, key)
    await come_to(hsm, session=session + 1, token=token)


async def test_a_resident_key_is_one_token_object_until_it_is_discarded(hsm: TokenHsm) -> None:
    before = await objects(hsm, in_token=True)
    key = await new_key(hsm, AES, Custody.RESIDENT)
    await use(hsm, key)
    assert await objects(hsm, in_token=True) == before + 2  # the key, and its mark
    await hsm.confirm(key.identity.key_id)
    assert await objects(hsm, in_token=True) == before + 1
    await hsm.discard(key.identity.key_id, "")
    assert await objects(hsm, in_token=True) == before


@pytest.mark.parametrize("custody", [Custody.WRAPPED, Custody.RESIDENT])
async def test_a_generation_that_fails_half_way_leaves_no_object(
    hsm: TokenHsm, monkeypatch: pytest.MonkeyPatch, custody: Custody
) -> None:
    session, token = await least(hsm)

    def broken(*_arguments: object) -> str:
        raise KmsError(Reason.HSM_UNAVAILABLE, "cut")

    monkeypatch.setattr(envelopes, "check_value", broken)
    with pytest.raises(KmsError, match="cut"):
        await new_key(hsm, AES, custody if custody is Custody.RESIDENT else None)
    await come_to(hsm, session=session, token=token)
    assert hsm.status().resident_keys == 0


async def test_the_tokens_own_keys_are_not_found_by_their_id(hsm: TokenHsm) -> None:
    # Who writes a KEK's id into a row of a destroyed key would have the KEK removed, and with it every WRAPPED key.
    own = [key.key_id for key in hsm.wrapping_keys().keys]
    kept = await new_key(hsm, AES)
    for key_id in own:
        await hsm.discard(KeyId(key_id), "")
        await hsm.abandon(KeyId(key_id))
    await use(hsm, kept)
    await hsm.close()
    assert {key.key_id for key in provision.describe(hsm._settings).wrapping_keys} == set(own)


async def test_a_mark_outlives_a_token_that_fails_while_a_key_is_removed(hsm: TokenHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: object) -> None:
        raise KmsError(Reason.HSM_UNAVAILABLE, "cut")

    def made_and_failed(session: TokenSession, identity: KeyIdentity, custody: Custody) -> None:
        make_key(session, identity, custody)
        failing()

    with monkeypatch.context() as patch:
        patch.setattr(token_hsm, "make_key", made_and_failed)
        patch.setattr(residents, "abandon", failing)
        patch.setattr(token_hsm, "_UNDO_PAUSES_SECONDS", (0.0, 0.0))
        with pytest.raises(KmsError, match="cut"):
            await new_key(hsm, AES, Custody.RESIDENT)
    held = await hsm.holdings()
    assert len(held.objects) == 1
    assert held.objects.keys() == held.marks.keys()
    assert hsm.status().resident_keys == 1
    await hsm.abandon(*held.marks)
    assert await hsm.holdings() == Holdings({}, {})
    assert hsm.status().resident_keys == 0


async def test_a_second_attempt_replaces_the_key_of_the_first(hsm: TokenHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[object] = []

    def unsteady(session: TokenSession, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
        attempts.append(made := make_key(session, identity, custody))
        if len(attempts) == 1:
            raise pkcs11.DeviceError  # after the token has made the key
        return made

    monkeypatch.setattr(token_hsm, "make_key", unsteady)
    key = await new_key(hsm, AES, Custody.RESIDENT)
    assert len(attempts) == 2
    await use(hsm, key)
    held = await hsm.holdings()
    assert list(held.objects) == list(held.marks) == [key.identity.key_id]


async def test_keys_that_another_process_makes_and_removes_are_counted(opened: OpenHsm, soft_token: SoftToken) -> None:
    hsm = await opened(resident_keys_max=2)
    # In a thread: the watch ends a process whose event loop stands still.
    await asyncio.to_thread(in_another_process, soft_token, "make")
    await asyncio.to_thread(in_another_process, soft_token, "make")
    assert hsm.status().resident_keys == 0  # not looked at yet
    with pytest.raises(KmsError) as caught:
        await new_key(hsm, AES, Custody.RESIDENT)
    assert caught.value.reason is Reason.CUSTODY_UNAVAILABLE
    assert len(await hsm.residents()) == hsm.status().resident_keys == 2
    await asyncio.to_thread(in_another_process, soft_token, "remove")
    async with asyncio.timeout(60):
        while hsm.status().resident_keys != 1:
            await hsm.residents()
    await new_key(hsm, AES, Custody.RESIDENT)
    assert hsm.status().resident_keys == 2


def in_another_process(token: SoftToken, what: str) -> None:
    """Make or remove a key in *token* as another worker does."""
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(token.module), token.label, str(token.pin_file), what]
    done = subprocess.run(command, env={**os.environ, **token.environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ANOTHER_PROCESS = """
import asyncio, sys, uuid
from pathlib import Path
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.keys import Custody, KeyIdentity
from kms.domain.secret import Secret
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import open_hsm

async def main(module, label, pin, what):
    hsm = await open_hsm(HsmSettings(Path(module), label, Secret(Path(pin).read_bytes()), allow_sealed=True))
    if what == "make":
        spec = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
        await hsm.generate(KeyIdentity(uuid.uuid4(), uuid.uuid4(), spec), Custody.RESIDENT)
    else:
        await hsm.abandon(next(iter((await hsm.holdings()).marks)))
    await hsm.close()

asyncio.run(main(*sys.argv[1:]))
"""
