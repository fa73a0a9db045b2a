"""Moves of keys: the table in SQL, what each changes, the event and the line that each leaves."""

import asyncio
from collections.abc import MutableMapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
import structlog
from psycopg import errors, sql

from kms.app.moving import Destruction
from kms.app.ports import User
from kms.app.records import Records
from kms.domain.algorithms import KeyType
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import Custody, KeyRecord
from kms.domain.lifecycle import Change, Move, State, check_move
from kms.rotation import postgres as rotations
from kms.store import lifecycle as lifecycle_module
from kms.store.batches import CONFIGURE
from kms.store.keys import StoredKeys
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool
from tests.fakes.hsm import FakeHsm
from tests.fixtures.postgres import Database
from tests.store.acting import acting_for
from tests.store.records import RECORDS
from tests.store.uses import a_call, make_key, make_user, new_key, rows

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AHEAD = datetime(2999, 1, 1, tzinfo=UTC)
# How a key comes into each state, by moves and, where only time leads there, by its row's moments.
_INTO: dict[State, str] = {
    State.PRE_ACTIVE: "UPDATE cryptography.keys SET activated_at = '2999-01-01', key_status = 'inactive'",
    State.ACTIVE: "SELECT 1",
    State.INACTIVE: "UPDATE cryptography.keys SET deactivated_at = now(), key_status = 'inactive'",
    State.EXPIRED: "UPDATE cryptography.keys SET created_at = '2020-01-01', expires_at = '2021-01-01'",
    State.COMPROMISED: "UPDATE cryptography.keys SET key_status = 'compromised', compromised_at = now()",
    State.REVOKED: "UPDATE cryptography.keys SET key_status = 'revoked', revoked_at = now()",
    State.PENDING_DESTRUCTION: "UPDATE cryptography.keys SET destruction_scheduled_at = '2999-01-01'",
    State.DESTROYED: "UPDATE cryptography.keys SET destroyed_at = now(), encrypted_private_key = ''",
}
_LEADS_TO = {
    Move.ACTIVATE: State.ACTIVE,
    Move.DEACTIVATE: State.INACTIVE,
    Move.REACTIVATE: State.ACTIVE,
    Move.REVOKE: State.REVOKED,
    Move.COMPROMISE: State.COMPROMISED,
    Move.SCHEDULE_DESTRUCTION: State.PENDING_DESTRUCTION,
}


@pytest.fixture
def lifecycle(store: Pool) -> StoredLifecycle:
    return StoredLifecycle(store, RECORDS)


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


async def moved(lifecycle: StoredLifecycle, user: User, key: KeyRecord, move: Move, **change: Any) -> KeyRecord:  # noqa: ANN401
    return await lifecycle.move(a_call(user), key.identity.key_id, move, Change(**change), version=None)


async def refused(lifecycle: StoredLifecycle, user: User, key: KeyRecord, move: Move, **change: Any) -> KmsError:  # noqa: ANN401
    with pytest.raises(KmsError) as caught:
        await moved(lifecycle, user, key, move, **change)
    return caught.value


def events(database: Database, key: KeyRecord) -> list[tuple[int, str]]:
    query = "SELECT aggregate_version AS v, event_type AS e FROM audit.domain_events WHERE aggregate_id = %s ORDER BY 1"
    return [(row["v"], row["e"]) for row in rows(database, query, key.identity.key_id)]


def table_of_moves() -> dict[tuple[State, Move], str | None]:
    table: dict[tuple[State, Move], str | None] = {}
    for state, move in product(State, Move):
        try:
            check_move(state, move)
            table[state, move] = None
        except KmsError as error:
            table[state, move] = error.reason.value
    return table


def test_the_moves_in_sql_are_the_moves_in_python(database: Database) -> None:
    table = table_of_moves()
    query = """
        SELECT cryptography.move_refusal(state, move) AS refusal
        FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS pair (state, move, n) ORDER BY n
    """
    found = rows(database, query, [state for state, _ in table], [move for _, move in table])
    assert [row["refusal"] for row in found] == list(table.values())
    assert len(table) == len(State) * len(Move)


def test_an_unknown_move_is_open_to_no_state(database: Database) -> None:
    for state in State:
        assert rows(database, "SELECT cryptography.move_refusal(%s, 'delete') IS NULL AS open", state) == [{"open": False}]


