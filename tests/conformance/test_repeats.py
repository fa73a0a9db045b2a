"""A request that is repeated under its `request_id` is one charge and one result, whatever happens in between."""

import base64
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from typing import Any

import psycopg
import pytest

from kms.pki.private_file import write_private
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.crew import crew
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer
from tests.fixtures.wire import wired

Calls = list[tuple[Any, Any]]  # a method of a stub and its request


def calls(caller: Caller, request_id: str) -> Calls:
    """A request of each kind that can be repeated."""
    return [
        (caller.crypto.Sign, cpb.SignRequest(key="ec", message=b"m", request_id=request_id)),
        (caller.crypto.Encrypt, cpb.EncryptRequest(key="aes", plaintext=b"p", request_id=request_id)),
        (caller.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="aes", request_id=request_id)),
    ]


def with_keys(caller: Caller) -> Caller:
    for kind, name in (("secp256k1", "ec"), ("aes", "aes")):
        made(caller, kind, name=name)
    return caller


def counts(caller: Caller) -> dict[str, int]:
    return {key.name: key.usage_count for key in caller.keys.ListKeys(kpb.ListKeysRequest(), timeout=20).keys}


def rows(deployment: Deployment, query: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), values)
        return cursor.fetchall() if cursor.description else []


def test_twins_at_two_processes_are_one_charge_and_one_result(deployment: Deployment) -> None:
    with deployment.serving() as one, deployment.serving() as other:
        here = with_keys(one.caller())
        there = other.caller(here.user_id)
        for (call, request), (elsewhere, _) in zip(calls(here, "twin"), calls(there, "twin"), strict=True):
            under_way = [use.future(request, timeout=20) for use in [call, elsewhere] * 5]
            assert len({each.result().SerializeToString(deterministic=True) for each in under_way}) == 1
        assert counts(here) == {"ec": 1, "aes": 2}


def test_an_answer_that_was_lost_with_its_process_is_had_from_the_next_without_a_second_charge(deployment: Deployment) -> None:
    with wired(deployment.database.dsn) as (wire, dsn), ExitStack() as stack:
        (deployment.directory / "dsn").unlink()
        write_private(deployment.directory / "dsn", dsn.encode())
        [member] = stack.enter_context(crew(deployment, 1))
        server = RunningServer(deployment, member.process, deployment.directory / "member-0.log", member.port, stack)
        caller = with_keys(server.caller())
        request = cpb.SignRequest(key="ec", message=b"m", request_id="lost")
        stop = wire.stop_at(b"{OK}", "server")
        lost = caller.crypto.Sign.future(request, timeout=20)
        stop.wait()
        member.kill()
        stop.decide("cut")
        assert lost.exception() is not None
        member.begin_again()
        answer = caller.crypto.Sign(request, timeout=60, wait_for_ready=True)
        assert caller.crypto.Verify(cpb.VerifyRequest(key="ec", message=b"m", signature=answer.signature), timeout=20).valid
        assert counts(caller)["ec"] == 1
        query = "SELECT count(*) FROM audit.security_events WHERE event_details ->> 'input_sha256' = %s AND outcome = 'success'"
        assert rows(deployment, query, sha256(b"m").hexdigest()) == [(1,)]


def test_a_twin_that_made_the_last_use_meanwhile_is_repeated_and_not_refused_for_the_limit(deployment: Deployment) -> None:
    """Promise 2: all N results can be had, also the last one by who repeats its request_id."""
    with deployment.serving() as one, wired(deployment.database.dsn) as (wire, dsn):
        (deployment.directory / "dsn").unlink()
        write_private(deployment.directory / "dsn", dsn.encode())
        with deployment.serving() as other:
            here = one.caller()
            there = other.caller(here.user_id)
            limited = create("ed25519", name="once-only")
            limited.max_usage_count = 1
            here.keys.CreateKey(limited, timeout=20)
            request = cpb.SignRequest(key="once-only", message=b"m", request_id="last")
            looked = wire.stop_at(b"once-only", "client")
            late = there.crypto.Sign.future(request, timeout=15)
            looked.wait()  # that nothing was answered under this id it has seen; now it looks at the key
            first = here.crypto.Sign(request, timeout=15)
            looked.decide("let through")
            assert late.result().signature == first.signature


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("key_status = 'inactive', deactivated_at = now()", ""),
        ("created_at = '2020-01-01', expires_at = now()", ""),
        ("max_usage_count = usage_counter", ""),
        ("key_status = 'compromised', compromised_at = now()", "KEY_COMPROMISED"),
        ("key_status = 'revoked', revoked_at = now()", "KEY_REVOKED"),
        ("destruction_scheduled_at = 'tomorrow'", "KEY_PENDING_DESTRUCTION"),
        ("destruction_scheduled_at = now()", "KEY_DESTROYED"),
    ],
)
def test_what_a_key_made_is_repeated_after_its_end_and_not_after_its_revocation(
    caller: Caller, server: RunningServer, change: str, reason: str
) -> None:
    with_keys(caller)
    first = [call(request, timeout=20) for call, request in calls(caller, "r")]
    server.deployment.edit_keys(f"UPDATE cryptography.keys SET {change} WHERE user_id = %s", caller.user_id)
    for (call, request), answer in zip(calls(caller, "r"), first, strict=True):
        if reason:
            assert refusal(call, request).reason == reason
        else:
            assert call(request, timeout=20) == answer
    assert counts(caller) == {"ec": 1, "aes": 2}


