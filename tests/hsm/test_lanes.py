"""Lanes: bounded queues, deadlines, calls that do not return, and what a cancelled call leaves behind."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import KeyType, Purpose, key_spec, signature_algorithm
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody, KeyIdentity, KeyMaterial
from kms.domain.residents import Holdings
from kms.hsm import token_hsm
from kms.hsm.envelopes import make_key
from kms.hsm.session import TokenSession
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import TokenHsm
from kms.hsm.watch import EXIT_STUCK
from tests.fixtures.softhsm import OpenHsm
from tests.hsm.conftest import Dam
from tests.hsm.keys import identity_of, new_key, use

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
ECDSA = signature_algorithm(KeyType.SECP256K1, None, None)


async def reason_of(call: "asyncio.Future[bytes] | asyncio.Task[bytes]") -> Reason:
    with pytest.raises(KmsError) as caught:
        await call
    return caught.value.reason


async def test_a_full_queue_refuses_at_once(opened: OpenHsm, dam: Dam) -> None:
    hsm = await opened(lanes=1, queue_max=3)
    key = await new_key(hsm, SECP256K1)
    calls = [asyncio.create_task(hsm.sign(key, ECDSA, bytes(32))) for _ in range(4)]
    assert await asyncio.wait_for(reason_of(calls[3]), 0.5) is Reason.HSM_UNAVAILABLE
    dam.opened.set()
    assert {len(signature) for signature in await asyncio.gather(*calls[:3])} == {64}


async def test_a_cancelled_call_that_waits_is_never_begun(opened: OpenHsm, dam: Dam) -> None:
    hsm = await opened(lanes=1)
    key = await new_key(hsm, SECP256K1)
    calls = [asyncio.create_task(hsm.sign(key, ECDSA, bytes(32))) for _ in range(5)]
    await asyncio.sleep(0.1)
    for call in calls[1:]:
        call.cancel()
    await asyncio.sleep(0)
    dam.opened.set()
    await calls[0]
    assert len(await hsm.sign(key, ECDSA, bytes(range(32)))) == 64
    assert dam.held == 1


async def test_a_deadline_ends_the_waiting_and_not_the_lane(opened: OpenHsm, dam: Dam) -> None:
    hsm = await opened(lanes=1)
    key = await new_key(hsm, SECP256K1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hsm.sign(key, ECDSA, bytes(32)), 0.1)
    dam.opened.set()
    assert len(await hsm.sign(key, ECDSA, bytes(range(32)))) == 64
    assert hsm.status().lanes_abandoned == 0


async def test_a_lane_whose_call_does_not_return_is_replaced(opened: OpenHsm, dam: Dam) -> None:
    hsm = await opened(lanes=1, stuck_seconds=0.3, watch_seconds=0.05)
    key = await new_key(hsm, SECP256K1)
    begun = time.monotonic()
    calls = [asyncio.create_task(hsm.sign(key, ECDSA, digest)) for digest in (bytes(32), bytes(range(32)))]
    assert [await reason_of(call) for call in calls] == [Reason.HSM_UNAVAILABLE] * 2
    assert time.monotonic() - begun < 2.0
    assert len(await hsm.sign(key, ECDSA, bytes(range(32)))) == 64
    assert hsm.status().lanes_abandoned == 1
    dam.opened.set()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if hsm.status().lanes_abandoned == 0:
            break
    assert hsm.status().lanes_abandoned == 0
    await use(hsm, key)


async def test_too_many_stuck_calls_end_the_process(opened: OpenHsm, dam: Dam, monkeypatch: pytest.MonkeyPatch) -> None:
    hsm = await opened(lanes=2, abandoned_max=1, stuck_seconds=0.2, watch_seconds=0.05)
    ended: Future[int] = Future()

    def end(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    monkeypatch.setattr(hsm._watch, "_end_process", end)
    keys = [await new_key(hsm, SECP256K1) for _ in range(2)]
    calls = [hsm.sign(key, ECDSA, bytes(32)) for key in keys for _ in range(2)]
    await asyncio.gather(*calls, return_exceptions=True)
    assert await asyncio.wait_for(asyncio.wrap_future(ended), 3.0) == EXIT_STUCK


STUCK_LOOP = """
import asyncio, sys, time
from pathlib import Path
from kms.domain.secret import Secret
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import open_hsm

async def main():
    module, label, pin = sys.argv[1:]
    settings = HsmSettings(Path(module), label, Secret(Path(pin).read_bytes()), stuck_seconds=0.5, watch_seconds=0.1)
    await open_hsm(settings)
    time.sleep(30)

