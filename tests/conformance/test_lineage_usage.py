"""GetLineageUsage: who still uses the predecessors of a key, told from the trail, for the owner of the key."""

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.conformance.test_rotation import key_of, rotate
from tests.fixtures.server import Caller, RunningServer


def encrypted(caller: Caller, key: str = "k") -> bytes:
    return bytes(caller.crypto.Encrypt(cpb.EncryptRequest(key=key, plaintext=b"secret")).ciphertext)


def decrypt(caller: Caller, ciphertext: bytes, times: int = 1) -> None:
    for _ in range(times):
        caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext))


def usage(caller: Caller, key: str = "k", **fields: Any) -> rpb.GetLineageUsageResponse:  # noqa: ANN401
    return caller.rotation.GetLineageUsage(rpb.GetLineageUsageRequest(key=key, **fields))


def counts(answer: rpb.GetLineageUsageResponse) -> dict[str, dict[str, int]]:
    return {each.name: {use.action: use.count for use in each.uses} for each in answer.predecessors}


def decryptions(found: rpb.PredecessorUsage) -> list[int]:
    return [use.count for use in found.uses if use.action == "decrypt"]


def edit(server: RunningServer, query: str, *parameters: object) -> None:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(query.encode(), parameters)


def test_each_predecessor_is_shown_with_its_uses_since_it_has_a_successor(caller: Caller) -> None:
    first = made(caller, "aes")
    old = encrypted(caller)
    decrypt(caller, old, 5)  # it has no successor yet
    rotation = rotate(caller)
    newer = encrypted(caller)
    rotate(caller)
    decrypt(caller, old, 3)
    caller.crypto.ReEncrypt(cpb.ReEncryptRequest(ciphertext=old))
    decrypt(caller, newer)
    decrypt(caller, encrypted(caller), 2)
    refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="k@1", plaintext=b"p"))
    answer = usage(caller)
    assert counts(answer) == {"k@1": {"decrypt": 3, "decrypt.reencrypt": 1}, "k@2": {"decrypt": 1}}
    assert [each.key_id for each in answer.predecessors] == [first.id, rotation.new_key_id]
    for each in answer.predecessors:
        assert each.superseded_at == key_of(caller, each.name).superseded_at == each.counted_since
        assert {(use.user_id, use.last_peer) for use in each.uses} == {(str(caller.user_id), "127.0.0.1")}
        assert all(each.superseded_at.ToDatetime() < use.last_used_at.ToDatetime() for use in each.uses)
    for ref in ("k@1", "k@2", first.id):
        assert usage(caller, ref) == answer


def test_the_window_is_the_callers_or_thirty_days(caller: Caller, server: RunningServer) -> None:
    made(caller, "aes")
    old = encrypted(caller)
    rotate(caller)
    decrypt(caller, old, 2)
    key_id = key_of(caller, "k@1").id
    superseded = (
        "UPDATE cryptography.keys SET superseded_at = now() - interval '90 days', created_at = now() - interval '99 days'"
    )
    server.deployment.edit_keys(f"{superseded} WHERE id = %s", key_id)
    moved = "UPDATE audit.security_events SET created_at = created_at - interval '31 days' WHERE id IN ({})"
    one = "SELECT id FROM audit.security_events WHERE resource_id = %s AND action = 'decrypt' LIMIT 1"
    edit(server, moved.format(one), key_id)
    [month] = usage(caller).predecessors
    assert decryptions(month) == [1]
    ago = datetime.now(UTC) - month.counted_since.ToDatetime(UTC)
    assert timedelta(days=30) <= ago < timedelta(days=30, hours=1)
    since = datetime.now(UTC) - timedelta(days=40)
    [longer] = usage(caller, since=since).predecessors
    assert (decryptions(longer), longer.counted_since.ToDatetime(UTC)) == ([2], since)
    [all_of_it] = usage(caller, since=datetime(2000, 1, 1, tzinfo=UTC)).predecessors
    assert all_of_it.counted_since == all_of_it.superseded_at
    assert [use.count for use in usage(caller, since=datetime(2100, 1, 1, tzinfo=UTC)).predecessors[0].uses] == []


def test_pages_go_through_all_predecessors_of_one_lineage(caller: Caller) -> None:
    made(caller, "ed25519")
    made(caller, "ed25519", name="other")
    for _ in range(3):
        rotate(caller)
    rotate(caller, key="other")
    request, names = rpb.GetLineageUsageRequest(key="k", page_size=1), list[str]()
    while True:
        page = caller.rotation.GetLineageUsage(request)
        names += [each.name for each in page.predecessors]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert names == ["k@1", "k@2", "k@3"]
    for fields in ({"key": "other"}, {"since": datetime(2026, 1, 1, tzinfo=UTC)}):
        other: dict[str, Any] = {"key": "k", "page_token": request.page_token, **fields}
        found = refusal(caller.rotation.GetLineageUsage, rpb.GetLineageUsageRequest(**other))
        assert (found.reason, found.metadata) == ("MALFORMED", {"field": "page_token"})


def test_a_key_without_a_predecessor_has_nothing_to_show_and_anothers_is_not_there(server: RunningServer) -> None:
    caller, other, auditor = server.caller(), server.caller(), server.auditor()
    key = made(caller, "aes")
    assert usage(caller) == rpb.GetLineageUsageResponse()
    rotate(caller)
    for ref in ("k", "k@1", key.id):
        assert refusal(other.rotation.GetLineageUsage, rpb.GetLineageUsageRequest(key=ref)).reason == "KEY_NOT_FOUND"
    assert refusal(auditor.rotation.GetLineageUsage, rpb.GetLineageUsageRequest(key=key.id)).reason == "PERMISSION_DENIED"


def test_a_predecessor_whose_record_was_edited_is_named(caller: Caller, server: RunningServer) -> None:
    key = made(caller, "aes")
    rotate(caller)
    edit(server, "UPDATE cryptography.keys SET superseded_at = now() WHERE id = %s", key.id)
    answer = usage(caller)
    assert (list(answer.predecessors), list(answer.invalid_key_ids)) == ([], [key.id])
