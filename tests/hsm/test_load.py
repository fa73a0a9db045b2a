"""Many clients at once: nothing crashes, nothing leaks, nobody is slowed by another's bad input."""

import asyncio
import random
import time
from dataclasses import replace

import pkcs11
import pytest

from kms.app.ports import Sealed
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import HeldKey
from kms.hsm import connection, wrapping_keys
from kms.hsm.connection import Connection
from kms.hsm.session import TokenSession
from kms.hsm.token_hsm import TokenHsm
from tests.fixtures.softhsm import OpenHsm
from tests.hsm.keys import new_key, use

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SECP256K1 = key_spec(KeyType.SECP256K1, Purpose.SIGNING, None)
ED25519 = key_spec(KeyType.ED25519, Purpose.SIGNING, None)
RSA_ENCRYPTION = key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048)


async def hammer(hsm: TokenHsm, keys: list[HeldKey], *, clients: int, seconds: float) -> int:
    """Use *keys* from many clients, some of them with bad input; return how many calls were served."""
    ends_at = time.monotonic() + seconds
    dice = random.Random(20_260_101)  # chooses keys for a test

    async def client() -> int:
        served = 0
        while time.monotonic() < ends_at:
            key = dice.choice(keys)
            if dice.random() < 0.1 and key.identity.spec == AES:
                with pytest.raises(KmsError):
                    await hsm.decrypt(key, Sealed(bytes(12), bytes(40)), b"aad")
            await use(hsm, key)
            served += 1
        return served

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


@pytest.mark.parametrize("inline", [0.0, 1.0], ids=["lanes", "inline"])
async def test_threads_under_load_do_not_crash_and_keep_their_number_of_sessions(opened: OpenHsm, inline: float) -> None:
    hsm = await opened(lanes=4, handles_max=12, inline_p99_seconds=inline)
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1, ED25519, AES, SECP256K1, RSA_ENCRYPTION) for _ in range(4)]
    assert await hammer(hsm, keys, clients=24, seconds=1.5) > 100
    status = hsm.status()
    assert status.is_available
    assert status.sessions <= 4 + 2 + 2  # lanes, login and watch, inline and generator
    assert status.handles <= 12


@pytest.mark.slow
async def test_a_minute_under_load(opened: OpenHsm) -> None:
    hsm = await opened(lanes=8, sessions_max=32, inline_p99_seconds=1.0, handles_max=20)
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1, ED25519, RSA_ENCRYPTION) for _ in range(10)]
    assert await hammer(hsm, keys, clients=64, seconds=60) > 10_000
    assert hsm.status().sessions <= 8 + 4


@pytest.mark.parametrize("inline", [0.0, 1.0], ids=["lanes", "inline"])
async def test_a_flood_of_bad_ciphertexts_costs_neither_handles_nor_a_probe_each(
    opened: OpenHsm, inline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsm = await opened(lanes=2, inline_p99_seconds=inline, watch_seconds=30.0)
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1, ED25519, AES)]
    await asyncio.gather(*(use(hsm, key) for key in keys for _ in range(30)))  # each lane has opened its session by then
    probes = 0
    check_canary = wrapping_keys.check_canary

    def counted(session: TokenSession, canary: object) -> None:
        nonlocal probes
        probes += 1
        check_canary(session, canary)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(connection, "check_canary", counted)
    before = hsm.status()
    begun = time.monotonic()
    answers = await asyncio.gather(
        *(hsm.decrypt(keys[0], Sealed(bytes(12), bytes(40)), b"aad") for _ in range(600)), return_exceptions=True
    )
    took = time.monotonic() - begun
    assert {answer.reason for answer in answers if isinstance(answer, KmsError)} == {Reason.CIPHERTEXT_INVALID}
    assert len(answers) == 600
    assert probes <= took / 0.02 + 2
    after = hsm.status()
    assert after.sessions == before.sessions
    assert after.handles >= before.handles


