"""What signing keeps of its rate under attacks on the wire, in one run."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from kms.domain.ids import identity_uri
from tests.conformance.driver import Job, Use, started, told
from tests.conformance.requests import made
from tests.fixtures.server import DEPLOYMENT, Deployment
from tests.hostile.raw_client import RawClient, raw_client

FILES = 600
ROUNDS = 3
ROUND_SECONDS = 6.0
SIGNATURES_A_SECOND = 30
SIGN, CHECK, WATCH = "kms.v1.CryptoService/Sign", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"
PAUSE_SECONDS = 0.05


async def calls_without_messages(client: RawClient) -> None:
    """Hold as many calls as there may be, and try for more, 400 a second."""
    connections = await client.connect_many(5)
    while True:
        for connection in connections:
            for _ in range(4):
                connection.call(SIGN)
        await asyncio.sleep(PAUSE_SECONDS)


async def idle_connections(client: RawClient) -> None:
    """Fill all places for connections, and open 20 more a second."""
    await client.connect_many(FILES // 2)
    while True:
        await client.connect_many(1)
        await asyncio.sleep(PAUSE_SECONDS)


async def pings_and_health(client: RawClient) -> None:
    """Ping on many connections, watch and check on each, 400 calls a second."""
    connections = await client.connect_many(80)
    while True:
        for connection in connections[::4]:
            if not connection.closed.is_set():
                connection.ping()
                connection.call(WATCH, b"")
                connection.call(CHECK)
            await asyncio.sleep(PAUSE_SECONDS / 10)
        with suppress(OSError):
            connections = [one for one in connections if not one.closed.is_set()] or await client.connect_many(80)


async def cancelled_calls(client: RawClient) -> None:
    """Begin calls and cancel them at once, 2000 a second, until the connections are closed."""
    connections = await client.connect_many(5)
    while True:
        for connection in connections:
            for _ in range(20):
                connection.reset(connection.call(SIGN))
        await asyncio.sleep(PAUSE_SECONDS)


async def cancelled_calls_on_new_connections(client: RawClient) -> None:
    """Begin calls and cancel them at once, 2000 a second. Connect again after each closing, 100 times a second at most."""

    async def waste() -> None:
        connections = await client.connect_many(1)
        while True:
            for connection in connections:
                for _ in range(20):
                    connection.reset(connection.call(SIGN))
            await asyncio.sleep(PAUSE_SECONDS)
            if all(connection.closed.is_set() for connection in connections):
                connections = await client.connect_many(1)

    await asyncio.gather(*(waste() for _ in range(5)))


ATTACKS = [
    calls_without_messages,
    idle_connections,
    pings_and_health,
    cancelled_calls,
    cancelled_calls_on_new_connections,
]


def rate(uses: list[Use]) -> float:
    assert {use.outcome for use in uses} == {"OK"}
    return len(uses) / ROUND_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("attack", ATTACKS)
async def test_signing_keeps_half_of_its_rate(deployment: Deployment, attack: Callable[[RawClient], Awaitable[None]]) -> None:
    deployment.set_server(message_seconds_max=120)
    with deployment.serving(files_max=FILES) as server:
        caller = server.caller()
        await asyncio.to_thread(made, caller, "secp256k1")
        issued = deployment.certificate(identity_uri(DEPLOYMENT, caller.user_id))
        ca, certificate, key = (deployment.directory / "authority.crt").read_text(), issued.certificate, issued.key
        job = Job([server.address], ca, certificate.decode(), key.decode(), "k", 8, False, ROUND_SECONDS, SIGNATURES_A_SECOND)

        async def signed() -> float:
            return rate(await asyncio.to_thread(lambda: told(started(job))))

        await signed()
        shares = []
        for _ in range(ROUNDS):
            alone = await signed()
            async with raw_client(deployment, server.address, deployment.new_user()) as client:
                attacking = asyncio.ensure_future(attack(client))
                await asyncio.sleep(1)
                beside = await signed()
                assert not attacking.done(), "the attack goes on"
                attacking.cancel()
            shares.append(beside / alone)
            print(f"{attack.__name__}: {alone:.1f} signatures/s alone, {beside:.1f}/s beside: {beside / alone:.2f}")
    assert statistics.median(shares) >= 0.5
