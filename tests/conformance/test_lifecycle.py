"""The moves between states and the limits in time, through the API; the row's times are moved, never the clock."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, RunningServer

SIGN = cpb.SignRequest(key="k", message=b"m")


def ahead(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int(seconds * 1e9))
    return stamp


def rows(server: RunningServer, query: str, *values: object) -> list[tuple[object, ...]]:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        return connection.execute(query.encode(), values).fetchall()


def test_a_key_is_deactivated_reactivated_and_revoked_and_each_move_advances_its_version(caller: Caller) -> None:
    made(caller, "secp256k1")
    inactive = caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k")).key
    assert (inactive.state, inactive.version) == (kpb.KEY_STATE_INACTIVE, 2)
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_INACTIVE"
    active = caller.keys.ReactivateKey(kpb.ReactivateKeyRequest(key="k", version=2)).key
    assert (active.state, active.version) == (kpb.KEY_STATE_ACTIVE, 3)
    assert caller.crypto.Sign(SIGN).signature
    revoked = caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="left the company")).key
    assert (revoked.state, revoked.version, revoked.usage_count) == (kpb.KEY_STATE_REVOKED, 4, 1)
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_REVOKED"
    again = refusal(caller.keys.ReactivateKey, kpb.ReactivateKeyRequest(key="k"))
    assert (again.code, again.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_REVOKED")


def test_a_move_from_another_version_is_stale(caller: Caller) -> None:
    made(caller, "secp256k1")
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k", version=1))
    found = refusal(caller.keys.RevokeKey, kpb.RevokeKeyRequest(key="k", reason="r", version=1))
    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE")


def test_two_moves_at_once_from_one_version_one_wins(caller: Caller) -> None:
    for number in range(5):
        made(caller, "aes", name=f"k{number}")
        calls: list[Any] = [
            caller.keys.DeactivateKey.future(kpb.DeactivateKeyRequest(key=f"k{number}", version=1), timeout=15),
            caller.keys.RevokeKey.future(kpb.RevokeKeyRequest(key=f"k{number}", reason="r", version=1), timeout=15),
        ]
        codes = sorted(call.code().name for call in calls)
        assert codes in (["ABORTED", "OK"], ["FAILED_PRECONDITION", "OK"])


def test_a_compromised_key_neither_protects_nor_processes(caller: Caller) -> None:
    made(caller, "aes")
    ciphertext = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    request = kpb.MarkKeyCompromisedRequest(key="k", reason="laptop stolen", occurred_at=ahead(-3600))
    assert caller.keys.MarkKeyCompromised(request).key.state == kpb.KEY_STATE_COMPROMISED
    assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext)).reason == "KEY_COMPROMISED"
    made(caller, "aes", name="other")
    future = kpb.MarkKeyCompromisedRequest(key="other", reason="r", occurred_at=ahead(3600))
    assert refusal(caller.keys.MarkKeyCompromised, future).metadata == {"field": "occurred_at"}


def test_destruction_is_scheduled_cancelled_and_when_due_final(caller: Caller, server: RunningServer) -> None:
    key = made(caller, "aes")
    assert refusal(caller.keys.ScheduleKeyDestruction, kpb.ScheduleKeyDestructionRequest(key="k")).reason == "KEY_ACTIVE"
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    for days in (1, 6, 91, 2**32 - 1):
        request = kpb.ScheduleKeyDestructionRequest(key="k", pending_days=days)
        assert refusal(caller.keys.ScheduleKeyDestruction, request).metadata == {"field": "pending_days"}
    pending = caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k")).key
    assert pending.state == kpb.KEY_STATE_PENDING_DESTRUCTION
    assert 29.9 < (pending.destruction_scheduled_at.seconds - time.time()) / 86400 < 30.1
    back = caller.keys.CancelKeyDestruction(kpb.CancelKeyDestructionRequest(key="k")).key
    assert back.state == kpb.KEY_STATE_INACTIVE
    caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k", pending_days=7))
    due = "UPDATE cryptography.keys SET destruction_scheduled_at = now() - interval '1 second' WHERE id = %s"
    server.deployment.edit_keys(due, key.id)
    assert caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key.state == kpb.KEY_STATE_DESTROYED
    assert refusal(caller.keys.CancelKeyDestruction, kpb.CancelKeyDestructionRequest(key="k")).reason == "KEY_DESTROYED"


def test_a_key_with_times_is_pre_active_then_active_then_expired(caller: Caller, server: RunningServer) -> None:
    request = create("secp256k1")
    request.activated_at.CopyFrom(ahead(3600))
    request.expires_at.CopyFrom(ahead(7200))
    key = caller.keys.CreateKey(request).key
    assert (key.state, key.activated_at.seconds) == (kpb.KEY_STATE_PRE_ACTIVE, request.activated_at.seconds)
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_PRE_ACTIVE"
    assert caller.keys.ActivateKey(kpb.ActivateKeyRequest(key="k")).key.state == kpb.KEY_STATE_ACTIVE
    assert caller.crypto.Sign(SIGN).signature
    expired = "UPDATE cryptography.keys SET created_at = now() - interval '2 hours', expires_at = clock_timestamp() WHERE id = %s"
    server.deployment.edit_keys(expired, key.id)
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_EXPIRED"
    assert caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key.state == kpb.KEY_STATE_EXPIRED


@pytest.mark.parametrize(("activates", "expires"), [(None, -1), (10, 5), (10, 10)])
def test_times_that_make_no_sense_are_malformed(caller: Caller, activates: int | None, expires: int) -> None:
    request = create("aes")
    moment = time.time_ns()
    if activates is not None:
        request.activated_at.FromNanoseconds(moment + activates * 10**9)
    request.expires_at.FromNanoseconds(moment + expires * 10**9)
    assert refusal(caller.keys.CreateKey, request).metadata == {"field": "expires_at"}


def test_an_update_lowers_and_shortens_and_never_the_reverse(caller: Caller) -> None:
    request = create("aes")
    request.max_usage_count = 10
    request.expires_at.CopyFrom(ahead(3600))
    caller.keys.CreateKey(request)
    update = kpb.UpdateKeyRequest(key="k", max_usage_count=5, metadata=kpb.KeyMetadata(entries={"a": "b"}))
    changed = caller.keys.UpdateKey(update).key
    assert (changed.max_usage_count, dict(changed.metadata), changed.version) == (5, {"a": "b"}, 2)
    for bad, field in (
        (kpb.UpdateKeyRequest(key="k", max_usage_count=6), "max_usage_count"),
        (kpb.UpdateKeyRequest(key="k", max_usage_count=0), "max_usage_count"),
        (kpb.UpdateKeyRequest(key="k", expires_at=ahead(7200)), "expires_at"),
        (kpb.UpdateKeyRequest(key="k", expires_at=ahead(-1)), "expires_at"),
        (kpb.UpdateKeyRequest(key="k"), "request"),
    ):
        assert refusal(caller.keys.UpdateKey, bad).metadata == {"field": field}
    assert caller.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", expires_at=ahead(60))).key.version == 3


def test_a_move_wants_a_reason_where_an_auditor_would(caller: Caller) -> None:
    made(caller, "aes")
    for reason in ("", " ", "x" * 201, "a\nb"):
        assert refusal(caller.keys.RevokeKey, kpb.RevokeKeyRequest(key="k", reason=reason)).metadata == {"field": "reason"}


def test_anothers_key_cannot_be_moved_and_is_answered_as_absent(new_caller: Callable[[], Caller]) -> None:
    ada, bob = new_caller(), new_caller()
    key = made(ada, "aes")
    for reference in (key.id, "k"):
        found = refusal(bob.keys.RevokeKey, kpb.RevokeKeyRequest(key=reference, reason="mine now"))
        assert found == refusal(bob.keys.RevokeKey, kpb.RevokeKeyRequest(key="absent", reason="mine now"))


def test_each_move_is_a_domain_event_with_the_next_version(caller: Caller, server: RunningServer) -> None:
    key = made(caller, "aes")
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="done"))
    query = "SELECT aggregate_version FROM audit.domain_events WHERE aggregate_id = %s ORDER BY aggregate_version"
    assert rows(server, query, key.id) == [(1,), (2,), (3,)]


def test_after_revoke_has_returned_no_use_succeeds(new_caller: Callable[[], Caller], server: RunningServer) -> None:
    caller = new_caller()
    other = server.caller(caller.user_id)  # another connection of the same user
    for number in range(40):
        name = f"k{number}"
        made(caller, "ed25519", name=name)
        other.crypto.Sign(cpb.SignRequest(key=name, message=b"m"))
        running = [other.crypto.Sign.future(cpb.SignRequest(key=name, message=b"m"), timeout=15) for _ in range(4)]
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=name, reason="r"))
        assert refusal(other.crypto.Sign, cpb.SignRequest(key=name, message=b"m")).reason == "KEY_REVOKED"
        assert {call.code().name for call in running} <= {"OK", "FAILED_PRECONDITION"}