async def test_a_bad_rsa_ciphertext_keeps_the_session_and_its_handles(opened: OpenHsm) -> None:
    hsm = await opened(lanes=1, watch_seconds=30.0)  # the watch opens its session at its first look
    keys = [await new_key(hsm, spec) for spec in (RSA_ENCRYPTION, SECP256K1)]
    for key in keys:
        await use(hsm, key)
    before = hsm.status()
    for _ in range(20):
        with pytest.raises(KmsError) as caught:
            await hsm.decrypt_rsa(keys[0], min(hsm.oaep_hashes()), b"\x01" * 256)
        assert caught.value.reason is Reason.CIPHERTEXT_INVALID
    assert (hsm.status().handles, hsm.status().sessions) == (before.handles, before.sessions)


async def test_unused_handles_are_given_up_after_their_idle_time(opened: OpenHsm) -> None:
    for inline in (0.0, 1.0):
        hsm = await opened(handle_idle_seconds=3.0, watch_seconds=0.05, inline_p99_seconds=inline)
        keys = [await new_key(hsm, AES) for _ in range(5)]
        for key in keys:
            await use(hsm, key)
        assert hsm.status().handles > 0
        for _ in range(1000):
            await asyncio.sleep(0.05)
            if hsm.status().handles == 0:
                break
        assert hsm.status().handles == 0
        await use(hsm, keys[0])
        await hsm.close()


async def test_a_new_version_of_a_key_replaces_the_handle_everywhere(opened: OpenHsm) -> None:
    hsm = await opened(lanes=3)
    key = await new_key(hsm, SECP256K1)
    await asyncio.gather(*(use(hsm, key) for _ in range(60)))
    assert hsm.status().handles == 3
    await use(hsm, replace(key, version=2))
    for _ in range(100):
        await asyncio.sleep(0.01)
        if hsm.status().handles == 1:
            break
    assert hsm.status().handles == 1


def limit_sessions(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Let no connection open more than *limit* sessions, as a small HSM would. SoftHSM itself has no limit."""
    open_session = Connection.open_session

    def limited(connection: Connection) -> TokenSession:
        if connection.sessions >= limit:
            raise pkcs11.SessionCount
        return open_session(connection)

    monkeypatch.setattr(Connection, "open_session", limited)


async def test_the_sessions_it_says_it_needs_are_enough(opened: OpenHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_sessions(monkeypatch, 2 + 5)
    hsm = await opened(lanes=2, abandoned_max=0, sessions_max=7, inline_p99_seconds=1.0)
    keys = [await new_key(hsm, spec) for spec in (AES, SECP256K1, RSA_ENCRYPTION)]
    bad = replace(keys[0], version=7, material=keys[1].material)
    making = asyncio.create_task(new_key(hsm, RSA_ENCRYPTION))
    for _ in range(5):
        answers = await asyncio.gather(*(use(hsm, key) for key in (*keys, bad, bad)), return_exceptions=True)
        assert {answer.reason for answer in answers if isinstance(answer, KmsError)} == {Reason.ENVELOPE_INVALID}
        assert all(answer is None or isinstance(answer, KmsError) for answer in answers)
    await making


async def test_a_token_without_room_for_a_session_is_unavailable_and_recovers(
    opened: OpenHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsm = await opened(lanes=2, watch_seconds=30.0)
    key = await new_key(hsm, SECP256K1)
    bad = replace(key, version=2, material=replace(key.material, public_key="x"))
    with monkeypatch.context() as small:
        limit_sessions(small, hsm.status().sessions)
        with pytest.raises(KmsError) as caught:
            await use(hsm, bad)  # cannot be blamed on the row while no fresh session can be had
        assert caught.value.reason is Reason.HSM_UNAVAILABLE
    await use(hsm, key)
    with pytest.raises(KmsError) as caught:
        await use(hsm, bad)
    assert caught.value.reason is Reason.ENVELOPE_INVALID
