"""Connections that are idle, silent or too many, and what they take from other clients: nothing."""

import asyncio
import socket
from contextlib import AsyncExitStack, ExitStack

import grpc
import pytest

from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.fixtures.server import Caller, Deployment, RunningServer
from tests.hostile.bystander import Bystander
from tests.hostile.raw_client import RawClient, RawConnection, raw_client
from tests.hostile.waiting import until

FILES = 600
CHECK, LIST = "grpc.health.v1.Health/Check", kpb.ListKeysRequest()


@pytest.mark.parametrize(
    "attack",
    ["idle", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pinging", "checked once", "waiting for messages"))],
)
async def test_connections_of_one_certificate_without_end_lock_nobody_out(deployment: Deployment, attack: str) -> None:
    deployment.set_server(message_seconds_max=120)
    with deployment.serving(files_max=FILES) as server:
        other = Bystander(server)
        async with raw_client(deployment, server.address, deployment.new_user()) as client:
            pinging = asyncio.create_task(ping(client)) if attack == "pinging" else None
            for round_ in range(3):
                for connection in await client.connect_many(FILES // 3):
                    if attack == "checked once":
                        connection.call(CHECK, b"")
                    if attack == "waiting for messages":
                        connection.call("kms.v1.CryptoService/Sign")
                assert await other.outcomes_of_a_new_connection() == {"OK": 2}
                assert await other.outcomes(5) == {"OK": 10}, round_
            if pinging is not None:
                pinging.cancel()
            await until(lambda: still_open(client.connections) <= FILES // 2)


async def ping(client: RawClient) -> None:
    while True:
        for connection in client.connections:
            if not connection.closed.is_set():
                connection.ping()
        await asyncio.sleep(6)


async def test_connections_that_never_begin_tls_lock_nobody_out(deployment: Deployment) -> None:
    with deployment.serving(files_max=FILES) as server, ExitStack() as stack:
        other = Bystander(server)
        for _ in range(FILES):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20))
        assert await other.outcomes_of_a_new_connection() == {"OK": 2}
        assert await other.outcomes(10) == {"OK": 20}


async def test_one_address_has_so_many_connections_and_another_is_not_touched(deployment: Deployment) -> None:
    deployment.set_server(connections_per_address_max=5)
    with deployment.serving() as server:
        other = server.caller()
        other.keys.ListKeys(LIST)
        kept = server.again(other)
        kept.keys.ListKeys(LIST)
        async with raw_client(deployment, server.address, deployment.new_user()) as client:
            await client.connect_many(12, source="127.0.0.2")
            await until(lambda: still_open(client.connections) <= 5)
            assert still_open(client.connections) == 5
        # The line of the log follows the closing.
        await until(lambda: closed_by(server) >= 7)
        assert closed_by(server) == 7, "and none of another address"
        kept.keys.ListKeys(LIST)


def closed_by(server: RunningServer) -> int:
    return sum(line["count"] for line in server.log() if line["event"] == "connections closed")


async def test_one_user_has_so_many_connections_and_the_one_that_is_idle_longest_goes(deployment: Deployment) -> None:
    deployment.set_server(connections_per_user_max=2, message_seconds_max=120)
    with deployment.serving() as server:
        user, other = deployment.new_user(), Bystander(server)
        async with raw_client(deployment, server.address, user) as client:
            first, second, third = await client.connect_many(3)
            for connection in (first, second, third):
                stream = connection.call(CHECK, b"")
                await until(lambda connection=connection, stream=stream: stream in connection.ended)  # type: ignore[misc]
            await until(first.closed.is_set)
            assert not second.closed.is_set()
            assert not third.closed.is_set()
            for connection in (second, third):
                connection.call("kms.v1.CryptoService/Sign")
            busy = server.caller(user)
            await until(lambda: "RATE_LIMITED" in reasons(busy))
            assert await other.outcomes_of_a_new_connection() == {"OK": 2}
            assert not second.closed.is_set(), "a connection with a call in flight is not closed"


def reasons(caller: Caller) -> str:
    try:
        caller.keys.ListKeys(LIST, timeout=20)
    except grpc.RpcError as error:
        return refusal_of(error).reason
    return ""


@pytest.mark.slow
async def test_a_connection_without_calls_and_one_that_is_old_are_closed_and_a_client_only_connects_again(
    deployment: Deployment,
) -> None:
    deployment.set_server(connection_idle_seconds=1, connection_age_seconds=3)
    with deployment.serving() as server:
        caller = server.caller()
        async with raw_client(deployment, server.address, caller.user_id) as client:
            idle = await client.connect()
            await until(idle.closed.is_set)
            assert idle.goaway, "it is told"
            busy = await client.connect()

            def is_over() -> bool:
                busy.call(CHECK, b"")
                return bool(busy.goaway)

            await until(is_over)
        for _ in range(5):
            caller.keys.ListKeys(LIST, timeout=20)
            await asyncio.sleep(1.2)


@pytest.mark.slow
async def test_pings_at_the_pace_that_is_permitted_keep_a_connection_and_faster_ones_end_it(deployment: Deployment) -> None:
    deployment.set_server(ping_seconds_min=0.4)
    with deployment.serving() as server:
        async with raw_client(deployment, server.address, deployment.new_user()) as client:
            steady = await client.connect()
            for number in range(10):
                steady.ping()
                await until(lambda number=number: steady.pings_answered > number)  # type: ignore[misc]
                await asyncio.sleep(0.5)
            assert not steady.closed.is_set()
            hasty = await client.connect()
            for _ in range(20):
                hasty.ping()
            await until(hasty.closed.is_set)
            assert b"too_many_pings" in hasty.goaway
            assert not steady.closed.is_set()


@pytest.mark.slow
async def test_a_client_with_a_keepalive_of_ten_seconds_is_not_cut_off(server: RunningServer) -> None:
    async with raw_client(server.deployment, server.address, server.deployment.new_user()) as client:
        connection = await client.connect()
        for number in range(8):
            connection.ping()
            await until(lambda number=number: connection.pings_answered > number)  # type: ignore[misc]
            await asyncio.sleep(10)
        assert not connection.closed.is_set()


async def test_a_connection_has_so_many_streams(deployment: Deployment) -> None:
    deployment.set_server(streams_per_connection_max=10, message_seconds_max=120)
    with deployment.serving() as server:
        other = Bystander(server)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(raw_client(deployment, server.address, deployment.new_user()))
            connection = await client.connect()
            for _ in range(25):
                connection.call("kms.v1.CryptoService/Sign")
            await until(lambda: len(connection.ended) >= 15)
            assert await other.outcomes(5) == {"OK": 10}
            assert len(connection.ended) == 15


def still_open(connections: list[RawConnection]) -> int:
    return sum(not connection.closed.is_set() for connection in connections)
