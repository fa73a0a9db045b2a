"""What depends on a key is taken along by its rotation, kind by kind."""

from collections.abc import Sequence
from typing import Any

import psycopg

from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.requests import made
from tests.conformance.test_rotation import key_of, rotate
from tests.conformance.test_rotation_retries import grant, replaced, retry
from tests.fixtures.server import Caller, RunningServer

ADDRESS = """
    INSERT INTO blockchain.addresses (user_id, network_id, address, key_id)
    SELECT %s, id, %s, %s FROM blockchain.networks WHERE name = 'neo-n3'
"""


def rows(server: RunningServer, query: str, *parameters: object) -> Sequence[tuple[Any, ...]]:
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def with_dependents(server: RunningServer) -> tuple[Caller, kpb.Key]:
    """Return the owner of a key k with a grant, two children and an address, and the key."""
    owner, grantee = server.caller(), server.caller()
    key = made(owner, "ed25519")
    grant(server, key, owner, grantee)
    children = [made(owner, "ed25519", name=name).id for name in ("child-1", "child-2")]
    server.deployment.edit_keys("UPDATE cryptography.keys SET parent_key_id = %s WHERE id = ANY (%s::uuid[])", key.id, children)
    rows(server, ADDRESS, owner.user_id, key.id.replace("-", ""), key.id)
    return owner, key


def parents(server: RunningServer, owner: Caller) -> set[str]:
    query = "SELECT parent_key_id::text FROM cryptography.keys WHERE user_id = %s AND key_name LIKE 'child-%%'"
    return {parent for (parent,) in rows(server, query, owner.user_id)}


def marked(server: RunningServer, key: kpb.Key) -> bool:
    [(is_marked,)] = rows(server, "SELECT superseded_at IS NOT NULL FROM blockchain.addresses WHERE key_id = %s", key.id)
    return bool(is_marked)


def test_all_kinds_are_taken_along_and_counted(server: RunningServer) -> None:
    owner, key = with_dependents(server)
    rotation = rotate(owner)
    assert (rotation.status, rotation.affected_records_count) == (rpb.ROTATION_STATUS_COMPLETED, 4)
    assert parents(server, owner) == {rotation.new_key_id}
    assert owner.crypto.Sign(cpb.SignRequest(key="child-1", message=b"m")).key_id == key_of(owner, "child-1").id
    assert marked(server, key), "the address stays, and is marked"
    events = server.auditor().audit.SearchEvents(apb.SearchEventsRequest(resource_id=rotation.new_key_id)).events
    granted = [event for event in events if event.event_type == "key.granted"]
    assert [event.action for event in granted] == ["copy_grants"]
    assert granted[0].user_id == str(owner.user_id)


def test_if_one_kind_fails_the_others_are_completed_and_a_retry_finishes_the_rest(server: RunningServer) -> None:
    owner, key = with_dependents(server)
    with replaced(server, "copy_grants", "RAISE EXCEPTION 'no';"):
        rotation = rotate(owner)
        assert rotation.status == rpb.ROTATION_STATUS_PENDING
        assert "not taken along are: grants (STORE_UNAVAILABLE" in rotation.error_message
        assert parents(server, owner) == {rotation.new_key_id}
        assert marked(server, key)
        again = retry(owner, rotation)
        assert again.error_message == rotation.error_message
    again = retry(owner, rotation)
    assert (again.status, again.affected_records_count) == (rpb.ROTATION_STATUS_COMPLETED, 4)


def test_a_child_whose_record_is_invalid_holds_up_no_other(server: RunningServer) -> None:
    owner, _ = with_dependents(server)
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        edit = "UPDATE cryptography.keys SET max_usage_count = 9 WHERE user_id = %s AND key_name = %s"
        connection.execute(edit, (owner.user_id, "child-1"))
    rotation = rotate(owner)
    assert rotation.status == rpb.ROTATION_STATUS_FAILED
    assert rotation.error_message.startswith("RECORD_INVALID")
    assert "child keys (RECORD_INVALID" in rotation.error_message
    assert len(parents(server, owner)) == 2, "one is with the successor, one with the predecessor"
    assert owner.crypto.Sign(cpb.SignRequest(key="k", message=b"m")).key_id == rotation.new_key_id