def test_a_data_key_that_is_told_again_is_a_record_and_no_charge(caller: Caller, server: RunningServer) -> None:
    with_keys(caller)
    first = [call(request, timeout=20) for call, request in calls(caller, "r")]
    for _ in range(2):
        assert [call(request, timeout=20) for call, request in calls(caller, "r")] == first
    kept_back = cpb.GenerateDataKeyRequest(key="aes", without_plaintext=True, request_id="kept-back")
    assert caller.crypto.GenerateDataKey(kept_back, timeout=20) == caller.crypto.GenerateDataKey(kept_back, timeout=20)
    query = """
        SELECT action, count(*) FROM audit.security_events
        WHERE user_id = %s AND event_type = 'key.used' AND outcome = 'success' GROUP BY action ORDER BY action
    """
    assert rows(server.deployment, query, caller.user_id) == [
        ("encrypt", 1),
        ("generate_data_key", 2),
        ("generate_data_key.repeat", 2),
        ("sign", 1),
    ]
    assert counts(caller) == {"ec": 1, "aes": 3}


def test_a_result_is_repeated_for_24_hours_and_then_made_anew(caller: Caller, server: RunningServer) -> None:
    with_keys(caller)
    first = [call(request, timeout=20) for call, request in calls(caller, "r")]
    age = "UPDATE cryptography.request_records SET created_at = now() - interval '%s' WHERE user_id = %%s"
    rows(server.deployment, age % "23 hours 59 minutes", caller.user_id)
    assert [call(request, timeout=20) for call, request in calls(caller, "r")] == first
    assert counts(caller) == {"ec": 1, "aes": 2}
    rows(server.deployment, age % "24 hours", caller.user_id)
    again = [call(request, timeout=20) for call, request in calls(caller, "r")]
    assert all(new != old for new, old in zip(again[1:], first[1:], strict=True))
    assert counts(caller) == {"ec": 2, "aes": 4}


def test_an_id_is_another_users_own_and_of_another_body_refused(caller: Caller, new_caller: Callable[[], Caller]) -> None:
    other = with_keys(new_caller())
    first = [call(request, timeout=20) for call, request in calls(with_keys(caller), "r")]
    theirs = [call(request, timeout=20) for call, request in calls(other, "r")]
    assert all(here != there for here, there in zip(first, theirs, strict=True))
    for call, request in calls(caller, "r"):
        field = "message" if isinstance(request, cpb.SignRequest) else "aad"
        setattr(request, field, b"another")
        assert refusal(call, request).reason == "REQUEST_ID_REUSED"
    assert counts(caller) == counts(other) == {"ec": 1, "aes": 2}


def test_what_is_kept_for_repeats_holds_no_plaintext(caller: Caller, server: RunningServer) -> None:
    with_keys(caller)
    told = [b"a message to be signed", b"a plaintext to be encrypted", b"associated with it"]
    sign = cpb.SignRequest(key="ec", message=told[0], request_id="r")
    encrypt = cpb.EncryptRequest(key="aes", plaintext=told[1], aad=told[2], request_id="r")
    data_key = cpb.GenerateDataKeyRequest(key="aes", aad=told[2], request_id="r")
    crypto = caller.crypto
    crypto.Sign(sign, timeout=20)
    ciphertext = crypto.Encrypt(encrypt, timeout=20).ciphertext
    told.append(crypto.GenerateDataKey(data_key, timeout=20).plaintext)
    assert crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext, aad=told[2]), timeout=20).plaintext == told[1]
    query = "SELECT rpc, request_id, body_mac, result, r::text FROM cryptography.request_records AS r WHERE user_id = %s"
    kept = rows(server.deployment, query, caller.user_id)
    assert sorted(row[0] for row in kept) == ["Encrypt", "GenerateDataKey", "Sign"]
    stored = b"\n".join(part if isinstance(part, bytes) else part.encode() for row in kept for part in row)
    assert ciphertext in stored  # so that what is looked for would be found
    for secret in told:
        digest = sha256(secret).digest()
        spellings = [form for each in (secret, digest) for form in (each, each.hex().encode(), base64.b64encode(each))]
        assert not [spelling for spelling in spellings if spelling in stored]
