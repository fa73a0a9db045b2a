"""Health, reflection, what has not landed, request ids, deadlines, draining, the log."""

import shutil
import signal
import threading
import time
from contextlib import suppress
from typing import Any, cast

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kms.domain.ids import identity_uri
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.conformance.unread import unread
from tests.fixtures.server import DEPLOYMENT, Caller, Deployment, RunningServer


def test_health_is_told_for_the_server_and_each_service(caller: Caller) -> None:
    health: Any = health_pb2_grpc.HealthStub(caller.channel)
    for service in ("", "kms.v1.KeyService", "kms.v1.CryptoService", "kms.v1.AuditService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="kms.v1.Other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    listed = health.List(health_pb2.HealthListRequest()).statuses  # type: ignore[attr-defined]  # newer than the stubs
    assert {name: one.status for name, one in listed.items()} == dict.fromkeys(listed, health_pb2.HealthCheckResponse.SERVING)
    assert {"", "liveness", "readiness", "kms.v1.KeyService"} <= set(listed)


def test_streams_of_health_and_reflection_end_when_the_server_stops_and_do_not_hold_it_up(deployment: Deployment) -> None:
    with deployment.serving() as server:
        channel = server.caller().channel
        watch = cast(Any, health_pb2_grpc.HealthStub(channel)).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        unknown = cast(Any, health_pb2_grpc.HealthStub(channel)).Watch(health_pb2.HealthCheckRequest(service="x"), timeout=30)
        left = threading.Event()
        asked = (reflection_pb2.ServerReflectionRequest(list_services="") for _ in iter(lambda: left.wait(30), True))
        reflecting = cast(Any, reflection_pb2_grpc.ServerReflectionStub(channel)).ServerReflectionInfo(asked, timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert [*unknown, *reflecting] == []
        assert {watch.code(), unknown.code(), reflecting.code()} == {grpc.StatusCode.OK}
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10
        left.set()


def test_a_watcher_that_reads_nothing_keeps_nobody_from_the_truth(deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace("call_seconds_max = 20", "call_seconds_max = 3")
    deployment.config_file.write_text(text)
    with deployment.serving() as server:
        caller = server.caller()
        ca, certificate, key = (deployment.directory / name for name in ("authority.crt", "watcher.crt", "watcher.key"))
        deployment.certificate(identity_uri(DEPLOYMENT, caller.user_id)).write(certificate, key)
        health: Any = health_pb2_grpc.HealthStub(caller.channel)
        with unread(server.address, "grpc.health.v1.Health/Watch", ca=ca, certificate=certificate, key=key):
            time.sleep(1)
            moved = deployment.token.directory.with_name("away")
            deployment.token.directory.rename(moved)
            deadline = time.monotonic() + 10
            while health.Check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            moved.rename(deployment.token.directory)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            assert time.monotonic() - began < 15


def test_reflection_lists_the_services(caller: Caller) -> None:
    found = set(ProtoReflectionDescriptorDatabase(caller.channel).get_services())
    ours = {f"kms.v1.{name}Service" for name in ("Key", "Crypto", "Audit", "Admin", "Rotation", "Certificate")}
    assert {*ours, "grpc.health.v1.Health"} <= found


@pytest.mark.parametrize("method", ["KeyService/ImportKey", "RotationService/RotateKek", "IdentityService/Login"])
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
    with pytest.raises(grpc.RpcError) as caught:
        caller.keys.CreateKey(create("rsa", size_bits=4096), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


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
