"""Whatever is for good in the database is in the journal in the end, whoever made it and whatever kept him from writing it."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from kms.app.ports import User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move
from kms.store import journal_follower
from kms.store.epoch import Cause, begin_epoch, check_epoch
from kms.store.journal import Event, Journal, read_journal
from kms.store.journal_follower import JournalFollower
from kms.store.journaled import JournaledLifecycle
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS, mac, renew_macs
from tests.store.uses import a_call, make_key, make_user

Told = list[tuple[Event, KeyId]]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
AHEAD = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
async def follower(store: Pool, journal: Journal) -> JournalFollower:
    await check_epoch(store, RECORDS)
    return JournalFollower(store, journal, RECORDS)


@pytest.fixture
async def alice(store: Pool, follower: JournalFollower) -> User:
    return await make_user(store, "alice")


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def told(journal: Journal) -> Told:
    return [
        (entry.event, KeyId(entry.subject))
        for entry in read_journal(journal.path)
        if entry.event not in (Event.JOURNAL_BEGUN, Event.FOLLOWED)
    ]


def places(journal: Journal) -> int:
    return sum(entry.event is Event.FOLLOWED for entry in read_journal(journal.path))


async def move(
    store: Pool, user: User, key: KeyRecord, *moves: Move, journal: Journal | None = None, change: Change | None = None
) -> KeyId:
    stored = StoredLifecycle(store, RECORDS)
    lifecycle = stored if journal is None else JournaledLifecycle(stored, journal, lambda: NOW)
    for each in moves:
        await lifecycle.move(a_call(user), key.identity.key_id, each, change or Change(reason="left"), version=None)
    return key.identity.key_id


async def destroy(store: Pool, admin: psycopg.Connection[Any], user: User, key: KeyRecord) -> KeyId:
    await move(store, user, key, Move.DEACTIVATE, Move.SCHEDULE_DESTRUCTION)
    admin.execute("UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE id = %s", (key.identity.key_id,))
    renew_macs(admin)
    assert await StoredLifecycle(store, RECORDS).destroy_due()
    return key.identity.key_id


async def moved_each_way(store: Pool, admin: psycopg.Connection[Any], user: User) -> Told:
    """Move keys as they are moved where no line is written: by a process that is killed, or by others."""
    narrowed = Change(max_usage_count=5)
    return [
        (Event.KEY_REVOKED, await move(store, user, await make_key(store, user), Move.REVOKE)),
        (Event.KEY_COMPROMISED, await move(store, user, await make_key(store, user), Move.COMPROMISE)),
        (Event.KEY_DESTROYED, await destroy(store, admin, user, await make_key(store, user))),
        (Event.KEY_CHANGED, await move(store, user, await make_key(store, user), Move.DEACTIVATE)),
        (Event.KEY_CHANGED, await move(store, user, await make_key(store, user), Move.UPDATE, change=narrowed)),
    ]


def without_detours(lines: Told) -> Told:
    """Leave out that keys were changed that are gone for good."""
    gone = {key for event, key in lines if event is not Event.KEY_CHANGED}
    return sorted(line for line in lines if line[0] is not Event.KEY_CHANGED or line[1] not in gone)


async def test_a_move_without_its_line_is_appended_with_its_reason(
    store: Pool, follower: JournalFollower, admin: psycopg.Connection[Any], alice: User, journal: Journal
) -> None:
    await follower.catch_up()
    assert (told(journal), places(journal)) == ([], 1)
    made = await moved_each_way(store, admin, alice)
    await follower.catch_up()
    assert without_detours(told(journal)) == sorted(made)
    assert [entry.reason for entry in read_journal(journal.path) if entry.event is Event.KEY_REVOKED] == ["left"]
    lines = len(told(journal))
    await follower.catch_up()
    assert len(told(journal)) == lines


async def test_a_revocation_that_could_not_be_written_is_written_when_the_journal_can_be(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal, tmp_path: Path
) -> None:
    await follower.catch_up()
    key = await make_key(store, alice)
    with pytest.raises(KmsError) as caught:
        await move(store, alice, key, Move.REVOKE, journal=Journal(tmp_path))
    assert caught.value.reason is Reason.OUTCOME_UNKNOWN
    with pytest.raises(KmsError) as caught:
        await move(store, alice, key, Move.REVOKE, journal=journal)
    assert (caught.value.reason, told(journal)) == (Reason.KEY_REVOKED, [])
    await follower.catch_up()
    assert told(journal) == [(Event.KEY_REVOKED, key.identity.key_id)]


async def test_what_was_written_before_the_answer_is_not_written_again(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal
) -> None:
    await follower.catch_up()
    keys = [await move(store, alice, await make_key(store, alice), Move.REVOKE, journal=journal) for _ in range(3)]
    for _ in range(2):
        await follower.catch_up()
    assert told(journal) == [(Event.KEY_REVOKED, key) for key in keys]
    assert places(journal) == 1, "nor a place without need"


@pytest.mark.parametrize("loss", ["begun anew", "emptied", "deleted"])
async def test_a_journal_that_was_lost_is_written_again(
    store: Pool, follower: JournalFollower, admin: psycopg.Connection[Any], alice: User, journal: Journal, loss: str
) -> None:
    made = await moved_each_way(store, admin, alice)
    if loss != "begun anew":
        await follower.catch_up()
    if loss == "emptied":
        journal.path.write_bytes(b"")
    if loss == "deleted":
        journal.path.unlink()
    await follower.catch_up()
    assert without_detours(told(journal)) == sorted(made)


async def test_a_place_of_another_epoch_does_not_count(
    store: Pool, follower: JournalFollower, admin: psycopg.Connection[Any], alice: User, journal: Journal
) -> None:
    # Of a database that came further before it was rolled back.
    journal.append(Event.FOLLOWED, uuid4(), occurred_at=datetime.now(UTC), reason=f"{2**60} {uuid4()}")
    await follower.catch_up()
    first = await moved_each_way(store, admin, alice)
    await follower.catch_up()
    assert without_detours(told(journal)) == sorted(first)
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    await follower.catch_up()
    # Changes are told again, since versions of keys are not the same ones in another epoch.
    again = [line for line in first if line[0] is Event.KEY_CHANGED]
    assert without_detours(told(journal)) == sorted(first + again)
    second = await moved_each_way(store, admin, alice)
    await follower.catch_up()
    assert without_detours(told(journal)) == sorted(first + again + second), "nor is anything else written twice"


_CHANGES = {
    "deactivated": ([Move.DEACTIVATE], Change(reason="left")),
    "limit lowered": ([Move.UPDATE], Change(max_usage_count=5)),
    "expiry brought forward": ([Move.UPDATE], Change(expires_at=AHEAD)),
    "destruction scheduled": ([Move.COMPROMISE, Move.SCHEDULE_DESTRUCTION], Change()),
}


@pytest.mark.parametrize("how", _CHANGES)
async def test_a_key_that_may_do_less_is_written_before_the_answer_and_not_again(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal, how: str
) -> None:
    await follower.catch_up()
    key, (moves, change) = await make_key(store, alice), _CHANGES[how]
    await move(store, alice, key, *moves, journal=journal, change=change)
    assert told(journal)[-1] == (Event.KEY_CHANGED, key.identity.key_id)
    await follower.catch_up()
    assert len(told(journal)) == len(moves)
    again = await make_key(store, alice)
    await move(store, alice, again, *moves, change=change)
    await follower.catch_up()
    assert told(journal)[-1] == (Event.KEY_CHANGED, again.identity.key_id)
    journal.path.unlink()
    await follower.catch_up()
    if Move.COMPROMISE not in moves:
        assert sorted(told(journal)) == sorted((Event.KEY_CHANGED, each.identity.key_id) for each in (key, again))


async def test_a_second_change_is_written_as_the_first_was(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal
) -> None:
    await follower.catch_up()
    key = await make_key(store, alice)
    for count in (9, 8, 7):
        await move(store, alice, key, Move.UPDATE, change=Change(max_usage_count=count))
        await follower.catch_up()
    assert told(journal) == [(Event.KEY_CHANGED, key.identity.key_id)] * 3


async def test_what_narrows_no_key_is_not_written(store: Pool, follower: JournalFollower, alice: User, journal: Journal) -> None:
    key = await make_key(store, alice)
    await move(store, alice, key, Move.UPDATE, journal=journal, change=Change(metadata={"team": "a"}))
    for _ in range(2):
        await follower.catch_up()
    await move(store, alice, key, Move.UPDATE, journal=journal, change=Change(metadata={"team": "b"}))
    await follower.catch_up()
    assert told(journal) == []


async def test_a_move_that_commits_late_is_not_passed_by(
    store: Pool,
    follower: JournalFollower,
    admin: psycopg.Connection[Any],
    alice: User,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal_follower, "ROWS_MAX", 1)
    slow, fast = await make_key(store, alice), await make_key(store, alice)
    await follower.catch_up()
    with admin.transaction():
        admin.execute(
            "UPDATE cryptography.keys SET key_status = 'revoked', revoked_at = now() WHERE id = %s", (slow.identity.key_id,)
        )
        renew_macs(admin, only=slow.identity.key_id)
        await move(store, alice, fast, Move.REVOKE)
        await follower.catch_up()
    await follower.catch_up()
    assert {key for _, key in told(journal)} == {slow.identity.key_id, fast.identity.key_id}


async def test_more_than_fits_one_reading_is_followed_with_a_place_of_its_own(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_follower, "ROWS_MAX", 2)
    keys = [await make_key(store, alice) for _ in range(5)]
    revoked = [await move(store, alice, key, Move.REVOKE) for key in keys[:3]]
    await follower.catch_up()
    assert sorted(key for _, key in told(journal)) == sorted(revoked)
    revoked += [await move(store, alice, key, Move.REVOKE) for key in keys[3:]]
    await follower.catch_up()
    assert sorted(key for _, key in told(journal)) == sorted(revoked)
    assert places(journal) == 2


async def test_workers_that_catch_up_at_once_write_nothing_twice(
    store: Pool, follower: JournalFollower, admin: psycopg.Connection[Any], alice: User, journal: Journal
) -> None:
    for _ in range(2):  # first without a place, then behind one
        made = await moved_each_way(store, admin, alice)
        await asyncio.gather(*(JournalFollower(store, journal, RECORDS).catch_up() for _ in range(3)))
        assert set(made) <= set(told(journal))
        assert [told(journal).count(line) for line in made] == [1] * len(made)


async def test_a_journal_that_cannot_be_written_is_told_and_not_given_up(
    store: Pool, follower: JournalFollower, alice: User, journal: Journal
) -> None:
    key = await move(store, alice, await make_key(store, alice), Move.REVOKE)
    journal.path.mkdir()
    with pytest.raises(KmsError, match="cannot be written"):
        await follower.catch_up()
    journal.path.rmdir()
    await follower.catch_up()
    assert told(journal) == [(Event.KEY_REVOKED, key)]


async def test_an_event_that_the_keys_record_does_not_show_is_not_journaled(
    store: Pool, follower: JournalFollower, admin: psycopg.Connection[Any], alice: User, journal: Journal
) -> None:
    key = await make_key(store, alice)
    await follower.catch_up()
    for kind in ("key.destroyed", "key.revoked", "key.deactivated"):
        admin.execute(
            """INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data)
            VALUES (%s, 'key', 1000000, %s, '{}')""",
            (key.identity.key_id, kind),
        )
    await follower.catch_up()
    assert told(journal) == []
