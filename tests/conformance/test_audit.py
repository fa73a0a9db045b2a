"""AuditService: what auditors find, that nobody else does, and that their reading is in the trail too."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from kms.domain.ids import UserId
from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer

SIGN = cpb.SignRequest(key="k", message=b"m")


def search(auditor: Caller, **fields: Any) -> list[apb.Event]:  # noqa: ANN401
    """All pages of a search."""
    return [event for page in pages(auditor, **fields) for event in page.events]


def pages(auditor: Caller, **fields: Any) -> Iterator[apb.SearchEventsResponse]:  # noqa: ANN401
    token = ""
    while True:
        page = auditor.audit.SearchEvents(apb.SearchEventsRequest(page_token=token, **fields), timeout=15)
        yield page
        token = page.next_page_token
        if not token:
            return


def tail(auditor: Caller, cursor: str = "") -> Any:  # noqa: ANN401 - iterator and call, which the stubs' types do not know
    return auditor.audit.TailEvents(apb.TailEventsRequest(cursor=cursor), timeout=15)


def details(event: apb.Event) -> dict[str, Any]:
    found = json.loads(event.details_json)
    assert isinstance(found, dict)
    return found


def stamp(moment: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(moment)
    return found


def execute(deployment: Deployment, query: str, *parameters: object) -> None:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(query.encode(), parameters)


def take_role(deployment: Deployment, user: UserId) -> None:
    """What a command that takes a role will do."""
    execute(deployment, "DELETE FROM authentication.user_roles WHERE user_id = %s", user)
    execute(deployment, "UPDATE authentication.users SET version = version + 1 WHERE id = %s", user)


def test_trying_to_use_a_key_that_waits_for_its_destruction_is_grave(caller: Caller, auditor: Caller) -> None:
    key = made(caller, "ed25519")
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_INACTIVE"
    caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k"))
    assert refusal(caller.crypto.Sign, SIGN).reason == "KEY_PENDING_DESTRUCTION"
    deadline, found = time.monotonic() + 10, list[apb.Event]()
    while len(found) < 2 and time.monotonic() < deadline:
        found = search(auditor, resource_id=key.id, event_type="request.refused")
    told = {details(event)["reason"]: (event.severity, event.risk_score) for event in found}
    assert told == {"KEY_INACTIVE": (apb.SEVERITY_LOW, 10), "KEY_PENDING_DESTRUCTION": (apb.SEVERITY_HIGH, 60)}


def test_each_filter_gives_the_events_that_fit_and_no_others(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    key, other = made(caller, "ed25519"), made(caller, "aes", name="other")
    caller.crypto.Sign(SIGN, metadata=(("x-request-id", "order-1"),))
    caller.crypto.Encrypt(cpb.EncryptRequest(key="other", plaintext=b"p"))
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="test"))
    refusal(caller.crypto.Sign, SIGN)
    wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused")
    everything = search(auditor, user_id=str(caller.user_id))
    assert {event.user_id for event in everything} == {str(caller.user_id)}
    moments = [event.created_at.ToNanoseconds() for event in everything]
    assert moments == sorted(moments, reverse=True)
    middle = everything[len(everything) // 2].created_at
    expected: list[tuple[dict[str, Any], Any]] = [
        ({"resource_id": key.id}, lambda e: e.resource_id == key.id),
        ({"resource_id": other.id}, lambda e: e.resource_id == other.id),
        ({"event_type": "key.used"}, lambda e: e.event_type == "key.used"),
        ({"action": "encrypt"}, lambda e: e.action == "encrypt"),
        ({"outcome": apb.OUTCOME_BLOCKED}, lambda e: e.outcome == apb.OUTCOME_BLOCKED),
        ({"severity_min": apb.SEVERITY_HIGH}, lambda e: e.severity >= apb.SEVERITY_HIGH),
        ({"request_id": "order-1"}, lambda e: details(e).get("request_id") == "order-1"),
        ({"since": middle}, lambda e: e.created_at.ToNanoseconds() >= middle.ToNanoseconds()),
        ({"until": middle}, lambda e: e.created_at.ToNanoseconds() < middle.ToNanoseconds()),
        ({"event_type": "key.used", "severity_min": apb.SEVERITY_CRITICAL}, lambda _: False),
    ]
    for which, fits in expected:
        wanted = [event for event in everything if fits(event)]
        assert search(auditor, user_id=str(caller.user_id), **which) == wanted, which
        assert len(wanted) < len(everything), which
        assert wanted or "critical" in str(which).lower() or which["event_type"], which
    assert search(auditor, resource_id=key.id) == [event for event in everything if event.resource_id == key.id]


def wait_for(auditor: Caller, **fields: Any) -> apb.Event:  # noqa: ANN401
    """Refusals are recorded without waiting for them."""
    for _ in range(100):
        if found := search(auditor, **fields):
            return found[0]
        threading.Event().wait(0.05)
    raise AssertionError(f"no event: {fields}")


def test_a_search_without_a_user_merges_the_severities_by_time(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    began = datetime.now(UTC) - timedelta(seconds=60)
    made(caller, "ed25519")
    caller.crypto.Sign(SIGN)
    caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="test"))
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="test"))
    mine = [event for event in search(auditor, since=stamp(began)) if event.user_id == str(caller.user_id)]
    assert [event.event_type for event in mine] == ["key.revoked", "key.compromised", "key.used", "key.created"]
    assert {event.severity for event in mine} == {apb.SEVERITY_HIGH, apb.SEVERITY_CRITICAL, apb.SEVERITY_LOW}
    grave = [event for event in search(auditor, severity_min=apb.SEVERITY_HIGH) if event.user_id == str(caller.user_id)]
    assert grave == mine[:2]


def test_pages_have_no_gap_and_no_repeat_while_events_are_written(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    for _ in range(25):
        caller.crypto.Sign(SIGN)
    before = search(auditor, user_id=str(caller.user_id))
    seen: list[apb.Event] = []
    for page in pages(auditor, user_id=str(caller.user_id), page_size=4):
        assert 0 < len(page.events) <= 4
        seen += page.events
        caller.crypto.Sign(SIGN)
    assert seen == before


def test_a_call_of_a_search_looks_at_a_bounded_number_of_events(server: RunningServer, auditor: Caller) -> None:
    user = server.deployment.new_user()
    execute(
        server.deployment,
        """
        INSERT INTO audit.security_events (event_type, severity, user_id, action, created_at)
        SELECT CASE n WHEN 10050 THEN 'rare' ELSE 'common' END, 'low', %s, n, '2025-03-01'::timestamptz - n * interval '1 second'
        FROM generate_series(1, 10060) AS n
        """,
        user,
    )
    found = list(pages(auditor, user_id=str(user), event_type="rare"))
    assert [[event.action for event in page.events] for page in found] == [[], ["10050"]]
    until = stamp(datetime(2025, 2, 28, 22, 0, tzinfo=UTC))
    assert [
        event.action for event in search(auditor, event_type="rare", until=until, since=stamp(datetime(2025, 2, 1, tzinfo=UTC)))
    ]


def test_a_user_who_is_no_auditor_is_refused_and_told_the_permission(
    server: RunningServer, caller: Caller, auditor: Caller
) -> None:
    found = refusal(caller.audit.SearchEvents, apb.SearchEventsRequest())
    assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert found.metadata == {"permission": "audit:read"}
    with pytest.raises(grpc.RpcError) as caught:
        next(tail(caller))
    assert refusal_of(caught.value) == refusal(caller.audit.SearchEvents, apb.SearchEventsRequest())
    event = wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused")
    assert (event.action, event.severity, event.outcome) == ("SearchEvents", apb.SEVERITY_HIGH, apb.OUTCOME_BLOCKED) or (
        event.action == "TailEvents"
    )


def test_an_auditor_reads_the_trail_and_nothing_else(server: RunningServer, auditor: Caller) -> None:
    calls: list[tuple[Any, Any]] = [
        (auditor.keys.CreateKey, create("aes")),
        (auditor.keys.ListKeys, kpb.ListKeysRequest()),
        (auditor.crypto.Sign, SIGN),
        (auditor.crypto.GenerateRandom, cpb.GenerateRandomRequest(size_bytes=16)),
    ]
    for call, request in calls:
        found = refusal(call, request)
        assert (found.code, found.metadata) == (grpc.StatusCode.PERMISSION_DENIED, {"permission": "audit:read"})
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        query = "SELECT count(*) FROM cryptography.keys WHERE user_id = %s"
        assert connection.execute(query, (auditor.user_id,)).fetchone() == (0,)


def test_every_reading_of_the_trail_is_itself_in_the_trail(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    search(auditor, resource_id=key.id, action="created", request_id="r-1")
    stream = tail(auditor)
    began = next(stream)
    stream.cancel()
    tailed, searched = search(auditor, user_id=str(auditor.user_id), event_type="audit.read")
    assert details(tailed)["from"] == "now"
    stream = tail(auditor, began.cursor)
    next(stream)
    stream.cancel()
    resumed = search(auditor, user_id=str(auditor.user_id), event_type="audit.read")[0]
    assert details(resumed)["from"] == "cursor"
    assert details(resumed)["after_order"] == details(tailed)["after_order"]
    assert details(resumed)["after_id"] == details(tailed)["after_id"]
    assert (tailed.action, searched.action) == ("tail", "search")
    asked = details(searched)
    assert (asked["resource"], asked["action"], asked["searched_request_id"], asked["events"]) == (key.id, "created", "r-1", 0)
    assert asked["request_id"]
    assert searched.peer == "127.0.0.1"
    assert len(search(auditor, user_id=str(auditor.user_id), event_type="audit.read")) == 5


def test_what_is_refused_of_a_key_is_found_by_the_key(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    key, other = made(caller, "secp256k1"), made(caller, "secp256k1", name="other")
    repeated = cpb.SignRequest(key="k", message=b"m", request_id="once")
    caller.crypto.Sign(repeated)
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="lost"))
    for call, request in (
        (caller.crypto.Sign, SIGN),
        (caller.crypto.Sign, repeated),
        (caller.keys.DeactivateKey, kpb.DeactivateKeyRequest(key="k")),
        (caller.crypto.Encrypt, cpb.EncryptRequest(key="other", plaintext=b"p")),
        (caller.crypto.Sign, cpb.SignRequest(key="absent", message=b"m")),
        (server.caller().crypto.Sign, cpb.SignRequest(key=key.id, message=b"m")),
    ):
        assert refusal(call, request).metadata.get("key_id") is None
    items = [cpb.SignRequest(key=name, message=b"m") for name in ("other", "k", "absent")]
    caller.crypto.BatchSign(cpb.BatchSignRequest(items=items))
    wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused", action="BatchSign")
    found = [
        (event.action, details(event)["reason"], event.resource_id)
        for event in search(auditor, user_id=str(caller.user_id), event_type="request.refused")
    ]
    assert sorted(found) == [
        ("BatchSign", "KEY_NOT_FOUND", ""),
        ("BatchSign", "KEY_REVOKED", key.id),
        ("DeactivateKey", "KEY_REVOKED", key.id),
        ("Encrypt", "WRONG_PURPOSE", other.id),
        ("Sign", "KEY_NOT_FOUND", ""),
        ("Sign", "KEY_REVOKED", key.id),
        ("Sign", "KEY_REVOKED", key.id),
    ]
    of_the_key = search(auditor, resource_id=key.id, event_type="request.refused")
    assert {event.user_id for event in of_the_key} == {str(caller.user_id)}  # nobody else's call has found it
    assert len(of_the_key) == 4


def test_a_call_that_ends_with_a_bug_is_in_the_trail(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    key = made(caller, "ed25519")
    # The driver of public keys has never seen such a thing, since no record of ours has it.
    damage = "UPDATE cryptography.keys SET public_key = overlay(public_key placing '=' from 30 for 1) WHERE id = %s"
    server.deployment.edit_keys(damage, key.id)
    assert refusal(caller.keys.GetPublicKey, kpb.GetPublicKeyRequest(key="k")).reason == "INTERNAL"
    event = wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused")
    assert (event.action, event.outcome, event.severity) == ("GetPublicKey", apb.OUTCOME_FAILURE, apb.SEVERITY_HIGH)
    assert (details(event)["reason"], event.resource_id) == ("INTERNAL", key.id)


def test_no_plaintext_and_no_envelope_is_in_an_event(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    key = made(caller, "aes")
    secret = b"launch code 4711"
    sealed = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=secret, aad=b"associated data")).ciphertext
    caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed, aad=b"associated data"))
    refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=sealed, aad=secret))
    wait_for(auditor, user_id=str(caller.user_id), event_type="request.refused")
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        row = connection.execute("SELECT encrypted_private_key FROM cryptography.keys WHERE id = %s", (key.id,)).fetchone()
    assert row is not None
    events = search(auditor, user_id=str(caller.user_id))
    assert {event.event_type for event in events} == {"key.created", "key.used", "request.refused"}
    for event in events:
        text = event.SerializeToString()
        for hidden in (secret, secret.hex().encode(), b"associated data", row[0].encode()[:40]):
            assert hidden not in text


def test_a_search_after_the_role_was_taken_away_is_refused_whatever_is_cached(server: RunningServer) -> None:
    auditor = server.auditor()
    search(auditor, user_id=str(auditor.user_id))
    take_role(server.deployment, auditor.user_id)
    found = refusal(auditor.audit.SearchEvents, apb.SearchEventsRequest())
    assert (found.reason, found.metadata) == ("PERMISSION_DENIED", {"permission": "audit:read"})


@pytest.mark.parametrize(
    "token", ["W10=", "eyI6", "WyJ4IiwgMSwgMl0=", "W1sxXSwgIjIwMjUiLCAiMDAwMCJd", "bnVsbA==", "not base64", "A" * 5000]
)
def test_a_token_that_no_page_gave_is_malformed(auditor: Caller, token: str) -> None:
    found = refusal(auditor.audit.SearchEvents, apb.SearchEventsRequest(page_token=token))
    assert (found.reason, found.metadata) == ("MALFORMED", {"field": "page_token"})
    with pytest.raises(grpc.RpcError) as caught:
        next(tail(auditor, token))
    assert refusal_of(caught.value).metadata == {"field": "cursor"}


def test_a_token_belongs_to_its_filter_and_a_range_ends_behind_its_beginning(server: RunningServer, auditor: Caller) -> None:
    caller = server.caller()
    made(caller, "ed25519")
    caller.crypto.Sign(SIGN)
    token = auditor.audit.SearchEvents(apb.SearchEventsRequest(user_id=str(caller.user_id), page_size=1)).next_page_token
    assert token
    found = refusal(auditor.audit.SearchEvents, apb.SearchEventsRequest(page_token=token))
    assert found.metadata == {"field": "page_token"}
    now = stamp(datetime.now(UTC))
    assert refusal(auditor.audit.SearchEvents, apb.SearchEventsRequest(since=now, until=now)).metadata == {"field": "until"}
    assert refusal(auditor.audit.SearchEvents, apb.SearchEventsRequest(page_size=1001)).metadata == {"field": "page_size"}


def write(connection: psycopg.Connection[Any], user: UserId, name: str) -> None:
    query = "INSERT INTO audit.security_events (event_type, severity, user_id, action) VALUES ('test', 'low', %s, %s)"
    connection.execute(query, (user, name))


def named(stream: Any, user: UserId, last: str) -> tuple[list[str], str]:  # noqa: ANN401
    """The actions of a user's events up to *last*, and the cursor behind them."""
    found: list[str] = []
    for answer in stream:
        found += [event.action for event in answer.events if event.user_id == str(user)]
        if last in found:
            return found, str(answer.cursor)
    raise AssertionError(found)


