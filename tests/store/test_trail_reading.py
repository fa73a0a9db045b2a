"""Where a reading of the trail is recorded it is decided too: whatever the caller was believed to be."""

import pytest

from kms.app.ports import Call, User
from kms.domain.errors import KmsError
from kms.domain.permissions import Permission
from kms.domain.trail import EventFilter
from kms.store.pool import Pool
from kms.store.trail import StoredTrail
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database
from tests.store.uses import rows

RECORDED = "SELECT action, event_details FROM audit.security_events WHERE event_type = 'audit.read' ORDER BY created_at"
EVERYTHING = EventFilter()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM authentication.user_roles", "PERMISSION_DENIED"),
        ("UPDATE authentication.user_roles SET expires_at = now() - interval '1 second'", "PERMISSION_DENIED"),
        ("UPDATE authentication.users SET deleted_at = now()", "CREDENTIALS_INVALID"),
    ],
)
async def test_a_cached_auditor_who_is_none_any_more_reads_nothing_and_leaves_no_record(
    database: Database, store: Pool, change: str, reason: str
) -> None:
    user_id = await StoredUsers(store).create_service("inspector", "auditor")
    call = Call(User(user_id, "inspector", 1, frozenset({Permission.AUDIT_READ})), "r-1", "192.0.2.7")
    trail = StoredTrail(store)
    assert [event.event_type for event in (await trail.search(call, EVERYTHING, before=None, limit=9)).events] == [
        "role.assigned"
    ]
    await trail.begin(call, None)
    rows(database, change)
    for reading in (
        trail.search(call, EVERYTHING, before=None, limit=9),
        trail.begin(call, None),
        trail.record(call, "verify", {}),
    ):
        with pytest.raises(KmsError) as caught:
            await reading
        assert caught.value.reason == reason
    assert [row["action"] for row in rows(database, RECORDED)] == ["search", "tail"]


async def test_a_reading_by_a_peer_without_an_address_is_recorded_without_one(database: Database, store: Pool) -> None:
    user_id = await StoredUsers(store).create_service("inspector", "auditor")
    call = Call(User(user_id, "inspector", 1, frozenset({Permission.AUDIT_READ})), "r-1", "")
    await StoredTrail(store).record(call, "verify", {})
    query = "SELECT source_ip FROM audit.security_events WHERE event_type = 'audit.read'"
    assert [row["source_ip"] for row in rows(database, query)] == [None]
