"""What the ledger promises, seen by a client: exact limits, records before results, repeats without a second charge."""

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psycopg
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import item_reason, refusal, refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer


def limited(caller: Caller, kind: str, limit: int, name: str = "k") -> kpb.Key:
    request = create(kind, name=name)
    request.max_usage_count = limit
    return caller.keys.CreateKey(request, timeout=30).key


def records(server: RunningServer, key_id: str, action: str) -> int:
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        query = "SELECT count(*) FROM audit.security_events WHERE resource_id = %s AND action = %s AND outcome = 'success'"
        row = connection.execute(query, (key_id, action)).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("limit", [1, pytest.param(7, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)])
def test_at_most_n_results_are_had_and_all_n_can_be(deployment: Deployment, limit: int) -> None:
    with deployment.serving() as one, deployment.serving() as other:
        first = one.caller()
        callers = [first, other.caller(first.user_id), one.caller(first.user_id), other.caller(first.user_id)]
        key = limited(first, "ed25519", limit)
        outcomes: Counter[str] = Counter()
        lock = threading.Lock()

        def work(number: int) -> None:
            for _ in range(limit // 4 + 3):
                try:
                    callers[number % 4].crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=20)
                    outcome = "OK"
                except grpc.RpcError as error:
                    outcome = refusal_of(error).reason
                with lock:
                    outcomes[outcome] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert outcomes["OK"] == limit
        assert set(outcomes) == {"OK", "USAGE_LIMIT_REACHED"}
        after = first.keys.GetKey(kpb.GetKeyRequest(key="k")).key
        assert (after.usage_count, after.state) == (limit, kpb.KEY_STATE_INACTIVE)
        assert records(one, key.id, "sign") == limit
        found = refusal(first.keys.ReactivateKey, kpb.ReactivateKeyRequest(key="k"))
        assert found.reason == "USAGE_LIMIT_REACHED"


def test_what_is_charged_what_is_recorded_and_what_is_neither(caller: Caller, server: RunningServer) -> None:
    aes, ec, rsa = (made(caller, kind, name=kind) for kind in ("aes", "secp256k1", "rsa-encryption"))
    sealed = caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=b"p")).ciphertext
    caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed))
    caller.crypto.GenerateDataKey(cpb.GenerateDataKeyRequest(key="aes"))
    caller.crypto.Encrypt(cpb.EncryptRequest(key="rsa-encryption", plaintext=b"p"))
    signature = caller.crypto.Sign(cpb.SignRequest(key="secp256k1", message=b"m")).signature
    caller.crypto.Verify(cpb.VerifyRequest(key="secp256k1", message=b"m", signature=signature))
    caller.keys.GetPublicKey(kpb.GetPublicKeyRequest(key="secp256k1"))
    counts = {key.name: key.usage_count for key in caller.keys.ListKeys(kpb.ListKeysRequest()).keys}
    assert counts == {"aes": 2, "secp256k1": 1, "rsa-encryption": 1}
    assert [records(server, aes.id, action) for action in ("encrypt", "decrypt", "generate_data_key")] == [1, 1, 1]
    assert (records(server, ec.id, "sign"), records(server, ec.id, "verify"), records(server, rsa.id, "encrypt")) == (1, 0, 1)


def test_a_record_holds_digests_and_nothing_of_the_plaintext(caller: Caller, server: RunningServer) -> None:
    aes, ec = made(caller, "aes", name="aes"), made(caller, "secp256k1", name="ec")
    plaintext = b"a very particular plaintext"
    sealed = caller.crypto.Encrypt(cpb.EncryptRequest(key="aes", plaintext=plaintext, aad=plaintext)).ciphertext
    caller.crypto.Sign(cpb.SignRequest(key="ec", message=plaintext))
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        query = "SELECT action, event_details::text FROM audit.security_events WHERE resource_id = ANY(%s) AND action = ANY(%s)"
        told: dict[str, str] = dict(connection.execute(query, ([aes.id, ec.id], ["encrypt", "sign"])).fetchall())
    assert hashlib.sha256(sealed).hexdigest() in told["encrypt"]
    assert hashlib.sha256(plaintext).hexdigest() in told["sign"]
    assert hashlib.sha256(plaintext).hexdigest() not in told["encrypt"]


