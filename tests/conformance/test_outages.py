"""The token or the database goes away under the server and comes back: errors within the deadline, then service again."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kms.dev.postgres import FAST_UNSAFE, embedded_postgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.clusters import Clusters, passable_directory
from tests.fixtures.postgres import template_of
from tests.fixtures.server import Caller, Deployment, deployed

DEADLINE_SECONDS = 2.0
RECOVERY_SECONDS = 20.0


@contextmanager
def away(deployment: Deployment) -> Iterator[None]:
    """Take the token's directory away, as an unplugged device is."""
    place = deployment.token.token_directory
    hidden = place.with_name("hidden")
    place.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(place)


def soon(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def outcome(call: Callable[..., object], request: object) -> str:
    """Return OK or the reason; the call must end by its deadline."""
    began = time.monotonic()
    try:
        call(request, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as error:
        assert time.monotonic() - began < DEADLINE_SECONDS + 5
        return refusal_of(error).reason or refusal_of(error).code.name
    return "OK"


def is_serving(caller: Caller, service: str = "kms.v1.CryptoService") -> bool:
    request = health_pb2.HealthCheckRequest(service=service)
    stub: Any = health_pb2_grpc.HealthStub(caller.channel)
    return bool(stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING)


def test_a_token_that_was_taken_away_serves_again_without_a_restart(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        for kind in ("secp256k1", "ed25519", "aes"):
            made(caller, kind, name=kind)
        ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=b"p")).ciphertext
        calls: tuple[tuple[Callable[..., object], object], ...] = (
            (caller.crypto.Sign, cpb.SignRequest(key="secp256k1", message=b"m")),  # loaded: its handle is cached
            (caller.crypto.Sign, cpb.SignRequest(key="ed25519", message=b"m")),  # not loaded yet
            (caller.crypto.Encrypt, cpb.EncryptRequest(key="aes", plaintext=b"p")),
            (caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext)),
            (caller.crypto.GenerateRandom, cpb.GenerateRandomRequest(size_bytes=16)),
            (caller.keys.CreateKey, create("aes", name="new")),
        )
        caller.crypto.Sign(cpb.SignRequest(key="secp256k1", message=b"m"))
        for _ in range(2):
            with away(deployment):
                soon(lambda: not is_serving(caller))
                assert {outcome(*call) for call in calls} == {"HSM_UNAVAILABLE"}
                # What needs no token goes on, and says so.
                services = ("", "readiness", "liveness", "kms.v1.KeyService", "kms.v1.AuditService")
                assert [is_serving(caller, service) for service in services] == [False, False, True, False, True]
                assert caller.keys.GetKey(kpb.GetKeyRequest(key="aes")).key.name == "aes"
            soon(lambda: is_serving(caller))
            assert {outcome(*call) for call in calls[:-1]} == {"OK"}
        assert made(caller, "aes", name="new").name == "new"


def test_calls_during_an_outage_are_answered_never_lost(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "secp256k1")
        request = cpb.SignRequest(key="k", message=b"m")
        seen = set()
        with away(deployment):
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                seen.add(outcome(caller.crypto.Sign, request))
        assert seen <= {"OK", "HSM_UNAVAILABLE"}
        assert "HSM_UNAVAILABLE" in seen
        soon(lambda: outcome(caller.crypto.Sign, request) == "OK")


def test_a_database_that_stopped_serves_again_without_a_restart(clusters: Clusters, token_template: Path, tmp_path: Path) -> None:
    with passable_directory() as directory, ExitStack() as stack:
        clusters.copy_migrated(directory)
        with embedded_postgres(directory, FAST_UNSAFE) as postgres:
            deployment = stack.enter_context(deployed(tmp_path, template_of(postgres), token_template))
            server = stack.enter_context(deployment.serving())
            caller = server.caller()
            made(caller, "secp256k1")
            request = cpb.SignRequest(key="k", message=b"m")
            assert outcome(caller.crypto.Sign, request) == "OK"
        soon(lambda: not is_serving(caller))
        assert [is_serving(caller, service) for service in ("readiness", "liveness", "kms.v1.KeyService")] == [False, True, False]
        for _ in range(3):
            # Either the pool gives up first, or the caller's deadline passes: nothing was charged.
            assert outcome(caller.crypto.Sign, request) in ("STORE_UNAVAILABLE", "DEADLINE_EXCEEDED")
        stack.enter_context(embedded_postgres(directory, FAST_UNSAFE))
        soon(lambda: is_serving(caller))
        soon(lambda: outcome(caller.crypto.Sign, request) == "OK")
        assert caller.keys.ListKeys(kpb.ListKeysRequest()).keys[0].name == "k"
        stack.pop_all().close()
