"""Rotations that failed are tried again: what has not happened is done, and what is no longer wanted says why."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest

from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import create, made
from tests.conformance.test_outages import soon
from tests.conformance.test_rotation import key_of, rotate, rotation_of
from tests.fixtures.server import Caller, Deployment, RunningServer


@contextmanager
def replaced(server: RunningServer, function: str, body: str) -> Iterator[None]:
    """Let a function of the schema `cryptography` do *body* within the block."""
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        row = connection.execute("SELECT pg_get_functiondef(%s::regproc)", (f"cryptography.{function}",)).fetchone()
        assert row is not None
        kept = str(row[0])
        head = kept[: kept.index("AS $function$")]
        connection.execute(f"{head} AS $function$ BEGIN {body} END; $function$".encode())
        try:
            yield
        finally:
            connection.execute(kept.encode())


def edit(server: RunningServer, rotation: rpb.Rotation, change: str) -> None:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(f"UPDATE cryptography.key_rotations SET {change} WHERE id = %s".encode(), (rotation.id,))


def failed(server: RunningServer, caller: Caller) -> rpb.Rotation:
    """Return a rotation of the key k that has failed before the switch."""
    with replaced(server, "switch_key", "RETURN 'FINE';"):
        rotation = rotate(caller)
    assert rotation.status == rpb.ROTATION_STATUS_FAILED
    return rotation


def retry(caller: Caller, rotation: rpb.Rotation) -> rpb.Rotation:
    return caller.rotation.RetryRotation(rpb.RetryRotationRequest(rotation_id=rotation.id), timeout=60).rotation


def retry_refused(caller: Caller, rotation: rpb.Rotation) -> str:
    return refusal(caller.rotation.RetryRotation, rpb.RetryRotationRequest(rotation_id=rotation.id)).reason


def asked_for(key: kpb.Key) -> apb.SearchEventsRequest:
    return apb.SearchEventsRequest(resource_id=key.id)


def grant(server: RunningServer, key: kpb.Key, owner: Caller, grantee: Caller) -> None:
    """Let *grantee* sign with a key of *owner*."""
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        connection.execute("SELECT set_config('app.user_id', %s, true)", (str(owner.user_id),))
        connection.execute(
            "SELECT cryptography.grant_key(%s, %s, '{sign}', NULL, (SELECT version FROM authentication.users WHERE id = %s))",
            (key.id, grantee.user_id, owner.user_id),
        )


def test_a_rotation_that_failed_is_done_when_it_is_tried_again(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    rotation = failed(server, caller)
    again = retry(caller, rotation)
    assert (again.id, again.status, again.error_message) == (rotation.id, rpb.ROTATION_STATUS_COMPLETED, "")
    assert key_of(caller).id == again.new_key_id
    assert retry(caller, rotation) == again, "a rotation that is completed is returned"


def test_a_rotation_that_waits_is_tried_at_once(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        rotation = rotate(caller)
    assert rotation.status == rpb.ROTATION_STATUS_PENDING
    edit(server, rotation, "next_attempt_at = now() + interval '1 hour'")
    assert retry(caller, rotation).status == rpb.ROTATION_STATUS_COMPLETED


def test_a_rotation_that_failed_after_the_switch_is_completed_however_old(server: RunningServer) -> None:
    caller, grantee = server.caller(), server.caller()
    key = made(caller, "ed25519")
    grant(server, key, caller, grantee)
    with replaced(server, "copy_grants", "RAISE EXCEPTION 'no';"):
        rotation = rotate(caller)
    assert rotation.new_key_id == key_of(caller).id, "the switch happened"
    edit(server, rotation, "migration_status = 'failed', attempts = 10")
    again = retry(caller, rotation)
    assert (again.status, again.affected_records_count) == (rpb.ROTATION_STATUS_COMPLETED, 1)
    assert again.new_key_id == rotation.new_key_id


def test_a_request_of_more_than_a_day_ago_is_not_tried_again(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    rotation = failed(server, caller)
    edit(server, rotation, "created_at = created_at - interval '25 hours'")
    assert retry_refused(caller, rotation) == "DEADLINE_EXCEEDED"
    assert rotate(caller).status == rpb.ROTATION_STATUS_COMPLETED


@pytest.mark.parametrize(
    ("move", "reason"), [("revoke", "KEY_REVOKED"), ("deactivate", "KEY_INACTIVE"), ("rotate", "KEY_INACTIVE")]
)
def test_a_rotation_of_a_key_that_must_not_be_rotated_any_more_says_why(server: RunningServer, move: str, reason: str) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    rotation = failed(server, caller)
    if move == "revoke":
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="lost"))
    elif move == "deactivate":
        caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    else:
        rotate(caller)
    assert retry_refused(caller, rotation) == reason


def test_of_two_rotations_of_a_key_one_is_under_way(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    first = failed(server, caller)
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        second = rotate(caller)
    edit(server, second, "next_attempt_at = now() + interval '1 hour'")
    assert retry_refused(caller, first) == "STALE"
    assert retry(caller, second).status == rpb.ROTATION_STATUS_COMPLETED


def test_a_rotation_of_another_is_not_there(server: RunningServer) -> None:
    caller, other = server.caller(), server.caller()
    made(caller, "ed25519")
    assert retry_refused(other, failed(server, caller)) == "ROTATION_NOT_FOUND"
    assert retry_refused(other, rpb.Rotation(id=str(uuid4()))) == "ROTATION_NOT_FOUND"


def test_a_rotator_rotates_any_key_and_the_owner_stays(server: RunningServer) -> None:
    owner, rotator = server.caller(), server.caller(server.deployment.new_user(role="rotator"))
    key = made(owner, "ed25519")
    rotation = rotate(rotator, key=key.id, request_id="by-a-rotator")
    assert rotation.status == rpb.ROTATION_STATUS_COMPLETED
    assert (rotation.initiated_by, rotation.old_key_id) == (str(rotator.user_id), key.id)
    assert key_of(owner).id == rotation.new_key_id
    assert owner.crypto.Sign(cpb.SignRequest(key="k", message=b"m")).key_id == rotation.new_key_id
    assert rotate(rotator, key=key.id, request_id="by-a-rotator") == rotation
    again = failed(server, owner)
    assert retry(rotator, again).status == rpb.ROTATION_STATUS_COMPLETED
    events = server.auditor().audit.SearchEvents(asked_for(key)).events
    assert str(rotator.user_id) in {event.user_id for event in events if event.event_type == "key.rotation_requested"}


def made_for_one_use(owner: Caller) -> kpb.Key:
    request = create("ed25519")
    request.max_usage_count = 1
    return owner.keys.CreateKey(request, timeout=30).key


def stop(owner: Caller, key: kpb.Key, by: str) -> None:
    """Stop a key that may be used once: *by* its deactivation, or by its one use."""
    if by == "deactivated":
        owner.keys.DeactivateKey(kpb.DeactivateKeyRequest(key=key.id))
    else:
        owner.crypto.Sign(cpb.SignRequest(key=key.id, message=b"m"))


STOPPED = pytest.mark.parametrize(("by", "reason"), [("deactivated", "KEY_INACTIVE"), ("spent", "USAGE_LIMIT_REACHED")])


@STOPPED
def test_a_rotator_does_not_undo_that_the_owner_stopped_a_key(server: RunningServer, by: str, reason: str) -> None:
    owner, rotator = server.caller(), server.caller(server.deployment.new_user(role="rotator"))
    key = made_for_one_use(owner)
    stop(owner, key, by)
    found = refusal(rotator.rotation.RotateKey, rotation_of(key=key.id))
    assert (found.reason, found.code) == (reason, grpc.StatusCode.FAILED_PRECONDITION)
    assert rotate(owner).status == rpb.ROTATION_STATUS_COMPLETED, "the owner may"


@STOPPED
def test_a_key_that_is_stopped_after_a_rotator_asked_is_not_rotated(server: RunningServer, by: str, reason: str) -> None:
    owner, rotator = server.caller(), server.caller(server.deployment.new_user(role="rotator"))
    key = made_for_one_use(owner)
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        rotation = rotate(rotator, key=key.id)
    edit(server, rotation, "next_attempt_at = now() + interval '1 hour'")
    stop(owner, key, by)
    assert retry_refused(rotator, rotation) == reason
    edit(server, rotation, "next_attempt_at = now()")
    request = rpb.GetRotationRequest(rotation_id=rotation.id)
    soon(lambda: owner.rotation.GetRotation(request).rotation.status == rpb.ROTATION_STATUS_FAILED)
    assert owner.rotation.GetRotation(request).rotation.error_message.startswith(reason)
    assert key_of(owner).id == key.id


def test_a_rotator_sees_the_rotations_of_all_keys(server: RunningServer) -> None:
    one, two = server.caller(), server.caller()
    rotator = server.caller(server.deployment.new_user(role="rotator"))
    keys = [made(each, "ed25519") for each in (one, two)]
    rotations = [rotate(each) for each in (one, two)]
    newest = rotator.rotation.ListRotations(rpb.ListRotationsRequest(page_size=2)).rotations
    assert list(newest) == rotations[::-1]
    of_key = rotator.rotation.ListRotations(rpb.ListRotationsRequest(key=keys[0].id)).rotations
    assert list(of_key) == rotations[:1]
    assert rotator.rotation.GetRotation(rpb.GetRotationRequest(rotation_id=rotations[0].id)).rotation == rotations[0]
    assert list(one.rotation.ListRotations(rpb.ListRotationsRequest()).rotations) == rotations[:1]


def test_a_rotator_uses_no_key_and_learns_of_none_by_name(server: RunningServer) -> None:
    owner, user = server.caller(), server.deployment.new_user()
    key = made(owner, "ed25519")
    rotator = server.caller(user)
    own = made(rotator, "ed25519", name="own")
    assert refusal(rotator.rotation.RotateKey, rotation_of(key=key.id)).reason == "KEY_NOT_FOUND"
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("SELECT authentication.assign_role(%s, 'rotator')", (user,))
    for call, request in (
        (rotator.crypto.Sign, cpb.SignRequest(key="own", message=b"m")),
        (rotator.crypto.Sign, cpb.SignRequest(key=key.id, message=b"m")),
        (rotator.keys.GetKey, kpb.GetKeyRequest(key=key.id)),
        (rotator.crypto.GenerateRandom, cpb.GenerateRandomRequest(size_bytes=1)),
    ):
        found = refusal(call, request)
        assert (found.reason, found.code) == ("PERMISSION_DENIED", grpc.StatusCode.PERMISSION_DENIED)
        assert found.metadata["permission"] == "keys:rotate"
    assert refusal(rotator.rotation.RotateKey, rotation_of(key="k")).reason == "KEY_NOT_FOUND"
    assert refusal(rotator.rotation.RotateKey, rotation_of(key=str(uuid4()))).reason == "KEY_NOT_FOUND"
    assert rotate(rotator, key="own").old_key_id == own.id, "their own, as any owner"


def watched(caller: Caller, rotation_id: str) -> Iterator[rpb.Rotation]:
    for answer in caller.rotation.WatchRotation(rpb.WatchRotationRequest(rotation_id=rotation_id), timeout=60):
        yield answer.rotation


def test_a_rotation_is_watched_until_it_is_over(server: RunningServer) -> None:
    caller, other = server.caller(), server.caller()
    made(caller, "ed25519")
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        rotation = rotate(caller)
    edit(server, rotation, "next_attempt_at = now() + interval '1 hour'")
    changes = watched(caller, rotation.id)
    assert next(changes) == rotation
    again = retry(server.caller(caller.user_id), rotation)
    rest = list(changes)
    assert rest[-1] == again
    assert [each.status for each in rest].count(rpb.ROTATION_STATUS_COMPLETED) == 1
    assert list(watched(caller, rotation.id)) == [again], "of one that is over the stream ends at once"
    rotator = server.caller(server.deployment.new_user(role="rotator"))
    assert list(watched(rotator, rotation.id)) == [again]
    with pytest.raises(grpc.RpcError) as refused:
        list(watched(other, rotation.id))
    assert refusal_of(refused.value).reason == "ROTATION_NOT_FOUND"


def test_who_watches_rotations_takes_no_place_from_auditors(server: RunningServer, auditor: Caller) -> None:
    watching: list[Any] = []
    for caller in (server.caller(), server.caller()):
        made(caller, "ed25519")
        with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
            rotation = rotate(caller)
        edit(server, rotation, "next_attempt_at = now() + interval '1 hour'")
        request = rpb.WatchRotationRequest(rotation_id=rotation.id)
        watching += [caller.rotation.WatchRotation(request, timeout=60) for _ in range(4)]
    for stream in watching:
        assert next(stream).rotation.status == rpb.ROTATION_STATUS_PENDING
    events: Any = auditor.audit.TailEvents(apb.TailEventsRequest(), timeout=60)
    assert next(events)
    for stream in (*watching, events):
        stream.cancel()


def test_a_rotation_that_has_waited_for_long_is_a_warning_and_a_number(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        rotation = rotate(caller)
    edit(server, rotation, "created_at = created_at - interval '3 hours', next_attempt_at = now() + interval '1 hour'")
    soon(lambda: "a rotation has waited for 3 hours" in server.seen("/readyz")[1])
    samples = {name: number for (name, _), number in server.metrics().items()}
    assert samples["kms_rotation_oldest_age_seconds"] >= 3 * 3600
    before = samples["kms_rotations_failed"]
    edit(server, rotation, "next_attempt_at = now()")  # and fails for good: its request is not the service's any more
    soon(lambda: {name: number for (name, _), number in server.metrics().items()}["kms_rotations_failed"] > before)
    assert "a rotation has waited" not in server.seen("/readyz")[1]


@pytest.mark.timeout(300)
def test_a_rotation_is_done_by_a_machine_that_does_not_serve(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller = server.caller()
        key = made(caller, "ed25519")
        with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
            rotation = rotate(caller)
        edit(server, rotation, "next_attempt_at = now() + interval '1 hour'")
    edit(server, rotation, "next_attempt_at = now()")
    command = [sys.executable, "-m", "kms", "--config", str(deployment.config_file), "work"]
    query = "SELECT migration_status FROM cryptography.key_rotations WHERE old_key_id = %s"
    log_file = deployment.directory / "work.log"
    with (
        psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection,
        log_file.open("wb") as log,
        subprocess.Popen(command, env=deployment.environment, stdout=log, stderr=log) as process,
    ):
        try:
            while connection.execute(query, (key.id,)).fetchall() != [("completed",)]:
                assert process.poll() is None, log_file.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0, log_file.read_text()
        finally:
            process.kill()
    assert '"event": "stopped"' in log_file.read_text()
