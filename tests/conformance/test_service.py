"""Health, reflection, what has not landed, request ids, deadlines, draining, the log."""

import shutil
import signal
import time
from contextlib import suppress
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer


def test_health_is_told_for_the_server_and_each_service(caller: Caller) -> None:
    health: Any = health_pb2_grpc.HealthStub(caller.channel)
    for service in ("", "kms.v1.KeyService", "kms.v1.CryptoService", "kms.v1.AuditService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="kms.v1.Other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(caller: Caller) -> None:
    found = set(ProtoReflectionDescriptorDatabase(caller.channel).get_services())
    ours = {f"kms.v1.{name}Service" for name in ("Key", "Crypto", "Audit", "Admin")}
    assert {*ours, "grpc.health.v1.Health"} <= found


@pytest.mark.parametrize("method", ["KeyService/ImportKey", "RotationService/RotateKey", "IdentityService/Login"])
def test_what_has_not_landed_answers_unimplemented(caller: Caller, method: str) -> None:
    raw = caller.channel.unary_unary(f"/kms.v1.{method}", request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.RpcError) as caught:
        raw(b"", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_request_id_of_the_caller_comes_back_and_is_in_the_log_and_a_bad_one_is_replaced(
    caller: Caller, server: RunningServer
) -> None:
    def sent(request_id: str) -> str:
        _, call = caller.keys.ListKeys.with_call(kpb.ListKeysRequest(), metadata=(("x-request-id", request_id),))
        return str(dict(call.trailing_metadata())["x-request-id"])

    assert sent("order-4711.a") == "order-4711.a"
    line = next(line for line in server.log() if line.get("request_id") == "order-4711.a")
    assert (line["method"], line["outcome"], line["user"]) == ("KeyService/ListKeys", "OK", str(caller.user_id))
    assert sent("x" * 65) != "x" * 65
    assert sent('a"b') != 'a"b'


def test_a_short_deadline_is_kept(caller: Caller) -> None:
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        caller.keys.CreateKey(create("rsa", size_bits=4096), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 1


def test_stopping_lets_calls_in_flight_end_and_takes_no_new_one(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "ed25519")
        slow = caller.keys.CreateKey.future(create("rsa", name="slow", size_bits=4096), timeout=20)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert slow.result().key.size_bits == 4096
        assert server.process.wait(20) == 0
        late = refusal(caller.crypto.Sign, cpb.SignRequest(key="k", message=b"m"))
        assert late.code == grpc.StatusCode.UNAVAILABLE


def test_a_second_server_on_the_port_is_refused_with_a_sentence(server: RunningServer, deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace("127.0.0.1:0", server.address, 1)  # that of [server]
    deployment.config_file.write_text(text)
    done = deployment.run("serve")
    assert done.returncode != 0
    assert f"FILE: cannot listen on {server.address}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_without_its_database_or_schema_says_what_to_run(deployment: Deployment) -> None:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            "DELETE FROM public.schema_migrations WHERE version = (SELECT max(version) FROM public.schema_migrations)"
        )
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "kms migrate" in done.stderr


def test_a_key_that_is_not_the_certificates_is_told_as_that(deployment: Deployment) -> None:
    shutil.copy(deployment.directory / "authority.key", deployment.directory / "server.key.new")
    (deployment.directory / "server.key.new").replace(deployment.directory / "server.key")
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "server.tls_key_file" in done.stderr


def test_every_line_of_the_log_is_json_also_when_clients_give_up(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "secp256k1")
        for number in range(200):
            with suppress(grpc.RpcError):
                caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=0.0005 * (number % 12))
        assert caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=5).signature
    assert {line["event"] for line in server.log()} >= {"serving", "call", "stopped"}
    assert not [line for line in server.log() if line["event"] == "bug"]
