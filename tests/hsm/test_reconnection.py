"""A token that goes away and comes back, under a running process."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kms.dev.softhsm import SoftToken
from kms.dev.softhsm import soft_token as soft_token_in
from kms.domain.algorithms import KeyType, Purpose, key_spec, signature_algorithm
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody
from kms.hsm.token_hsm import TokenHsm
from tests.fixtures.softhsm import LABEL, OpenHsm, settings_of
from tests.hsm.conftest import Dam
from tests.hsm.keys import new_key, use
from tests.hsm.tokens import KnownKey, prepare

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
ED25519 = key_spec(KeyType.ED25519, Purpose.SIGNING, None)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait for *condition*; return how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it did not happen in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def refused(call: Awaitable[object]) -> Reason:
    with pytest.raises(KmsError) as caught:
        await asyncio.wait_for(call, 1.0)
    return caught.value.reason


def take_away(token: SoftToken) -> Callable[[], None]:
    """Remove the token's files; return what puts them back."""
    away = token.directory / "away"
    token.token_directory.rename(away)
    return lambda: _put_back(away, token.token_directory)


def _put_back(away: Path, place: Path) -> None:
    away.rename(place)


@pytest.mark.parametrize("inline", [0.0, 1.0], ids=["lanes", "inline"])
async def test_a_token_that_was_removed_and_put_back_serves_again_without_a_restart(
    opened: OpenHsm, soft_token: SoftToken, inline: float
) -> None:
    hsm = await opened(inline_p99_seconds=inline)
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1, ED25519)]
    mac = await hsm.mac(b"data")
    for key in keys:
        await use(hsm, key)
    put_back = take_away(soft_token)
    assert await until(lambda: not hsm.is_available()) < 1.0
    for key in keys:
        assert await refused(use(hsm, key)) is Reason.HSM_UNAVAILABLE
    assert await refused(hsm.random(16)) is Reason.HSM_UNAVAILABLE
    assert await refused(hsm.mac(b"data")) is Reason.HSM_UNAVAILABLE
    assert await refused(new_key(hsm, AES)) is Reason.HSM_UNAVAILABLE
    assert await refused(new_key(hsm, AES, Custody.RESIDENT)) is Reason.HSM_UNAVAILABLE
    put_back()
    await until(hsm.is_available)
    for key in keys:
        await use(hsm, key)
    assert await hsm.mac(b"data") == mac


async def test_requests_under_load_get_an_answer_while_the_token_comes_and_goes(hsm: TokenHsm, soft_token: SoftToken) -> None:
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1) * 4]
    reasons: set[Reason] = set()
    stopped = False

    async def client(number: int) -> int:
        served = 0
        while not stopped:
            try:
                await asyncio.wait_for(use(hsm, keys[number % len(keys)]), 2.0)
                served += 1
            except KmsError as error:
                reasons.add(error.reason)
                await asyncio.sleep(0.01)
        return served

    clients = [asyncio.create_task(client(number)) for number in range(16)]
    for _ in range(3):
        await asyncio.sleep(0.1)
        put_back = take_away(soft_token)
        await until(lambda: not hsm.is_available())
        put_back()
        await until(hsm.is_available)
    stopped = True
    assert min(await asyncio.gather(*clients)) > 0
    assert reasons == {Reason.HSM_UNAVAILABLE}
    assert hsm.status().sessions <= 2 + 2 + 3


async def test_work_that_waits_is_refused_at_once_when_the_token_is_lost(
    opened: OpenHsm, soft_token: SoftToken, dam: Dam
) -> None:
    hsm = await opened(lanes=1)
    key = await new_key(hsm, SECP256K1)
    algorithm = signature_algorithm(KeyType.SECP256K1, None, None)
    held = asyncio.create_task(hsm.sign(key, algorithm, bytes(32)))
    waiting = [asyncio.create_task(hsm.sign(key, algorithm, bytes(range(32)))) for _ in range(20)]
    await asyncio.sleep(0.1)
    put_back = take_away(soft_token)
    assert {await refused(call) for call in waiting} == {Reason.HSM_UNAVAILABLE}
    put_back()
    await asyncio.sleep(0.6)
    assert not hsm.is_available()  # never initialised anew while a thread is inside a call
    dam.opened.set()
    await asyncio.wait([held])
    await until(hsm.is_available)
    await use(hsm, key)


async def test_the_process_can_be_stopped_while_the_token_is_away(hsm: TokenHsm, soft_token: SoftToken) -> None:
    take_away(soft_token)
    await until(lambda: not hsm.is_available())
    await asyncio.wait_for(hsm.close(), 5.0)


@pytest.mark.parametrize("with_keys", [False, True], ids=["blank", "with keys of its own"])
async def test_another_token_in_its_place_is_not_used(
    request: pytest.FixtureRequest, opened: OpenHsm, soft_token: SoftToken, blank_token: SoftToken, with_keys: bool
) -> None:
    if with_keys:
        request.getfixturevalue("keks")
    request.getfixturevalue("enter_token")(soft_token)
    hsm = await opened()
    key = await new_key(hsm, AES)
    put_back = take_away(soft_token)
    await until(lambda: not hsm.is_available())
    blank_token.token_directory.rename(soft_token.token_directory)
    await asyncio.sleep(1.0)
    assert not hsm.is_available()
    assert await refused(use(hsm, key)) is Reason.HSM_UNAVAILABLE
    soft_token.token_directory.rename(blank_token.token_directory)
    put_back()
    await until(hsm.is_available)
    await use(hsm, key)


async def test_a_clone_with_another_mac_key_is_not_used(
    blank_token: SoftToken, opened: OpenHsm, enter_token: Callable[[SoftToken], None]
) -> None:
    other = soft_token_in(shutil.copytree(blank_token.directory, blank_token.directory.with_name("other")), LABEL)
    kek, sealing = KnownKey(), KnownKey()
    for token in (other, blank_token):
        enter_token(token)
        prepare(token, kek, sealing)
    hsm = await opened(pin=settings_of(blank_token).pin)
    mac = await hsm.mac(b"data")
    put_back = take_away(blank_token)
    await until(lambda: not hsm.is_available())
    other.token_directory.rename(blank_token.token_directory)
    await asyncio.sleep(1.0)
    assert not hsm.is_available()
    blank_token.token_directory.rename(other.token_directory)
    put_back()
    await until(hsm.is_available)
    assert await hsm.mac(b"data") == mac