def test_a_tail_gives_every_event_once_though_a_transaction_commits_late(server: RunningServer, auditor: Caller) -> None:
    user, dsn = server.deployment.new_user(), server.deployment.database.admin_dsn
    stream = tail(auditor)
    first = next(stream)
    assert not first.events
    with psycopg.connect(dsn, autocommit=True) as quick, psycopg.connect(dsn) as late:
        write(late, user, "late-1")  # takes its place in the order before all that follow
        for number in range(20):
            write(quick, user, f"quick-{number}")
        threading.Event().wait(0.6)  # the stream has looked meanwhile
        write(late, user, "late-2")
        late.commit()
        write(quick, user, "last")
    found, cursor = named(stream, user, "last")
    assert sorted(found) == sorted(["late-1", "late-2", "last", *(f"quick-{number}" for number in range(20))])
    assert sorted(found[:2]) == ["late-1", "late-2"]
    stream.cancel()
    again = tail(auditor, first.cursor)
    assert named(again, user, "last")[0] == found
    again.cancel()
    with psycopg.connect(dsn, autocommit=True) as quick:
        write(quick, user, "next")
    beyond = tail(auditor, cursor)
    assert named(beyond, user, "next")[0] == ["next"]
    beyond.cancel()


def test_a_tail_gives_what_two_writers_write_at_once(server: RunningServer, auditor: Caller) -> None:
    user, dsn = server.deployment.new_user(), server.deployment.database.admin_dsn
    stream = tail(auditor)
    next(stream)

    def write_many(name: str) -> None:
        with psycopg.connect(dsn) as connection:
            for number in range(150):
                write(connection, user, f"{name}-{number}")
                if number % 7 == 0:
                    connection.commit()

    writers = [threading.Thread(target=write_many, args=(name,)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with psycopg.connect(dsn, autocommit=True) as connection:
        write(connection, user, "last")
    found, _ = named(stream, user, "last")
    stream.cancel()
    assert sorted(found) == sorted(["last", *(f"{name}-{number}" for name in ("a", "b") for number in range(150))])


def test_an_event_is_told_within_half_a_second(server: RunningServer, auditor: Caller) -> None:
    user = server.deployment.new_user()
    stream = tail(auditor)
    next(stream)
    best = 99.0
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        for number in range(5):
            began = time.monotonic()
            write(connection, user, str(number))
            named(stream, user, str(number))
            best = min(best, time.monotonic() - began)
    stream.cancel()
    assert best < 0.5


@pytest.mark.parametrize("how", ["role", "standing"])
def test_a_tail_ends_when_its_caller_may_no_longer_have_it(server: RunningServer, how: str) -> None:
    auditor = server.auditor()
    stream = tail(auditor)
    next(stream)
    began = time.monotonic()
    if how == "role":
        take_role(server.deployment, auditor.user_id)
    else:
        execute(server.deployment, "UPDATE authentication.users SET deleted_at = now() WHERE id = %s", auditor.user_id)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert refusal_of(caught.value).reason == ("PERMISSION_DENIED" if how == "role" else "CREDENTIALS_INVALID")
    assert time.monotonic() - began < 15


def test_streams_of_one_user_are_limited_and_those_that_were_left_make_room(server: RunningServer, auditor: Caller) -> None:
    streams = [tail(auditor) for _ in range(4)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        next(tail(auditor))
    assert refusal_of(caught.value).reason == "RATE_LIMITED"
    for stream in streams:
        stream.cancel()
    for _ in range(100):
        if is_open(auditor):
            return
        threading.Event().wait(0.05)
    raise AssertionError("the streams that were left still take room")


def is_open(auditor: Caller) -> bool:
    stream = tail(auditor)
    try:
        next(stream)
    except grpc.RpcError:
        return False
    stream.cancel()
    return True


def test_a_server_that_stops_ends_its_streams_and_does_not_wait_for_them(deployment: Deployment) -> None:
    with deployment.serving() as server:
        stream = tail(server.auditor())
        cursor = next(stream).cursor
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert [event for answer in stream for event in answer.events if event.event_type != "audit.read"] == []
        assert stream.code() == grpc.StatusCode.OK
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10
        assert cursor


def test_an_auditor_has_the_trail_verified_and_a_changed_row_is_found(deployment: Deployment) -> None:
    with deployment.serving() as server:
        auditor = server.auditor()
        made(server.caller(), "ed25519")
        report = apb.VerifyTrailResponse()
        for _ in range(200):
            with suppress(grpc.RpcError):  # before the first checkpoint there is no key
                report = auditor.audit.VerifyTrail(apb.VerifyTrailRequest(), timeout=15)
            if report.checkpoints >= 2:
                break
            threading.Event().wait(0.1)
        assert report.checkpoints >= 2, report
        assert not report.HasField("finding")
        assert report.verified_size > 0
        execute(deployment, "UPDATE audit.security_events SET action = 'signed' WHERE event_type = 'key.created'")
        changed = auditor.audit.VerifyTrail(apb.VerifyTrailRequest(), timeout=15)
        assert changed.finding.difference
        assert changed.finding.message
        assert search(auditor, event_type="audit.read", action="verify")
