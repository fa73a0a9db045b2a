"""Rotation by policy: nobody asks, and a key that is due gets its successor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import create, made
from tests.conformance.test_outages import soon
from tests.conformance.test_rotation import key_of, rotate
from tests.conformance.test_rotation_retries import replaced, retry
from tests.fixtures.server import Caller, RunningServer

DAY = 86_400
SIGN = cpb.SignRequest(key="k", message=b"m")


def policy(*, every_days: int = 0, before_days: int = 0, **fields: Any) -> kpb.RotationPolicy:  # noqa: ANN401
    return kpb.RotationPolicy(
        every=Duration(seconds=every_days * DAY) if every_days else None,
        before_expiry=Duration(seconds=before_days * DAY) if before_days else None,
        **fields,
    )


EVERY = policy(every_days=90)


def set_policy(caller: Caller, wanted: kpb.RotationPolicy | None, key: str = "k") -> rpb.SetRotationPolicyResponse:
    return caller.rotation.SetRotationPolicy(rpb.SetRotationPolicyRequest(key=key, policy=wanted))


def run(server: RunningServer, query: str, *parameters: object) -> Sequence[tuple[Any, ...]]:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def pass_days(server: RunningServer, caller: Caller, days: int, name: str = "k") -> None:
    """Let a key be *days* older, and let workers look at its policy."""
    server.deployment.edit_keys(
        "UPDATE cryptography.keys SET created_at = created_at - make_interval(days => %s) WHERE user_id = %s AND key_name = %s",
        days,
        caller.user_id,
        name,
    )
    look(server, caller)


def look(server: RunningServer, caller: Caller) -> None:
    run(server, "UPDATE cryptography.rotation_policies SET look_at = now() WHERE user_id = %s", caller.user_id)


def rotated(caller: Caller, key: kpb.Key, name: str = "k") -> kpb.Key:
    """Wait until the key has a successor, and return it."""
    soon(lambda: key_of(caller, name).id != key.id)
    return key_of(caller, name)


def log(caller: Caller) -> list[rpb.Rotation]:
    return list(caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations)


def waits(server: RunningServer, function: str) -> bool:
    """Whether a call of *function* waits for a lock."""
    query = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return any(function in text for (text,) in run(server, query))


def a_round_passed(server: RunningServer) -> None:
    """Wait until a policy that became due after the call was followed: any that was due before was looked at."""
    marker = server.caller()
    key = made(marker, "ed25519")
    set_policy(marker, EVERY)
    pass_days(server, marker, 91)
    rotated(marker, key)


def test_a_key_is_rotated_when_its_time_has_come_once_however_late(server: RunningServer) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    answer = set_policy(caller, EVERY)
    shown = key_of(caller)
    assert shown.rotation_policy == answer.policy == policy(every_days=90, version=1)
    period = timedelta(days=90)
    assert shown.next_rotation_at.ToDatetime() == answer.next_rotation_at.ToDatetime() == key.created_at.ToDatetime() + period
    pass_days(server, caller, 1000)
    after = rotated(caller, key)
    assert after.rotation_policy == answer.policy, "the successor is under it"
    assert after.next_rotation_at.ToDatetime() == after.created_at.ToDatetime() + period
    predecessor = key_of(caller, "k@1")
    assert not predecessor.HasField("rotation_policy")
    assert not predecessor.HasField("next_rotation_at")
    a_round_passed(server)
    [rotation] = log(caller)
    assert (rotation.reason, rotation.initiated_by) == ("policy: every 90 days", "")
    assert caller.crypto.Sign(SIGN).key_id == after.id


def test_a_key_is_rotated_before_it_expires_and_also_afterwards(server: RunningServer) -> None:
    caller = server.caller()
    keys = []
    for name, days in (("k", 6), ("late", -1)):
        request = create("ed25519", name=name)
        request.expires_at.FromDatetime(datetime.now(UTC) + timedelta(days=30))
        keys.append(caller.keys.CreateKey(request).key)
        set_policy(caller, policy(before_days=7), name)
        moved = (
            "UPDATE cryptography.keys SET created_at = now() - interval '24 days', expires_at = now() + make_interval(days => %s)"
        )
        server.deployment.edit_keys(f"{moved} WHERE id = %s", days, keys[-1].id)
    assert rotated(caller, keys[0]).state == kpb.KEY_STATE_ACTIVE
    assert rotated(caller, keys[1], "late").state == kpb.KEY_STATE_ACTIVE
    assert {rotation.reason for rotation in log(caller)} == {"policy: 7 days before expiry"}


@pytest.mark.parametrize(("limit", "share", "uses"), [(10, 50, 5), (3, 99, 3)], ids=["a share", "at its limit"])
def test_a_key_is_rotated_at_a_share_of_its_limit_and_the_limit_stays_exact(
    server: RunningServer, limit: int, share: int, uses: int
) -> None:
    caller = server.caller()
    request = create("ed25519")
    request.max_usage_count = limit
    key = caller.keys.CreateKey(request).key
    set_policy(caller, policy(at_usage_percent=share))
    for _ in range(uses - 1):
        caller.crypto.Sign(SIGN)
    a_round_passed(server)
    assert key_of(caller).id == key.id, "one use is missing"
    caller.crypto.Sign(SIGN)
    after = rotated(caller, key)
    assert (key_of(caller, "k@1").usage_count, after.usage_count, after.max_usage_count) == (uses, 0, limit)
    assert caller.crypto.Sign(SIGN).key_id == after.id
    assert [rotation.reason for rotation in log(caller)] == [f"policy: {share} % of its uses"]


def test_a_key_is_rotated_at_once_when_it_is_compromised_if_its_policy_says_so(server: RunningServer) -> None:
    caller = server.caller()
    key, other = made(caller, "ed25519"), made(caller, "ed25519", name="other")
    set_policy(caller, policy(on_compromise=True))
    set_policy(caller, EVERY, "other")
    for name in ("other", "k"):
        caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key=name, reason="lost"))
    assert rotated(caller, key).state == kpb.KEY_STATE_ACTIVE
    assert key_of(caller, "k@1").state == kpb.KEY_STATE_COMPROMISED
    assert key_of(caller, "other").id == other.id
    assert [rotation.reason for rotation in log(caller)] == ["policy: compromised"]


def test_a_policy_that_is_paused_rests_and_what_became_due_is_made_up_once(server: RunningServer) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    set_policy(caller, policy(every_days=90, paused=True))
    assert not key_of(caller).HasField("next_rotation_at")
    pass_days(server, caller, 500)
    a_round_passed(server)
    assert key_of(caller).id == key.id
    set_policy(caller, EVERY)
    rotated(caller, key)
    a_round_passed(server)
    assert len(log(caller)) == 1


def test_a_rotation_on_demand_moves_the_schedule_on(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    set_policy(caller, EVERY)
    pass_days(server, caller, 80)
    rotate(caller)
    after = key_of(caller)
    assert after.next_rotation_at.ToDatetime() == after.created_at.ToDatetime() + timedelta(days=90)


def test_a_key_that_its_owner_deactivated_is_left_alone(server: RunningServer) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    set_policy(caller, EVERY)
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    pass_days(server, caller, 91)
    a_round_passed(server)
    assert key_of(caller).id == key.id
    caller.keys.ReactivateKey(kpb.ReactivateKeyRequest(key="k"))
    rotated(caller, key)


def test_a_rotation_that_fails_is_asked_for_again_after_a_while_and_not_every_round(server: RunningServer) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    set_policy(caller, EVERY)
    with replaced(server, "switch_key", "RETURN 'FINE';"):
        pass_days(server, caller, 91)
        soon(lambda: [each.status for each in log(caller)] == [rpb.ROTATION_STATUS_FAILED])
    waits = "SELECT extract(epoch FROM look_at - now()), requests FROM cryptography.rotation_policies WHERE user_id = %s"
    [(seconds, requests)] = run(server, waits, caller.user_id)
    assert (100 < seconds <= 300, requests) == (True, 1)
    a_round_passed(server)
    assert len(log(caller)) == 1
    look(server, caller)
    rotated(caller, key)
    assert run(server, "SELECT requests FROM cryptography.rotation_policies WHERE user_id = %s", caller.user_id) == [(0,)]


def test_a_policy_that_is_paused_has_no_rotation_done_that_it_asked_for(server: RunningServer) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    set_policy(caller, EVERY)
    with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
        pass_days(server, caller, 91)
        soon(lambda: [each.error_message for each in log(caller)] not in ([], [""]))
        set_policy(caller, policy(every_days=90, paused=True))
        soon(lambda: log(caller)[0].status == rpb.ROTATION_STATUS_FAILED)
    assert log(caller)[0].error_message.startswith("PERMISSION_DENIED")
    assert retry(caller, log(caller)[0]).status == rpb.ROTATION_STATUS_FAILED
    assert key_of(caller).id == key.id
    set_policy(caller, EVERY)
    rotated(caller, key)


@pytest.mark.parametrize("wanted", [policy(every_days=90, paused=True), None], ids=["paused", "cleared"])
def test_a_change_of_a_policy_that_is_answered_before_the_switch_is_kept(
    server: RunningServer, wanted: kpb.RotationPolicy | None
) -> None:
    """The worker has proven the policy and has made the successor. The change and the switch wait for the key, in this order."""
    caller = server.caller()
    key = made(caller, "ed25519")
    set_policy(caller, EVERY)
    with psycopg.connect(server.deployment.database.admin_dsn) as holder, ThreadPoolExecutor() as threads:
        with replaced(server, "switch_key", "RAISE EXCEPTION 'no';"):
            pass_days(server, caller, 91)
            soon(lambda: [each.error_message for each in log(caller)] not in ([], [""]))
            holder.execute("SELECT FROM cryptography.keys WHERE id = %s FOR UPDATE", (key.id,))
            changing = threads.submit(set_policy, caller, wanted)
            soon(lambda: waits(server, "rotation_policy("))
        run(server, "UPDATE cryptography.key_rotations SET next_attempt_at = now() WHERE migration_status = 'pending'")
        soon(lambda: waits(server, "switch_key("))
        holder.commit()
        changing.result()
    soon(lambda: log(caller)[0].status == rpb.ROTATION_STATUS_FAILED)
    assert log(caller)[0].error_message.startswith("PERMISSION_DENIED")
    assert key_of(caller).id == key.id


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (policy(), "policy"),
        (kpb.RotationPolicy(every=Duration(seconds=DAY - 1)), "every"),
        (kpb.RotationPolicy(every=Duration(seconds=DAY, nanos=1)), "every"),
        (policy(before_days=7), "before_expiry"),
        (policy(at_usage_percent=80), "at_usage_percent"),
        (policy(at_usage_percent=100), "at_usage_percent"),
    ],
)
def test_a_policy_that_makes_no_sense_is_malformed_in_a_field(caller: Caller, wanted: kpb.RotationPolicy, field: str) -> None:
    made(caller, "ed25519")
    found = refusal(caller.rotation.SetRotationPolicy, rpb.SetRotationPolicyRequest(key="k", policy=wanted))
    assert (found.reason, found.metadata["field"]) == ("MALFORMED", field)
    assert not key_of(caller).HasField("rotation_policy")


def test_a_policy_is_set_by_its_version_and_cleared(server: RunningServer) -> None:
    caller, other = server.caller(), server.caller()
    made(caller, "ed25519")
    assert set_policy(caller, EVERY).policy.version == 1
    assert set_policy(caller, policy(every_days=30, version=1)).policy.version == 2
    request = rpb.SetRotationPolicyRequest(key="k", policy=policy(every_days=10, version=1))
    assert refusal(caller.rotation.SetRotationPolicy, request).reason == "STALE"
    assert key_of(caller).rotation_policy == policy(every_days=30, version=2)
    assert refusal(other.rotation.SetRotationPolicy, request).reason == "KEY_NOT_FOUND"
    assert set_policy(caller, None) == rpb.SetRotationPolicyResponse()
    assert not key_of(caller).HasField("rotation_policy")
    assert set_policy(caller, None) == rpb.SetRotationPolicyResponse(), "once more"
    rotate(caller)
    late = rpb.SetRotationPolicyRequest(key="k@1", policy=EVERY)
    assert refusal(caller.rotation.SetRotationPolicy, late).reason == "KEY_INACTIVE"
