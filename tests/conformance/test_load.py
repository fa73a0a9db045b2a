"""Many clients, every operation, every key type, two servers: nothing fails, leaks or grows."""

import hashlib
import itertools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer

CLIENTS = 16
SIGNING = ("secp256k1", "secp256r1", "ed25519", "rsa")


def operations(caller: Caller, number: int) -> list[Callable[[], object]]:
    """Return calls that each check their own result, over keys that the client has made."""
    crypto, names = caller.crypto, itertools.count()

    def signed(kind: str) -> Callable[[], object]:
        def call() -> None:
            message = hashlib.sha256(f"{number} {time.monotonic_ns()}".encode()).digest()
            signature = crypto.Sign(cpb.SignRequest(key=kind, message=message), timeout=20).signature
            assert crypto.Verify(cpb.VerifyRequest(key=kind, message=message, signature=signature), timeout=20).valid

        return call

    def encrypted(kind: str) -> Callable[[], object]:
        def call() -> None:
            sealed = crypto.Encrypt(cpb.EncryptRequest(key=kind, plaintext=b"p" * 64), timeout=20).ciphertext
            assert crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed), timeout=20).plaintext == b"p" * 64

        return call

    def batched() -> None:
        items = [cpb.SignRequest(key=kind, message=b"m") for kind in SIGNING] * 2
        answers = crypto.BatchSign(cpb.BatchSignRequest(items=items), timeout=20).items
        assert all(item.WhichOneof("outcome") == "result" for item in answers)

    def bad() -> None:
        with pytest.raises(grpc.RpcError) as caught:
            crypto.Decrypt(cpb.DecryptRequest(ciphertext=b"\x01" + bytes(60)), timeout=20)
        assert refusal_of(caught.value).reason == "KEY_NOT_FOUND"

    return [
        *(signed(kind) for kind in SIGNING),
        encrypted("aes"),
        encrypted("rsa-encryption"),
        batched,
        bad,
        lambda: crypto.GenerateDataKey(cpb.GenerateDataKeyRequest(key="aes"), timeout=20),
        lambda: crypto.GenerateRandom(cpb.GenerateRandomRequest(size_bytes=32), timeout=20),
        lambda: caller.keys.ListKeys(kpb.ListKeysRequest(page_size=5), timeout=20),
        lambda: caller.keys.GetKey(kpb.GetKeyRequest(key="aes"), timeout=20),
        lambda: made(caller, "secp256k1", name=f"new-{next(names)}"),
    ]


def with_keys(caller: Caller) -> Caller:
    """Make a key of each kind for *caller*."""
    for kind in ("secp256k1", "secp256r1", "ed25519", "rsa", "rsa-encryption", "aes"):
        caller.keys.CreateKey(create(kind, name=kind), timeout=60)
    return caller


def work(caller: Caller, number: int, until: float, errors: "Counter[str]") -> int:
    """Make calls until the moment *until*; return how many, and count what went wrong."""
    count = 0
    calls = operations(caller, number)
    for call in itertools.cycle(calls[number % len(calls) :] + calls[: number % len(calls)]):
        if time.monotonic() > until:
            return count
        try:
            call()
            count += 1
        except grpc.RpcError as error:
            errors[repr(refusal_of(error))] += 1
        except AssertionError as error:
            errors[repr(error)] += 1
    return count


def sessions(server: RunningServer) -> int:
    """Return how many token sessions the server has open."""
    before = len(_status_lines(server))
    server.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while len(_status_lines(server)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(_status_lines(server)[-1]["sessions"])


def _status_lines(server: RunningServer) -> list[dict[str, Any]]:
    return [line for line in server.log() if line["event"] == "hsm status"]


def resident_bytes(server: RunningServer) -> int:
    """Return the memory that the server's process has in use."""
    status = Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0]) * 1024


def under_load(deployment: Deployment, seconds: float) -> tuple[int, "Counter[str]", list[tuple[int, int, list[int]]]]:
    """Run the clients against two servers; return calls, errors and, for each server, sessions before and after and memory."""
    errors: Counter[str] = Counter()
    with deployment.serving() as one, deployment.serving() as other:
        servers = (one, other)
        for server in servers:  # every lane opens its session when it first works
            work(with_keys(server.caller()), 0, time.monotonic() + 2.0, errors)
        before = [sessions(server) for server in servers]
        memory: list[list[int]] = [[], []]
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(seconds / 20):
                for series, server in zip(memory, servers, strict=True):
                    series.append(resident_bytes(server))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            callers = list(pool.map(with_keys, [servers[number % 2].caller() for number in range(CLIENTS)]))
            until = time.monotonic() + seconds
            counts = list(pool.map(lambda each: work(each[1], each[0], until, errors), enumerate(callers)))
        stop.set()
        watcher.join()
        after = [sessions(server) for server in servers]
    return sum(counts), errors, list(zip(before, after, memory, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_16_clients_for_a_minute_leave_sessions_and_memory_as_they_were(deployment: Deployment) -> None:
    deployment.write_config(sessions_max=32)
    calls, errors, servers = under_load(deployment, 60.0)
    print(f"{calls} calls, errors {dict(errors)}")
    assert not errors
    for before, after, memory in servers:
        print(f"sessions {before} -> {after}; MiB {[value >> 20 for value in memory]}")
        assert after <= before
        settled = memory[len(memory) // 3 :]
        assert max(settled) < 1.15 * settled[0]
