"""Batches: a status for each item, in its place."""

from typing import Any

import grpc
import psycopg
import pytest

from kms.pki.private_file import write_private
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import item_reason, refusal, refusal_of
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Caller, Deployment, RunningServer
from tests.fixtures.wire import wired


def test_each_item_is_answered_in_its_place_with_a_result_or_a_status(caller: Caller) -> None:
    made(caller, "aes")
    items = [
        cpb.EncryptRequest(key="k", plaintext=b"0"),
        cpb.EncryptRequest(key="absent", plaintext=b"1"),
        cpb.EncryptRequest(key="k", plaintext=b"2"),
        cpb.EncryptRequest(key="", plaintext=b"3"),
        cpb.EncryptRequest(key="k", plaintext=b"4", request_id="not an id"),
    ]
    answers = caller.crypto.BatchEncrypt(cpb.BatchEncryptRequest(items=items)).items
    outcomes = [item_reason(item.error) if item.WhichOneof("outcome") == "error" else "OK" for item in answers]
    assert outcomes == ["OK", "KEY_NOT_FOUND", "OK", "MALFORMED", "MALFORMED"]
    sealed = [answers[0].result.ciphertext, answers[2].result.ciphertext, b"rubbish"]
    opened = caller.crypto.BatchDecrypt(
        cpb.BatchDecryptRequest(items=[cpb.DecryptRequest(ciphertext=ciphertext) for ciphertext in sealed])
    ).items
    assert [item.result.plaintext for item in opened[:2]] == [b"0", b"2"]
    assert item_reason(opened[2].error) == "CIPHERTEXT_INVALID"


def test_an_item_that_is_refused_is_in_the_trail(caller: Caller, server: RunningServer) -> None:
    made(caller, "secp256k1")
    items = [cpb.SignRequest(key=key, message=b"m") for key in ("k", "absent", "k", "absent")]
    assert len(caller.crypto.BatchSign(cpb.BatchSignRequest(items=items)).items) == 4
    query = """
        SELECT action, outcome, event_details ->> 'reason' FROM audit.security_events
        WHERE user_id = %s AND event_type = 'request.refused'
    """
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        soon(lambda: len(connection.execute(query, (caller.user_id,)).fetchall()) >= 2)
        found = connection.execute(query, (caller.user_id,)).fetchall()
    assert found == [("BatchSign", "blocked", "KEY_NOT_FOUND")] * 2


def test_a_batch_that_may_be_charged_when_its_time_is_up_says_so_as_a_single_use_does(deployment: Deployment) -> None:
    """Promise 4: UNAVAILABLE and DEADLINE_EXCEEDED are for what was certainly not charged."""
    text = deployment.config_file.read_text().replace("call_seconds_max = 20", "call_seconds_max = 2")
    deployment.config_file.write_text(text)
    with wired(deployment.database.dsn) as (wire, dsn):
        (deployment.directory / "dsn").unlink()
        write_private(deployment.directory / "dsn", dsn.encode())
        with deployment.serving() as server:
            caller = server.caller()
            made(caller, "ed25519")
            one = cpb.SignRequest(key="k", message=b"m")
            uses: tuple[tuple[Any, Any], ...] = (
                (caller.crypto.Sign, one),
                (caller.crypto.BatchSign, cpb.BatchSignRequest(items=[one] * 3)),
            )
            for use, request in uses:
                charged = wire.stop_at(b"{OK", "server")
                late = use.future(request, timeout=15)
                charged.wait()
                assert refusal_of(late.exception()).reason == "OUTCOME_UNKNOWN"
                charged.decide("let through")
            # The first of the batch was under way, the others waited behind it.
            assert 2 <= caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key.usage_count <= 4


def test_batches_that_are_given_up_again_and_again_take_no_room(deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace("call_seconds_max = 20", "call_seconds_max = 20\ncalls_per_user_max = 10")
    deployment.config_file.write_text(text)
    with deployment.serving() as server:
        caller = server.caller()
        made(caller, "rsa")
        good, bad = cpb.SignRequest(key="k", message=b"m"), cpb.SignRequest(key="", message=b"m")
        for _ in range(30):
            with pytest.raises(grpc.RpcError):
                caller.crypto.BatchSign(cpb.BatchSignRequest(items=[good, bad] * 128), timeout=0.02)
        soon(lambda: caller.crypto.Sign(good, timeout=10).signature != b"")


def test_signatures_come_and_are_verified_in_batches(caller: Caller) -> None:
    kinds = ("secp256k1", "secp256r1", "ed25519", "rsa")
    for kind in kinds:
        made(caller, kind, name=kind)
    requests = [cpb.SignRequest(key=kind, message=bytes((number,))) for number in range(8) for kind in kinds]
    signed = caller.crypto.BatchSign(cpb.BatchSignRequest(items=requests)).items
    verify = [
        cpb.VerifyRequest(key=request.key, message=request.message, signature=answer.result.signature)
        for request, answer in zip(requests, signed, strict=True)
    ]
    verify.append(cpb.VerifyRequest(key="ed25519", message=b"other", signature=signed[2].result.signature))
    verified = caller.crypto.BatchVerify(cpb.BatchVerifyRequest(items=verify)).items
    assert [item.result.valid for item in verified] == [True] * len(requests) + [False]


def test_a_batch_has_1_to_256_items_and_at_most_a_mebibyte(caller: Caller) -> None:
    made(caller, "aes")
    item = cpb.EncryptRequest(key="k", plaintext=b"x")
    assert len(caller.crypto.BatchEncrypt(cpb.BatchEncryptRequest(items=[item] * 256)).items) == 256
    big = cpb.EncryptRequest(key="k", plaintext=bytes(65_536))
    assert len(caller.crypto.BatchEncrypt(cpb.BatchEncryptRequest(items=[big] * 16)).items) == 16
    for request in (
        cpb.BatchEncryptRequest(),
        cpb.BatchEncryptRequest(items=[item] * 257),
        cpb.BatchEncryptRequest(items=[big] * 16 + [item]),
    ):
        found = refusal(caller.crypto.BatchEncrypt, request)
        assert (found.code, found.metadata) == (grpc.StatusCode.INVALID_ARGUMENT, {"field": "items"})


def test_verifying_the_empty_batch_is_malformed_in_every_form(caller: Caller) -> None:
    for call, request in (
        (caller.crypto.BatchSign, cpb.BatchSignRequest()),
        (caller.crypto.BatchVerify, cpb.BatchVerifyRequest()),
        (caller.crypto.BatchDecrypt, cpb.BatchDecryptRequest()),
        (caller.crypto.BatchReEncrypt, cpb.BatchReEncryptRequest()),
    ):
        assert refusal(call, request).metadata == {"field": "items"}