@pytest.mark.parametrize("state", State)
async def test_every_move_from_a_state_does_what_the_table_says(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User, state: State
) -> None:
    table = table_of_moves()
    for move in Move:
        key = await make_key(store, alice)
        rows(database, f"{_INTO[state]} WHERE id = %s" if state is not State.ACTIVE else "SELECT %s::uuid", key.identity.key_id)
        before = await StoredKeys(store, RECORDS).find(alice.user_id, key.identity.key_id)
        assert before is not None
        assert before.state is state
        change: dict[str, Any] = {"metadata": {"a": "b"}} if move is Move.UPDATE else {"reason": "asked"}
        if table[state, move] is None:
            after = await moved(lifecycle, alice, key, move, **change)
            if move in _LEADS_TO:
                assert after.state is _LEADS_TO[move]
            assert after.version == before.version + 1
            assert events(database, key)[-1][0] == after.version
        else:
            assert (await refused(lifecycle, alice, key, move, **change)).reason == table[state, move]
            assert await StoredKeys(store, RECORDS).find(alice.user_id, key.identity.key_id) == before
            assert events(database, key)[-1][0] == before.version


async def test_each_move_is_an_event_and_a_line_of_the_trail(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    key = await make_key(store, alice)
    call = a_call(alice)
    moves = [
        Move.DEACTIVATE,
        Move.REACTIVATE,
        Move.DEACTIVATE,
        Move.SCHEDULE_DESTRUCTION,
        Move.CANCEL_DESTRUCTION,
        Move.COMPROMISE,
    ]
    for move in [*moves, Move.REVOKE]:
        await lifecycle.move(call, key.identity.key_id, move, Change(reason=f"because {move}"), version=None)
    names = [
        "created",
        "deactivated",
        "reactivated",
        "deactivated",
        "destruction_scheduled",
        "destruction_cancelled",
        "compromised",
    ]
    names.append("revoked")
    assert events(database, key) == [(version, f"key.{name}") for version, name in enumerate(names, start=1)]
    query = """
        SELECT event_type, user_id, host(source_ip) AS peer, outcome, severity, event_details ->> 'request_id' AS request_id,
            event_details ->> 'reason' AS reason, (event_details ->> 'key_version')::int AS version
        FROM audit.security_events WHERE resource_id = %s ORDER BY created_at
    """
    lines = rows(database, query, key.identity.key_id)
    assert [line["event_type"] for line in lines] == [f"key.{name}" for name in names]
    assert [line["version"] for line in lines] == list(range(1, 9))
    assert {(line["user_id"], line["peer"], line["outcome"]) for line in lines} == {(alice.user_id, "192.0.2.7", "success")}
    assert [line["reason"] for line in lines] == [None, *(f"because {move}" for move in [*moves, Move.REVOKE])]
    assert {line["request_id"] for line in lines[1:]} == {call.request_id}
    assert lines[0]["request_id"] is not None
    assert lines[6]["severity"] == "critical"
    initiators = rows(database, "SELECT DISTINCT initiated_by FROM audit.domain_events")
    assert initiators == [{"initiated_by": str(alice.user_id)}]
    assert "ZW52ZWxvcGU" not in str(rows(database, "SELECT event_data FROM audit.domain_events"))


async def test_a_direct_change_by_the_owner_is_an_event_too(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice)
    with acting_for(database.dsn, "authenticated_users", alice.user_id) as connection:
        connection.execute('UPDATE cryptography.keys SET metadata = \'{"a": "b"}\' WHERE id = %s', (key.identity.key_id,))
    assert events(database, key) == [(1, "key.created"), (2, "key.updated")]


async def test_a_charge_is_no_event(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice)
    rows(database, "UPDATE cryptography.keys SET usage_counter = usage_counter + 1, last_used_at = now()")
    assert events(database, key) == [(1, "key.created")]


async def test_of_two_concurrent_moves_one_wins_and_the_other_is_stale(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    for _ in range(10):
        key = await make_key(store, alice)
        tried = [
            lifecycle.move(a_call(alice), key.identity.key_id, move, Change(), version=1)
            for move in (Move.REVOKE, Move.COMPROMISE)
        ]
        outcomes = await asyncio.gather(*tried, return_exceptions=True)
        refusals = [outcome.reason for outcome in outcomes if isinstance(outcome, KmsError)]
        assert refusals == [Reason.STALE]
        assert [version for version, _ in events(database, key)] == [1, 2]


async def test_the_version_that_was_read_must_be_the_keys(store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    key = await make_key(store, alice)
    for version in (0, 2):
        with pytest.raises(KmsError) as caught:
            await lifecycle.move(a_call(alice), key.identity.key_id, Move.REVOKE, Change(), version=version)
        assert caught.value.reason is Reason.STALE
    assert (await lifecycle.move(a_call(alice), key.identity.key_id, Move.REVOKE, Change(), version=1)).version == 2


async def test_another_users_key_and_no_key_are_not_found(store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    key = await make_key(store, await make_user(store, "bob"))
    assert (await refused(lifecycle, alice, key, Move.REVOKE)).reason is Reason.KEY_NOT_FOUND
    with pytest.raises(KmsError) as caught:
        await lifecycle.move(a_call(alice), KeyId(uuid4()), Move.REVOKE, Change(), version=None)
    assert caught.value.reason is Reason.KEY_NOT_FOUND


@pytest.mark.parametrize("change", ["version = version + 1", "deleted_at = now()", "locked_until = 'tomorrow'"])
async def test_a_user_whose_standing_changed_moves_nothing(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User, change: str
) -> None:
    key = await make_key(store, alice)
    rows(database, f"UPDATE authentication.users SET {change}")
    assert (await refused(lifecycle, alice, key, Move.REVOKE)).reason is Reason.CREDENTIALS_INVALID
    assert events(database, key) == [(1, "key.created")]


async def test_a_superseded_key_stays_inactive(database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    key = await make_key(store, alice)
    rows(database, "UPDATE cryptography.keys SET superseded_at = now(), key_status = 'inactive', deactivated_at = now()")
    assert (await refused(lifecycle, alice, key, Move.REACTIVATE)).reason is Reason.KEY_INACTIVE


async def test_a_key_at_its_limit_stays_inactive(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    limited, aes = await make_key(store, alice, max_usage_count=5), await make_key(store, alice, KeyType.AES)
    rows(database, "UPDATE cryptography.keys SET usage_counter = 5, deactivated_at = now() WHERE max_usage_count = 5")
    rows(database, "UPDATE cryptography.keys SET usage_counter = 4294967296, deactivated_at = now() WHERE key_type = 'aes'")
    for key in (limited, aes):
        assert (await refused(lifecycle, alice, key, Move.REACTIVATE)).reason is Reason.USAGE_LIMIT_REACHED


async def test_cancelling_destruction_restores_the_state_before(store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    for first in ([Move.DEACTIVATE], [Move.REVOKE], [Move.COMPROMISE], [Move.COMPROMISE, Move.REVOKE]):
        key = await make_key(store, alice)
        for move in first:
            before = await moved(lifecycle, alice, key, move)
        scheduled = await moved(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION)
        assert scheduled.state is State.PENDING_DESTRUCTION
        assert (await moved(lifecycle, alice, key, Move.CANCEL_DESTRUCTION)).state is before.state


@pytest.mark.parametrize(("asked", "given"), [(None, 30), (7, 7), (90, 90)])
async def test_destruction_is_7_to_90_days_ahead(
    store: Pool, lifecycle: StoredLifecycle, alice: User, asked: int | None, given: int
) -> None:
    key = await make_key(store, alice)
    before = await moved(lifecycle, alice, key, Move.DEACTIVATE)
    after = await moved(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION, pending_days=asked)
    assert before.deactivated_at is not None
    assert after.destruction_scheduled_at is not None
    ahead = after.destruction_scheduled_at - before.deactivated_at
    assert timedelta(days=given) <= ahead < timedelta(days=given, minutes=1)


@pytest.mark.parametrize("days", [-1, 0, 6, 91, 2**40])
async def test_destruction_sooner_or_later_is_refused(store: Pool, lifecycle: StoredLifecycle, alice: User, days: int) -> None:
    key = await make_key(store, alice)
    await moved(lifecycle, alice, key, Move.DEACTIVATE)
    error = await refused(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION, pending_days=days)
    assert (error.reason, error.metadata) == (Reason.MALFORMED, {"field": "pending_days"})


async def test_a_compromise_has_its_time_of_occurrence(store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    told = await moved(lifecycle, alice, await make_key(store, alice), Move.COMPROMISE, occurred_at=NOW)
    assert told.compromise_occurred_at == NOW
    untold = await moved(lifecycle, alice, await make_key(store, alice), Move.COMPROMISE)
    assert untold.compromise_occurred_at == untold.compromised_at is not None
    error = await refused(lifecycle, alice, await make_key(store, alice), Move.COMPROMISE, occurred_at=AHEAD)
    assert error.metadata == {"field": "occurred_at"}


async def test_an_update_lowers_limits_and_brings_expiries_forward(store: Pool, lifecycle: StoredLifecycle, alice: User) -> None:
    key = await make_key(store, alice)
    after = await moved(lifecycle, alice, key, Move.UPDATE, max_usage_count=9, expires_at=AHEAD, metadata={"a": "b"})
    assert (after.max_usage_count, after.expires_at, after.metadata) == (9, AHEAD, {"a": "b"})
    after = await moved(lifecycle, alice, key, Move.UPDATE, max_usage_count=8)
    assert (after.max_usage_count, after.expires_at, after.metadata, after.version) == (8, AHEAD, {"a": "b"}, 3)
    assert (await moved(lifecycle, alice, key, Move.UPDATE, metadata={})).metadata == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_usage_count", 10),
        ("max_usage_count", 2),
        ("max_usage_count", 0),
        ("max_usage_count", -1),
        ("expires_at", AHEAD + timedelta(seconds=1)),
        ("expires_at", NOW),
    ],
)
async def test_an_update_raises_no_limit_and_puts_off_no_expiry(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User, field: str, value: object
) -> None:
    key = await make_key(store, alice, max_usage_count=9, expires_at=AHEAD)
    rows(database, "UPDATE cryptography.keys SET usage_counter = 3")
    error = await refused(lifecycle, alice, key, Move.UPDATE, **{field: value})
    assert (error.reason, error.metadata) == (Reason.MALFORMED, {"field": field})


async def test_a_limit_lowered_to_what_was_used_is_reached(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    key = await make_key(store, alice)
    rows(database, "UPDATE cryptography.keys SET usage_counter = 3")
    after = await moved(lifecycle, alice, key, Move.UPDATE, max_usage_count=3)
    assert (after.state, after.version) == (State.INACTIVE, 2)
    assert (await refused(lifecycle, alice, key, Move.REACTIVATE)).reason is Reason.USAGE_LIMIT_REACHED


async def test_a_key_that_is_created_ahead_of_its_time_is_pre_active_until_then(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    key = await make_key(store, alice, activated_at=AHEAD, expires_at=AHEAD + timedelta(days=1), max_usage_count=7)
    assert (key.state, key.activated_at, key.expires_at, key.max_usage_count) == (
        State.PRE_ACTIVE,
        AHEAD,
        AHEAD + timedelta(days=1),
        7,
    )
    rows(database, "UPDATE cryptography.keys SET activated_at = now() WHERE id = %s", key.identity.key_id)
    found = await StoredKeys(store, RECORDS).find(alice.user_id, key.identity.key_id)
    assert found is not None
    assert found.state is State.ACTIVE
    other = await make_key(store, alice, activated_at=AHEAD)
    assert (await moved(lifecycle, alice, other, Move.ACTIVATE)).state is State.ACTIVE


async def test_a_key_that_has_expired_before_it_is_made_is_refused(store: Pool, alice: User) -> None:
    with pytest.raises(KmsError) as caught:
        await make_key(store, alice, expires_at=NOW)
    assert (caught.value.reason, caught.value.metadata) == (Reason.MALFORMED, {"field": "expires_at"})


async def test_what_is_due_is_destroyed_and_the_row_stays(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    resident = await StoredKeys(store, RECORDS).insert(alice.user_id, new_key(alice.user_id, custody=Custody.RESIDENT))
    wrapped, later = await make_key(store, alice), await make_key(store, alice)
    for key in (resident, wrapped, later):
        await moved(lifecycle, alice, key, Move.DEACTIVATE)
        await moved(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION)
    assert await lifecycle.destroy_due() == []
    due = [resident.identity.key_id, wrapped.identity.key_id]
    rows(database, "UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE id = ANY (%s)", due)
    destroyed = await lifecycle.destroy_due()
    assert {key.key_id for key in destroyed} == set(due)
    objects = [str(resident.hsm_key_id), "0a0b"]
    assert await lifecycle.removable_objects(objects) == objects[:1]
    assert await lifecycle.destroy_due() == []
    found = await StoredKeys(store, RECORDS).find(alice.user_id, due[0])
    assert found is not None
    assert (found.state, found.public_key) == (State.DESTROYED, resident.public_key)
    assert found.destroyed_at is not None
    assert events(database, wrapped)[-1] == (found.version, "key.destroyed")
    envelopes = rows(database, "SELECT encrypted_private_key AS e FROM cryptography.keys WHERE id = ANY (%s)", due)
    assert envelopes == [{"e": ""}, {"e": ""}]


async def test_a_key_that_cannot_be_destroyed_keeps_no_other_from_it_and_is_told(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, due = await make_key(store, alice), await make_key(store, alice)
    for key in (stuck, due):
        await moved(lifecycle, alice, key, Move.DEACTIVATE)
        await moved(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION)
    rows(database, "UPDATE cryptography.keys SET destruction_scheduled_at = now() - interval '1 s'")
    # Its next event would not follow the last.
    rows(database, "UPDATE audit.aggregate_heads SET aggregate_version = 99 WHERE aggregate_id = %s", stuck.identity.key_id)
    told: list[MutableMapping[str, Any]] = []

    def keep(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        told.append(event)
        raise structlog.DropEvent

    monkeypatch.setattr(lifecycle_module, "_LOG", structlog.wrap_logger(None, processors=[keep]))
    assert [key.key_id for key in await lifecycle.destroy_due()] == [due.identity.key_id]
    assert [line["event"] for line in told] == ["key not destroyed"]
    assert f"key {stuck.identity.key_id} cannot be destroyed: aggregate" in told[0]["reason"]
    assert await lifecycle.destroy_due() == []
    assert len(told) == 2
    left = rows(
        database, "SELECT encrypted_private_key AS e, destroyed_at AS at FROM cryptography.keys WHERE destroyed_at IS NULL"
    )
    assert left == [{"e": "ZW52ZWxvcGU=", "at": None}]


async def test_a_hundred_keys_that_cannot_be_destroyed_keep_no_other_from_it(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    due = await make_key(store, alice)
    copies = """
        INSERT INTO cryptography.keys (
            user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
        )
        SELECT %s, 'stuck' || n, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED'
        FROM generate_series(1, 150) AS n
    """
    rows(database, copies, alice.user_id)
    rows(
        database,
        "UPDATE cryptography.keys SET destruction_scheduled_at = now() - interval '1 hour' * (1 + (key_name ^@ 'stuck')::int)",
    )
    rows(database, "UPDATE audit.aggregate_heads SET aggregate_version = 99 WHERE aggregate_id <> %s", due.identity.key_id)
    assert [key.key_id for key in await lifecycle.destroy_due()] == [due.identity.key_id]


_COLUMNS = (
    "key_status",
    "usage_counter",
    "max_usage_count",
    "activated_at",
    "expires_at",
    "compromised_at",
    "revoked_at",
    "last_used_at",
    "version",
    "deactivated_at",
    "superseded_at",
    "destruction_scheduled_at",
    "destroyed_at",
    "compromise_occurred_at",
    "encrypted_private_key",
)


@pytest.mark.parametrize("role", ["none", "authenticated_users", "admin_users", "auditor_users", "job_runner"])
async def test_nobody_changes_states_and_counters_but_by_the_functions(
    database: Database, store: Pool, alice: User, role: str
) -> None:
    key = await make_key(store, alice)
    for column in _COLUMNS:
        change = sql.SQL("UPDATE cryptography.keys SET {} = DEFAULT WHERE id = {}")
        with pytest.raises(errors.InsufficientPrivilege), acting_for(database.dsn, role, alice.user_id) as connection:
            connection.execute(change.format(sql.Identifier(column), sql.Literal(key.identity.key_id)))
    attempts = [
        "SELECT cryptography.take_batch(gen_random_uuid(), 1)",
        "SELECT cryptography.charge_uses('{}', '{}')",
        "INSERT INTO cryptography.request_records VALUES (gen_random_uuid(), 'Sign', '1', '', '', gen_random_uuid(), now())",
        "SELECT * FROM cryptography.request_records",
        "DELETE FROM cryptography.ledger_writers",
    ]
    if role != "none":
        attempts.append("SELECT cryptography.settle(gen_random_uuid(), 1, '[]')")
    if role != "authenticated_users":
        attempts.append("SELECT cryptography.move_key(gen_random_uuid(), 'revoke', '{}', 0, NULL, now(), NULL, NULL, NULL)")
    if role != "job_runner":
        attempts.append("SELECT cryptography.destroy_keys('{}', '{}', now(), '{}')")
    for attempt in attempts:
        with pytest.raises(errors.InsufficientPrivilege), acting_for(database.dsn, role, alice.user_id) as connection:
            connection.execute(attempt.encode())


async def test_the_token_objects_of_destroyed_keys_are_removed_when_the_token_is_back(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    token = FakeHsm()
    kept, *due = [await resident(store, token, alice) for _ in range(4)]
    for key in due:
        await moved(lifecycle, alice, key, Move.DEACTIVATE)
        await moved(lifecycle, alice, key, Move.SCHEDULE_DESTRUCTION)
    rows(database, "UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE destruction_scheduled_at IS NOT NULL")
    destruction = Destruction(lifecycle, token)
    assert len(await destruction.destroy_due()) == 3
    token.away.append(True)
    with pytest.raises(KmsError, match="away"):
        await destruction.remove_objects()
    token.away.clear()
    assert await destruction.destroy_due() == []
    await destruction.remove_objects()
    assert await token.residents() == {kept.hsm_key_id}


async def test_the_object_of_a_bound_key_stays_whatever_its_row_says(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    token = FakeHsm()
    bound, plain = await resident(store, token, alice, bound_to="audit"), await resident(store, token, alice)
    rows(
        database,
        "UPDATE cryptography.keys SET destroyed_at = now(), destruction_scheduled_at = now(), encrypted_private_key = ''",
    )
    await Destruction(lifecycle, token).remove_objects()
    assert await token.residents() == {bound.hsm_key_id}
    assert plain.hsm_key_id != bound.hsm_key_id


async def resident(store: Pool, token: FakeHsm, user: User, *, bound_to: str = "") -> KeyRecord:
    """Return a RESIDENT key of *user* whose object *token* holds."""
    new = new_key(user.user_id, custody=Custody.RESIDENT)
    identity = replace(new.identity, bound_to=bound_to)
    material = await token.generate(identity, Custody.RESIDENT)
    return await StoredKeys(store, RECORDS).insert(
        user.user_id, replace(new, identity=identity, material=material), call=a_call(user)
    )


async def test_a_function_that_says_it_destroyed_keys_is_not_believed(
    database: Database, store: Pool, lifecycle: StoredLifecycle, alice: User
) -> None:
    spared, due = await make_key(store, alice), await make_key(store, alice)
    await moved(lifecycle, alice, due, Move.DEACTIVATE)
    await moved(lifecycle, alice, due, Move.SCHEDULE_DESTRUCTION)
    rows(database, "UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE id = %s", due.identity.key_id)
    rows(
        database,
        """CREATE OR REPLACE FUNCTION cryptography.destroy_keys(
            key_ids UUID[], versions BIGINT[], moment TIMESTAMPTZ, new_macs BYTEA[]
        ) RETURNS SETOF UUID LANGUAGE sql SECURITY DEFINER AS $$ SELECT id FROM cryptography.keys $$""",
    )
    assert await lifecycle.destroy_due() == []
    assert spared.state is State.ACTIVE


async def test_a_limit_that_is_raised_never_gets_a_mac(database: Database, store: Pool, alice: User) -> None:
    made_of: list[bytes] = []

    async def watched(data: bytes) -> bytes:
        made_of.append(data)
        return await RECORDS.mac(data)

    lifecycle = StoredLifecycle(store, Records(watched, RECORDS.clock))
    key = await make_key(store, alice, max_usage_count=5)
    made_of.clear()
    with pytest.raises(KmsError) as caught:
        await lifecycle.move(a_call(alice), key.identity.key_id, Move.UPDATE, Change(max_usage_count=6), version=None)
    assert caught.value.metadata == {"field": "max_usage_count"}
    assert not any(b"i6" in data for data in made_of)


@pytest.mark.parametrize("margins", [lifecycle_module._MARGINS, rotations._MARGINS], ids=["a move", "a rotation"])
def test_nothing_holds_a_key_for_as_long_as_its_uses_wait(margins: tuple[timedelta, ...]) -> None:
    """A move and a switch hold the lock of the key until their moment. A batch of uses waits for a lock for a second."""
    assert "set_config('lock_timeout', '1s', false)" in CONFIGURE
    assert max(margins) <= timedelta(seconds=0.5)
