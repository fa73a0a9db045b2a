"""Clients in a process of their own, which use one key as fast as they can and tell what became of each call.

The job comes as JSON on standard input, the outcomes go out as JSON on standard output.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final
from uuid import uuid4

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kms.v1 import crypto_pb2 as cpb
from kms.v1.crypto_pb2_grpc import CryptoServiceStub
from tests.fixtures import fork_server
from tests.fixtures.fork_server import Process

LIMIT_REACHED: Final = "USAGE_LIMIT_REACHED"
_PAUSE_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """Who calls whom. `repeats`: each request has a `request_id` and is sent again until there is an answer.

    With `calls_a_second` all clients together sign so often, if they can; else as often as they can. With
    `bad_calls_a_second` they decrypt under keys that are not there instead, so often.
    """

    addresses: Sequence[str]
    ca: str
    certificate: str
    private_key: str
    key: str
    clients: int
    repeats: bool
    seconds_max: float
    calls_a_second: int = 0
    bad_calls_a_second: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """A message and what became of its signing: OK, the reason of a refusal, or, where there is none, the code of gRPC."""

    message: str
    outcome: str
    signature: str
    seconds: float

    @property
    def is_lost(self) -> bool:
        """Whether the caller cannot know what became of it: no answer came, or one that says so."""
        return self.outcome not in ("OK", LIMIT_REACHED, "STORE_UNAVAILABLE", "HSM_UNAVAILABLE", "STALE")


@dataclass(frozen=True, slots=True)
class Working:
    """A process that does a job, and the other end of its standard input and output."""

    process: Process
    stream: socket.socket


def started(job: Job) -> Working:
    """Start a process that does *job*."""
    stream, theirs = socket.socketpair()
    with theirs:
        process = fork_server.start("tests.conformance.driver", [], os.environ, (theirs.fileno(), theirs.fileno(), 2))
    stream.sendall(json.dumps(asdict(job)).encode())
    stream.shutdown(socket.SHUT_WR)
    return Working(process, stream)


def told(working: Working) -> list[Use]:
    """Wait for the end of a process and return what it has to tell."""
    with working.stream, working.stream.makefile() as output:
        uses = [Use(**use) for use in json.load(output)]
    working.process.wait()
    return uses


async def main(job: Job) -> list[Use]:
    """Let all clients work until the limit of the key is reached, or the time is up."""
    until = time.monotonic() + job.seconds_max
    uses: list[Use] = []
    work = _flood if job.bad_calls_a_second else _client
    await asyncio.gather(*(work(job, number, until, uses) for number in range(job.clients)))
    return uses


async def _flood(job: Job, number: int, until: float, uses: list[Use]) -> None:
    """Send bad calls at a steady pace, whether or not they are answered."""
    pause = job.clients / job.bad_calls_a_second
    due = time.monotonic()
    async with _Stubs(job, number) as stubs, asyncio.TaskGroup() as group:

        async def call() -> None:
            began = time.monotonic()
            try:
                await stubs.current.Decrypt(cpb.DecryptRequest(ciphertext=b"\x01" + uuid4().bytes + bytes(44)), timeout=2)
            except grpc.RpcError as error:
                uses.append(Use("", reason_of(error), "", time.monotonic() - began))

        while time.monotonic() < until:
            group.create_task(call())
            due += pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _client(job: Job, number: int, until: float, uses: list[Use]) -> None:
    pause = job.clients / job.calls_a_second if job.calls_a_second else 0.0
    due = time.monotonic()
    async with _Stubs(job, number) as stubs:
        while time.monotonic() < until:
            use = await _use(job, stubs, until)
            due += pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            uses.append(use)
            if use.outcome == LIMIT_REACHED:
                return


async def _use(job: Job, stubs: "_Stubs", until: float) -> Use:
    message = uuid4().bytes
    request = cpb.SignRequest(key=job.key, message=message, request_id=message.hex() if job.repeats else "")
    began = time.monotonic()
    while True:
        try:
            signature = (await stubs.current.Sign(request, timeout=10)).signature
            return Use(message.hex(), "OK", signature.hex(), time.monotonic() - began)
        except grpc.RpcError as error:
            outcome = reason_of(error)
        if outcome != LIMIT_REACHED:
            await asyncio.sleep(_PAUSE_SECONDS)
            stubs.go_elsewhere()
        if outcome == LIMIT_REACHED or not job.repeats or time.monotonic() > until:
            return Use(message.hex(), outcome, "", time.monotonic() - began)


class _Stubs:
    """A connection to each address; one is used until it fails."""

    def __init__(self, job: Job, number: int) -> None:
        credentials = grpc.ssl_channel_credentials(job.ca.encode(), job.private_key.encode(), job.certificate.encode())
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), ("grpc.max_reconnect_backoff_ms", 200)]
        self._channels = [grpc.aio.secure_channel(address, credentials, options) for address in job.addresses]
        self._number = number
        self.go_elsewhere()

    def go_elsewhere(self) -> None:
        self._number += 1
        self.current = CryptoServiceStub(self._channels[self._number % len(self._channels)])

    async def __aenter__(self) -> "_Stubs":
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close(None)


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason in an error's `ErrorInfo`, or the name of its code."""
    assert isinstance(error, grpc.aio.AioRpcError)
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of a call
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return info.reason
    return error.code().name


def _job(fields: Mapping[str, object]) -> Job:
    return Job(**fields)  # type: ignore[arg-type]  # as `started` wrote them


if __name__ == "__main__":
    print(json.dumps([asdict(use) for use in asyncio.run(main(_job(json.load(sys.stdin))))]))
