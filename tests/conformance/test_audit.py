"""AuditService: what auditors find, that nobody else does, and that their reading is in the trail too."""

import json
import threading
from collections.abc import Iterator
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
    next(stream)
    stream.cancel()
    tailed, searched = search(auditor, user_id=str(auditor.user_id), event_type="audit.read")
    assert (tailed.action, searched.action) == ("tail", "search")
    asked = details(searched)
    assert (asked["resource"], asked["action"], asked["searched_request_id"], asked["events"]) == (key.id, "created", "r-1", 0)
    assert asked["request_id"]
    assert searched.peer == "127.0.0.1"
    assert len(search(auditor, user_id=str(auditor.user_id), event_type="audit.read")) == 3


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