asyncio.run(main())
"""


def test_a_stuck_event_loop_ends_the_process(soft_token: SoftToken) -> None:
    arguments = [str(soft_token.module), soft_token.label, str(soft_token.pin_file)]
    done = subprocess.run([sys.executable, "-c", STUCK_LOOP, *arguments], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == EXIT_STUCK, done.stderr
    assert "the event loop is stuck" in done.stdout + done.stderr


async def test_rsa_generation_does_not_delay_a_signature(opened: OpenHsm) -> None:
    hsm = await opened(lanes=1)
    key = await new_key(hsm, SECP256K1)
    rsa = key_spec(KeyType.RSA, Purpose.SIGNING, 2048)
    making = asyncio.gather(*(new_key(hsm, rsa) for _ in range(5)))
    for _ in range(5):
        await use(hsm, key)
    assert not making.done()
    await making


async def test_four_requests_at_once_do_not_make_a_key_hot(opened: OpenHsm) -> None:
    hsm = await opened(lanes=3)
    keys = [await new_key(hsm, SECP256K1) for _ in range(6)]
    for key in keys:
        await use(hsm, key)
        await asyncio.gather(*(use(hsm, key) for _ in range(4)))
    assert hsm.status().handles == len(keys)


async def test_a_hot_key_is_loaded_in_more_lanes_and_a_cool_one_in_one(opened: OpenHsm) -> None:
    hsm = await opened(lanes=3)
    key = await new_key(hsm, SECP256K1)
    for _ in range(20):
        await use(hsm, key)
    assert hsm.status().handles == 1
    await asyncio.gather(*(use(hsm, key) for _ in range(60)))
    assert hsm.status().handles == 3


async def test_a_cancelled_resident_generation_leaves_nothing_in_the_token(
    hsm: TokenHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow_make(session: TokenSession, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
        begun.set()
        go_on.wait(30)
        return make_key(session, identity, custody)

    monkeypatch.setattr(token_hsm, "make_key", slow_make)
    making = asyncio.create_task(hsm.generate(identity_of(SECP256K1), Custody.RESIDENT))
    await asyncio.to_thread(begun.wait, 30)
    for _ in range(3):  # of the deadline, of the connection, of the end of the service
        making.cancel()
        await asyncio.sleep(0)
    assert hsm.status().resident_keys == 1
    assert not making.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert hsm.status().resident_keys == 0
    assert await hsm.holdings() == Holdings({}, {})


async def test_the_number_of_resident_keys_is_limited(opened: OpenHsm) -> None:
    hsm = await opened(resident_keys_max=2)
    made = [await new_key(hsm, SECP256K1, Custody.RESIDENT) for _ in range(2)]
    with pytest.raises(KmsError) as caught:
        await new_key(hsm, SECP256K1, Custody.RESIDENT)
    assert caught.value.reason is Reason.CUSTODY_UNAVAILABLE
    await hsm.discard(made[0].identity.key_id, "")
    await use(hsm, await new_key(hsm, AES, Custody.RESIDENT))
    await hsm.close()
    again = await opened(resident_keys_max=2)
    assert again.status().resident_keys == 2
    await use(again, made[1])


@pytest.mark.parametrize(("spec", "allowed"), [(key_spec(KeyType.ED25519, Purpose.SIGNING, None), False), (SECP256K1, True)])
async def test_sealed_custody_is_refused_where_it_is_not_allowed(opened: OpenHsm, spec: object, allowed: bool) -> None:
    hsm = await opened(allow_sealed=False)
    assert isinstance(spec, type(SECP256K1))
    if allowed:
        assert hsm.custody_for(spec, None) is Custody.WRAPPED
    else:
        for minimum in (None, Custody.SEALED, Custody.WRAPPED):
            with pytest.raises(KmsError) as caught:
                hsm.custody_for(spec, minimum)
            assert caught.value.reason is Reason.CUSTODY_UNAVAILABLE
    assert hsm.custody_for(spec, Custody.RESIDENT) is Custody.RESIDENT


@pytest.mark.parametrize(
    "change", [{"lanes": 0}, {"sessions_max": 8}, {"processes": 2}, {"queue_max": 0}, {"handles_max": 0}, {"lanes": 10}]
)
async def test_settings_that_do_not_fit_are_refused(opened: OpenHsm, change: dict[str, int]) -> None:
    with pytest.raises(KmsError) as caught:
        await opened(**change)
    assert caught.value.reason is Reason.MALFORMED


async def test_one_process_has_one_connection(hsm: TokenHsm, opened: OpenHsm) -> None:
    with pytest.raises(KmsError, match="already has a connection") as caught:
        await opened()
    assert caught.value.reason is Reason.HSM_UNAVAILABLE
    await hsm.random(8)


async def test_closing_twice_and_using_a_closed_one_is_harmless(hsm: TokenHsm) -> None:
    key = await new_key(hsm, AES)
    await hsm.close()
    await hsm.close()
    for call in (use(hsm, key), hsm.random(4), hsm.generate(identity_of(AES), Custody.WRAPPED)):
        with pytest.raises(KmsError) as caught:
            await call
        assert caught.value.reason is Reason.HSM_UNAVAILABLE
    assert not hsm.is_available()


def test_the_default_settings_fit_the_default_limit(hsm_settings: HsmSettings) -> None:
    hsm_settings.check()
    assert hsm_settings.sessions_needed <= hsm_settings.sessions_max == 16


async def test_a_resident_key_that_could_not_be_begun_is_not_counted(opened: OpenHsm) -> None:
    hsm = await opened(resident_keys_max=1)
    hsm._link.lose()
    for _ in range(3):
        with pytest.raises(KmsError):
            await hsm.generate(identity_of(SECP256K1), Custody.RESIDENT)
    assert hsm.status().resident_keys == 0
