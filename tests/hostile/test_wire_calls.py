"""Calls whose messages never come, of one certificate and of several, and what they take from others: nothing."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import grpc
import pytest

from kms.domain.ids import UserId
from kms.rpc.bystanders import CHECKS_PER_USER_MAX, WATCHES_PER_USER_MAX
from kms.v1 import keys_pb2 as kpb
from tests.conformance.driver import reason_of
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import DEPLOYMENT, Caller, Deployment, RunningServer
from tests.hostile.bystander import Bystander
from tests.hostile.raw_client import RawConnection, raw_client
from tests.hostile.waiting import until

SIGN, CHECK, WATCH = "kms.v1.CryptoService/Sign", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"
TAIL = "kms.v1.AuditService/TailEvents"
REFLECT = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CONNECTIONS, CALLS_EACH = 5, 220


def opened(server: RunningServer, caller: Caller) -> Any:  # noqa: ANN401 - the stubs know no stream without an iterator
    return grpc.aio.secure_channel(server.address, caller.credentials)


async def new_attacker(server: RunningServer, stack: AsyncExitStack) -> RawConnection:
    client = await stack.enter_async_context(raw_client(server.deployment, server.address, server.deployment.new_user()))
    return await client.connect()


@pytest.mark.parametrize(
    "is_known", [pytest.param(True, id="of a user", marks=pytest.mark.slow), pytest.param(False, id="of nobody")]
)
async def test_a_thousand_calls_of_one_certificate_whose_messages_never_come_leave_all_others_served(
    deployment: Deployment, *, is_known: bool
) -> None:
    deployment.set_server(message_seconds_max=120)
    with deployment.serving() as server:
        other = Bystander(server)
        attacker = deployment.new_user() if is_known else UserId(uuid4())
        async with raw_client(deployment, server.address, attacker) as client:
            for connection in await client.connect_many(CONNECTIONS):
                for _ in range(CALLS_EACH):
                    connection.call(SIGN)
            refused = CONNECTIONS * CALLS_EACH - 200
            await until(lambda: sum(len(one.ended) for one in client.connections) >= refused)
            assert await other.outcomes(10) == {"OK": 20}
            assert await other.outcomes_of_a_new_connection() == {"OK": 2}
            assert sum(len(one.ended) for one in client.connections) == refused, "as many wait as one user may have"


async def test_calls_of_many_users_whose_messages_never_come_do_not_fill_the_places_of_all(deployment: Deployment) -> None:
    deployment.set_server(message_seconds_max=120, calls_max=40, calls_per_user_max=20)
    with deployment.serving() as server:
        other = Bystander(server)
        async with AsyncExitStack() as stack:
            everyone = [await new_attacker(server, stack) for _ in range(4)]
            for connection in everyone:
                for _ in range(20):
                    connection.call(SIGN)
            await until(lambda: sum(len(connection.ended) for connection in everyone) >= 40)
            assert await other.outcomes(10) == {"OK": 20}


async def test_a_call_whose_message_does_not_come_ends_and_its_place_is_free_again(deployment: Deployment) -> None:
    deployment.set_server(message_seconds_max=0.5, calls_per_user_max=1)
    with deployment.serving() as server:
        caller = server.caller()
        async with opened(server, caller) as channel:
            for method in (SIGN, CHECK):
                call = channel.stream_unary(f"/{method}", bytes, bytes)()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert reason_of(caught.value) == "DEADLINE_EXCEEDED"
            for method in (TAIL, WATCH):
                stream = channel.stream_stream(f"/{method}", bytes, bytes)()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stream.read()
                assert reason_of(caught.value) == "DEADLINE_EXCEEDED"
            sign = channel.unary_unary(f"/{SIGN}", bytes, bytes)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await sign(b"")
            assert reason_of(caught.value) == "MALFORMED"


async def test_a_message_that_comes_byte_by_byte_is_not_waited_for_longer(deployment: Deployment) -> None:
    deployment.set_server(message_seconds_max=1)
    with deployment.serving() as server:
        async with raw_client(deployment, server.address, deployment.new_user()) as client:
            connection = await client.connect()
            stream = connection.call(SIGN)
            connection.data(stream, b"\x00\x00\x00\xff\xff")

            def is_over() -> bool:
                connection.data(stream, b"m")
                return stream in connection.ended

            await until(is_over)


@pytest.mark.parametrize("method", [SIGN, CHECK, TAIL, WATCH])
async def test_a_call_that_ends_without_a_message_is_refused(server: RunningServer, method: str) -> None:
    caller = server.caller()
    async with opened(server, caller) as channel:
        if method in (SIGN, CHECK):
            call = channel.stream_unary(f"/{method}", bytes, bytes)(timeout=30)
            await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
        else:
            stream = channel.stream_stream(f"/{method}", bytes, bytes)(timeout=30)
            await stream.done_writing()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
    assert reason_of(caught.value) == "MALFORMED"


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT])
async def test_bytes_that_do_not_parse_are_malformed_to_health_and_reflection_too(server: RunningServer, method: str) -> None:
    caller = server.caller()
    async with opened(server, caller) as channel:
        stream = channel.stream_stream(f"/{method}", bytes, bytes)(timeout=30)
        await stream.write(b"\x0a\x02\xff\xfe")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert reason_of(caught.value) == "MALFORMED"


@pytest.mark.parametrize(
    "attack",
    [
        "cancelled",
        pytest.param("of no method", marks=pytest.mark.slow),
        pytest.param("of a bad certificate", marks=pytest.mark.slow),
    ],
)
async def test_a_client_that_wastes_calls_loses_its_connections_and_others_are_served(
    deployment: Deployment, attack: str
) -> None:
    with deployment.serving() as server:
        other = Bystander(server)
        deployment_of_attacker = "other" if attack == "of a bad certificate" else DEPLOYMENT
        async with raw_client(deployment, server.address, deployment.new_user(), deployment_of_attacker) as client:
            connections = await client.connect_many(3)

            async def waste() -> None:
                while any(not connection.closed.is_set() for connection in connections):
                    for connection in connections:
                        for _ in range(50):
                            stream = connection.call("kms.v1.CryptoService/None" if attack == "of no method" else SIGN)
                            if attack == "cancelled":
                                connection.reset(stream)
                    await asyncio.sleep(0.05)

            wasting = asyncio.create_task(waste())
            assert await other.outcomes(10) == {"OK": 20}
            async with asyncio.timeout(80):
                await wasting
            assert await other.outcomes_of_a_new_connection() == {"OK": 2}


async def test_a_user_who_wastes_calls_is_shut_out_for_a_while_and_nobody_else_is(deployment: Deployment) -> None:
    with deployment.serving() as server:
        other, user = Bystander(server), deployment.new_user()
        async with raw_client(deployment, server.address, user) as client:

            async def is_shut_out() -> bool:
                """Waste calls until the connection is closed. Return whether a call on another closes that too."""
                first, second = await client.connect_many(2)
                while not first.closed.is_set():
                    for _ in range(50):
                        first.call("kms.v1.CryptoService/None")
                    await asyncio.sleep(0.02)
                stream = second.call("kms.v1.KeyService/ListKeys", b"")
                await until(lambda: second.closed.is_set() or stream in second.answered)
                return second.closed.is_set()

            async with asyncio.timeout(80):  # on a slow machine the while may be over
                while not await is_shut_out():
                    pass
            assert await other.outcomes(5) == {"OK": 10}
            assert await other.outcomes_of_a_new_connection() == {"OK": 2}
            answered = sum(len(connection.answered) for connection in client.connections)
        listings = [line for line in server.log() if line["event"] == "call" and line["method"] == "KeyService/ListKeys"]
        # One that was under way when its connection was closed is logged as cancelled, and has no answer.
        completed = [line for line in listings if line["outcome"] != "CANCELLED"]
        assert len(completed) == answered, "a call of someone who is shut out is not logged"
        assert any(line["event"] == "client shut out" and line["user"] == str(user) for line in server.log())
        again = server.caller(user)
        await until(lambda: reason_of_listing(again) == "")


def reason_of_listing(caller: Caller) -> str:
    try:
        caller.keys.ListKeys(kpb.ListKeysRequest(), timeout=20)
    except grpc.RpcError as error:
        return error.code().name
    return ""


async def test_health_is_checked_while_no_other_call_has_a_place(deployment: Deployment) -> None:
    deployment.set_server(calls_max=1)
    with deployment.serving() as server:
        busy, other = server.caller(), server.caller()
        health = other.channel.unary_unary(f"/{CHECK}", request_serializer=bytes, response_deserializer=bytes)
        made(busy, "ed25519")
        crowded = 0
        for number in range(20):
            slow = busy.keys.CreateKey.future(create("rsa", name=f"k{number}", size_bits=3072), timeout=60)
            while not slow.done() and not crowded:
                try:
                    other.keys.ListKeys(kpb.ListKeysRequest())
                except grpc.RpcError as error:
                    assert refusal_of(error).reason == "RATE_LIMITED"
                    health(b"", timeout=20)
                    crowded += 1
            slow.result()
            if crowded:
                break
        assert crowded


async def test_streams_of_health_and_reflection_take_no_place_from_checks(deployment: Deployment) -> None:
    deployment.set_server(message_seconds_max=120)
    with deployment.serving() as server:
        other = Bystander(server)
        async with AsyncExitStack() as stack:
            connections = [await new_attacker(server, stack) for _ in range(20)]
            for connection in connections:
                for _ in range(WATCHES_PER_USER_MAX + 1):
                    connection.call(WATCH, b"")
                    connection.call(REFLECT)
                for _ in range(CHECKS_PER_USER_MAX + 1):
                    connection.call(CHECK)
            # One of each of every user, and of the streams those for which nobody has a place.
            await until(lambda: all(len(connection.ended) >= 3 for connection in connections))
            assert await other.outcomes(10) == {"OK": 20}
            assert await other.outcomes_of_a_new_connection() == {"OK": 2}
