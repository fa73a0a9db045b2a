"""Another client, who must not notice an attack."""

import asyncio
from collections import Counter
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.v1 import crypto_pb2 as cpb
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer

_TIMEOUT_SECONDS = 20.0


class Bystander:
    """A client with a key, who signs and asks for health."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._caller = server.caller()
        made(self._caller, "secp256k1")

    async def outcomes(self, rounds: int) -> Counter[str]:
        """Sign and check *rounds* times, over the connection that there is; return how often each gRPC code was the answer."""
        return await asyncio.to_thread(self._outcomes, self._caller, rounds)

    async def outcomes_of_a_new_connection(self) -> Counter[str]:
        """Sign and check once over a new connection, which is tried again as channels do, as long as a call may take."""
        return await asyncio.to_thread(self._outcomes, self._server.again(self._caller), 1)

    def _outcomes(self, caller: Caller, rounds: int) -> Counter[str]:
        health: Any = health_pb2_grpc.HealthStub(caller.channel)
        codes = Counter[str]()
        for _ in range(rounds):
            calls: list[tuple[Any, Message]] = [
                (caller.crypto.Sign, cpb.SignRequest(key="k", message=b"m")),
                (health.Check, health_pb2.HealthCheckRequest()),
            ]
            for call, request in calls:
                try:
                    call(request, timeout=_TIMEOUT_SECONDS, wait_for_ready=True)
                except grpc.RpcError as error:
                    codes[error.code().name] += 1
                else:
                    codes["OK"] += 1
        return codes