def test_a_batch_is_charged_in_the_order_of_its_items(caller: Caller) -> None:
    limited(caller, "ed25519", 5)
    items = [cpb.SignRequest(key="k", message=bytes((number,))) for number in range(40)]
    answers = caller.crypto.BatchSign(cpb.BatchSignRequest(items=items), timeout=20).items
    outcomes = [item_reason(item.error) if item.WhichOneof("outcome") == "error" else "OK" for item in answers]
    assert outcomes == ["OK"] * 5 + ["USAGE_LIMIT_REACHED"] * 35


def test_an_aes_key_makes_2_to_the_32_ciphertexts_and_then_says_that_its_limit_is_reached(
    caller: Caller, server: RunningServer
) -> None:
    made(caller, "aes")
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        query = "UPDATE cryptography.keys SET usage_counter = 4294967295 WHERE user_id = %s"
        connection.execute(query, (caller.user_id,))
    request = cpb.EncryptRequest(key="k", plaintext=b"p")
    sealed = caller.crypto.Encrypt(request)
    for _ in range(2):
        assert refusal(caller.crypto.Encrypt, request).reason == "USAGE_LIMIT_REACHED"
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed.ciphertext)).plaintext == b"p"


def test_a_repeat_gives_the_same_result_without_a_second_charge(caller: Caller, server: RunningServer) -> None:
    aes, ec = made(caller, "aes", name="aes"), made(caller, "secp256k1", name="ec")
    sign = cpb.SignRequest(key="ec", message=b"m", request_id="order-1")
    encrypt = cpb.EncryptRequest(key="aes", plaintext=b"p", request_id="order-1")
    data_key = cpb.GenerateDataKeyRequest(key="aes", request_id="order-1")
    calls: tuple[tuple[Callable[[Any], object], object], ...] = (
        (caller.crypto.Sign, sign),
        (caller.crypto.Encrypt, encrypt),
        (caller.crypto.GenerateDataKey, data_key),
    )
    for call, request in calls:
        first = call(request)
        assert [call(request) for _ in range(3)] == [first] * 3
    counts = {key.name: key.usage_count for key in caller.keys.ListKeys(kpb.ListKeysRequest()).keys}
    assert counts == {"aes": 2, "ec": 1}
    assert records(server, ec.id, "sign") == 1
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        kept = connection.execute("SELECT result FROM cryptography.request_records WHERE user_id = %s", (caller.user_id,))
        stored = b"".join(bytes(row[0]) for row in kept.fetchall())
    assert caller.crypto.GenerateDataKey(data_key).plaintext not in stored
    assert uuid.UUID(aes.id)


def test_a_request_id_is_for_one_request_of_one_user(caller: Caller, server: RunningServer) -> None:
    made(caller, "secp256k1")
    caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m", request_id="r"))
    found = refusal(caller.crypto.Sign, cpb.SignRequest(key="k", message=b"other", request_id="r"))
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    other = server.caller()
    made(other, "secp256k1")
    assert other.crypto.Sign(cpb.SignRequest(key="k", message=b"other", request_id="r")).signature


def test_twins_at_once_are_one_charge_and_one_result(caller: Caller) -> None:
    made(caller, "secp256k1")
    request = cpb.SignRequest(key="k", message=b"m", request_id="twin")
    calls = [caller.crypto.Sign.future(request, timeout=20) for _ in range(12)]
    assert len({call.result().signature for call in calls}) == 1
    assert caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key.usage_count == 1


def test_the_last_use_can_be_repeated_and_a_revoked_keys_cannot(caller: Caller) -> None:
    limited(caller, "secp256k1", 1)
    request = cpb.SignRequest(key="k", message=b"m", request_id="last")
    first = caller.crypto.Sign(request)
    assert caller.crypto.Sign(request) == first
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="r"))
    assert refusal(caller.crypto.Sign, request).reason == "KEY_REVOKED"


def test_a_repeat_is_answered_by_another_server_and_after_a_restart(deployment: Deployment) -> None:
    request = cpb.SignRequest(key="k", message=b"m", request_id="r")
    with deployment.serving() as one, deployment.serving() as other:
        caller = one.caller()
        made(caller, "secp256k1")
        first = caller.crypto.Sign(request)
        assert other.caller(caller.user_id).crypto.Sign(request) == first
    with deployment.serving() as third:
        assert third.caller(caller.user_id).crypto.Sign(request) == first


@pytest.mark.parametrize("request_id", [" ", "x" * 65, "a\nb", "ü", "a b"])
def test_a_request_id_has_a_form(caller: Caller, request_id: str) -> None:
    made(caller, "secp256k1")
    found = refusal(caller.crypto.Sign, cpb.SignRequest(key="k", message=b"m", request_id=request_id))
    assert found.metadata == {"field": "request_id"}
