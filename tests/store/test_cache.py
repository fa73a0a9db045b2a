"""What is remembered: for a second, shared by those who ask at once, never what was changed, and nothing that is not there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import CLOCK_BOOTTIME, clock_gettime, monotonic
from typing import Any, cast
from uuid import UUID, uuid4

import psycopg
import pytest

from kms.app.access import Access
from kms.app.keyring import require_usable_key
from kms.app.ports import Call, Entry, User
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyName
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import Change, Move, State, Use
from kms.keys.ledger.settling import SINGLE, PendingResult, Settling
from kms.store import cache as caches
from kms.store.cache import Cache, boot_clock
from kms.store.cached import CachedKeys, CachedUsers, ForgettingLedger, ForgettingLifecycle
from kms.store.changes import heard
from kms.store.keys import StoredKeys
from kms.store.ledger import open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, open_pool
from kms.store.users import StoredUsers
from kms.store.watch import DatabaseProbe
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS
from tests.store.uses import a_call, counter, make_key, make_user, rows, sign


@dataclass(slots=True)
class Clock:
    """A clock that stands until it is moved."""

    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(slots=True)
class Source:
    """Something that is read: what it holds is what a read finds that is answered now."""

    value: UUID | None = field(default_factory=uuid4)
    reads: int = 0
    answers: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answers.set()

    async def read(self) -> UUID | None:
        self.reads += 1
        value = self.value
        await self.answers.wait()
        return value


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> Cache[str, UUID]:
    return Cache(lambda value: value, lambda _: 1000, clock)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a process of the service remembers of a database, and the pool through which it reads."""

    pool: Pool
    keys: CachedKeys
    users: CachedUsers
    ledger: ForgettingLedger
    lifecycle: ForgettingLifecycle

    async def sign(self, user: User, ref: Any) -> None:  # noqa: ANN401
        """Use a key as a Sign does, with everything but the signature."""

        async def compute(call: Call, fresh: bool) -> PendingResult[None]:
            key = await require_usable_key(self.keys, user.user_id, ref, Use.PROTECT, fresh=fresh)
            return PendingResult(None, sign(call.user, key.record))

        access = Access(self.users)
        call = Call(await access.admit(user.user_id, recent=True), "r", "")
        await Settling(self.ledger, access).settle_use(call, compute, SINGLE)


@asynccontextmanager
async def worker(database: Database, *, hears: bool) -> AsyncIterator[Worker]:
    async with open_pool(database.dsn, 4) as pool, open_ledger(database.dsn, pool) as ledger:
        keys, users = CachedKeys(StoredKeys(pool, RECORDS)), CachedUsers(StoredUsers(pool))
        forgetting = ForgettingLedger(ledger, keys, users)
        made = Worker(pool, keys, users, forgetting, ForgettingLifecycle(StoredLifecycle(pool, RECORDS), keys))
        if not hears:
            yield made
            return
        async with heard(database.dsn, {"key": keys.drop, "user": users.drop}):
            await until(lambda: keys.status().dropped > 0)
            yield made


@pytest.fixture
async def here(database: Database) -> AsyncIterator[Worker]:
    async with worker(database, hears=True) as made:
        yield made


@pytest.fixture
async def deaf(database: Database) -> AsyncIterator[Worker]:
    """A worker that is told nothing."""
    async with worker(database, hears=False) as made:
        yield made


@pytest.fixture
async def there(database: Database) -> AsyncIterator[Worker]:
    async with worker(database, hears=False) as made:
        yield made


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> float:
    """Wait until *holds*, and return for how many seconds."""
    began = monotonic()
    while not holds():
        assert monotonic() - began < seconds
        await asyncio.sleep(0.001)
    return monotonic() - began


async def move(at: Worker, user: User, key: KeyRecord, what: Move) -> KeyRecord:
    return await at.lifecycle.move(a_call(user), key.identity.key_id, what, Change(reason="r"), version=None)


async def refusal_of(use: Any) -> Reason:  # noqa: ANN401
    with pytest.raises(KmsError) as caught:
        await use
    return caught.value.reason


# The cache by itself.


async def test_what_was_read_within_a_second_is_not_read_again(cache: Cache[str, UUID], clock: Clock) -> None:
    source = Source()
    assert await cache.find("k", source.read, recent=True) == source.value
    clock.seconds += 1.0
    assert await cache.find("k", source.read, recent=True) == source.value
    assert source.reads == 1
    clock.seconds += 0.001
    source.value = uuid4()
    assert await cache.find("k", source.read, recent=True) == source.value
    assert source.reads == 2
    assert (cache.status().hits, cache.status().misses, cache.status().entries) == (1, 2, 1)


async def test_the_second_is_counted_from_before_the_read_was_sent(cache: Cache[str, UUID], clock: Clock) -> None:
    source = Source()
    source.answers.clear()
    first = asyncio.create_task(cache.find("k", source.read, recent=True))
    await until(lambda: source.reads == 1)
    clock.seconds += 0.9
    source.answers.set()
    await first
    clock.seconds += 0.2
    await cache.find("k", source.read, recent=True)
    assert source.reads == 2


async def test_the_clock_is_that_of_the_boot() -> None:
    before = clock_gettime(CLOCK_BOOTTIME)
    assert before <= boot_clock() <= clock_gettime(CLOCK_BOOTTIME)


async def test_what_is_remembered_is_old_after_a_suspension(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Cache[str, UUID] = Cache(lambda value: value, lambda _: 100)
    source = Source()
    for _ in range(2):
        await cache.find("k", source.read, recent=True)
    assert source.reads == 1
    # The host was suspended for a minute: of its clocks that are never set, this one alone has gone on.
    monkeypatch.setattr(caches, "clock_gettime", lambda clock: clock_gettime(clock) + 60 * (clock == CLOCK_BOOTTIME))
    await cache.find("k", source.read, recent=True)
    assert source.reads == 2


async def test_many_who_ask_at_once_share_one_read(cache: Cache[str, UUID]) -> None:
    source = Source()
    source.answers.clear()
    asking = [asyncio.create_task(cache.find("k", source.read, recent=True)) for _ in range(64)]
    await until(lambda: source.reads == 1)
    for task in asking[:3]:
        task.cancel()  # the first of them began the read
    await asyncio.sleep(0)
    source.answers.set()
    assert set(await asyncio.gather(*asking[3:])) == {source.value}
    assert source.reads == 1


async def test_a_read_for_which_nobody_waits_any_more_is_ended(cache: Cache[str, UUID]) -> None:
    source = Source()
    source.answers.clear()
    asking = [asyncio.create_task(cache.find("k", source.read, recent=True)) for _ in range(3)]
    await until(lambda: source.reads == 1)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    later = asyncio.create_task(cache.find("k", source.read, recent=True))
    await until(lambda: source.reads == 2)
    assert len([task for task in asyncio.all_tasks() if "fly" in repr(task.get_coro())]) == 1
    source.answers.set()
    assert await later == source.value


async def test_a_read_that_took_longer_than_a_second_is_for_those_alone_who_asked_before_it(
    cache: Cache[str, UUID], clock: Clock
) -> None:
    source = Source()
    source.answers.clear()
    first = asyncio.create_task(cache.find("k", source.read, recent=True))
    await until(lambda: source.reads == 1)
    clock.seconds += 0.5
    second = asyncio.create_task(cache.find("k", source.read, recent=True))
    await asyncio.sleep(0)
    old, source.value = source.value, uuid4()
    clock.seconds += 0.6
    source.answers.set()
    assert await first == old
    assert await second == source.value


async def test_what_changed_during_its_read_is_not_kept_and_not_shared(cache: Cache[str, UUID], clock: Clock) -> None:
    source = Source()
    source.answers.clear()
    first = asyncio.create_task(cache.find("by-name", source.read, recent=True))
    await until(lambda: source.reads == 1)
    clock.seconds += 0.1
    cache.drop(source.value)
    clock.seconds += 0.1
    second = asyncio.create_task(cache.find("by-name", source.read, recent=True))
    await asyncio.sleep(0)
    source.answers.set()
    assert await first == await second == source.value
    assert source.reads == 2
    assert await cache.find("by-name", source.read, recent=True) == source.value
    assert source.reads == 2


async def test_a_change_drops_all_names_of_what_changed_and_nothing_else(cache: Cache[str, UUID], clock: Clock) -> None:
    one, other = Source(), Source()
    for name, source in (("a", one), ("b", one), ("c", other)):
        await cache.find(name, source.read, recent=True)
    clock.seconds += 0.1
    cache.drop(one.value)
    for name, source in (("a", one), ("b", one), ("c", other)):
        await cache.find(name, source.read, recent=True)
    assert (one.reads, other.reads) == (4, 1)
    clock.seconds += 0.1
    cache.drop(None)
    assert cache.status().entries == 0
    await cache.find("c", other.read, recent=True)
    assert other.reads == 2


async def test_that_nothing_is_there_is_asked_every_time_and_told_to_nobody_who_asks_later(cache: Cache[str, UUID]) -> None:
    clock_moves = Clock()
    source = Source(value=None)
    moving: Cache[str, UUID] = Cache(lambda value: value, lambda _: 1, clock_moves)
    source.answers.clear()
    first = asyncio.create_task(moving.find("k", source.read, recent=True))
    await until(lambda: source.reads == 1)
    source.value = uuid4()
    clock_moves.seconds += 0.1
    second = asyncio.create_task(moving.find("k", source.read, recent=True))
    await asyncio.sleep(0)
    source.answers.set()
    assert await first is None
    assert await second == source.value
    source.value = None
    assert await moving.find("k", source.read, recent=False) is None
    assert moving.status().entries == 0


async def test_an_older_answer_that_comes_later_replaces_nothing(cache: Cache[str, UUID], clock: Clock) -> None:
    slow, fast = Source(), Source()
    slow.answers.clear()
    late = asyncio.create_task(cache.find("k", slow.read, recent=True))
    await until(lambda: slow.reads == 1)
    clock.seconds += 0.1
    await cache.find("k", fast.read, recent=False)
    slow.answers.set()
    assert await late == slow.value
    assert await cache.find("k", fast.read, recent=True) == fast.value


async def test_a_failed_read_fails_those_who_wait_for_it_and_is_forgotten(cache: Cache[str, UUID]) -> None:
    async def fail() -> UUID | None:
        await asyncio.sleep(0)
        raise KmsError(Reason.STORE_UNAVAILABLE, "away")

    asking = [cache.find("k", fail, recent=True) for _ in range(3)]
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [Reason.STORE_UNAVAILABLE] * 3
    source = Source()
    assert await cache.find("k", source.read, recent=True) == source.value


async def test_a_cache_is_bounded_in_entries_in_bytes_and_in_time(
    cache: Cache[str, UUID], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "ENTRIES_MAX", 10)
    for number in range(15):
        await cache.find(str(number), Source().read, recent=True)
    assert cache.status().entries == 10
    monkeypatch.setattr(caches, "BYTES_MAX", 4000)
    newest = Source()
    await cache.find("newest", newest.read, recent=True)
    assert cache.status().entries == 4
    await cache.find("newest", newest.read, recent=True)
    assert newest.reads == 1
    clock.seconds += 2
    await cache.find("another", Source().read, recent=True)
    assert cache.status().entries == 1


async def test_neither_cache_nor_entry_prints_what_it_holds(here: Worker, alice: User) -> None:
    key = await make_key(here.pool, alice)
    await here.keys.find_usable(alice.user_id, key.name, recent=True)
    assert "ZW52ZWxvcGU=" not in repr(here.keys) + repr(here.keys.cache) + repr(vars(here.keys.cache))


# With the database, and other workers.


async def test_a_hot_key_is_used_without_a_query_but_the_charge(database: Database, here: Worker, alice: User) -> None:
    key = await make_key(here.pool, alice)
    rows(database, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    for ref in (key.name, key.identity.key_id):
        await here.sign(alice, ref)
    before = here.keys.status().hits, here.keys.status().misses
    rows(database, "SELECT pg_stat_statements_reset()")
    for _ in range(20):
        await here.sign(alice, key.name)
        assert (await here.keys.find(alice.user_id, key.identity.key_id, recent=True)) is not None
    query = "SELECT sum(calls) AS calls FROM pg_stat_statements WHERE query LIKE %s AND toplevel"
    reads = rows(database, query, "%FROM cryptography.keys%")[0]["calls"] or 0
    users = rows(database, query, "%find_user_by_uri%")[0]["calls"] or 0
    charges = rows(database, query, "%cryptography.settle(%")[0]["calls"]
    assert charges == 20
    assert reads <= 4
    assert users <= 2
    assert here.keys.status().hits - before[0] >= 36


async def test_a_change_is_heard_within_milliseconds(database: Database, here: Worker, there: Worker, alice: User) -> None:
    key = await make_key(here.pool, alice)
    took = []
    for number in range(20):
        await here.keys.find_usable(alice.user_id, key.name, recent=True)
        heard_before = here.keys.status().dropped
        await move(there, alice, key, Move.REACTIVATE if number % 2 else Move.DEACTIVATE)
        took.append(await until(lambda known=heard_before: here.keys.status().dropped > known))  # type: ignore[misc]
        found = await here.keys.find_usable(alice.user_id, key.name, recent=True)
        assert found is not None
        assert found.record.version == number + 2
    assert sorted(took)[10] < 0.1
    users_dropped = here.users.status().dropped
    rows(database, "UPDATE authentication.users SET version = version + 1")
    await until(lambda: here.users.status().dropped > users_dropped)


async def test_a_charge_tells_nobody_also_where_it_reaches_the_limit(database: Database, here: Worker, alice: User) -> None:
    key = await make_key(here.pool, alice, max_usage_count=5)
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute("LISTEN kms_changed")
        for _ in range(4):
            await here.sign(alice, key.name)
        rows(database, "UPDATE authentication.users SET last_login_at = now(), failed_login_attempts = 3")
        assert not list(connection.notifies(timeout=0.2))
        await here.sign(alice, key.name)
        assert not list(connection.notifies(timeout=0.2))


@pytest.mark.parametrize("change", ["version = version + 1", "locked_until = now()", "deleted_at = now()", "username = 'alicia'"])
def test_a_change_of_a_users_standing_is_told(database: Database, change: str) -> None:
    rows(database, "SELECT authentication.create_service_user('alice')")
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute("LISTEN kms_changed")
        changed = rows(database, f"UPDATE authentication.users SET {change} RETURNING id")[0]["id"]
        assert [told.payload for told in connection.notifies(timeout=5, stop_after=1)] == [f"user {changed}"]


async def test_what_is_sent_by_others_and_not_understood_drops_everything(database: Database, here: Worker, alice: User) -> None:
    key = await make_key(here.pool, alice)
    for payload in ("", "key", "key x", "role 00000000-0000-0000-0000-000000000000"):
        await here.keys.find_usable(alice.user_id, key.name, recent=True)
        rows(database, "SELECT pg_notify('kms_changed', %s)", payload)
        await until(lambda: here.keys.status().entries == 0)


async def test_a_renamed_key_is_dropped_under_both_names(database: Database, here: Worker, alice: User) -> None:
    one, other = await make_key(here.pool, alice), await make_key(here.pool, alice)
    for ref in (one.name, one.identity.key_id, other.name):
        await here.keys.find_usable(alice.user_id, ref, recent=True)
    dropped = here.keys.status().dropped
    rows(database, "UPDATE cryptography.keys SET key_name = %s WHERE id = %s", one.name + "@1", one.identity.key_id)
    rows(database, "UPDATE cryptography.keys SET key_name = %s WHERE id = %s", one.name, other.identity.key_id)
    await until(lambda: here.keys.status().dropped >= dropped + 2)
    for ref, expected in ((one.name, other), (KeyName(one.name + "@1"), one), (one.identity.key_id, one)):
        found = await here.keys.find_usable(alice.user_id, ref, recent=True)
        assert found is not None
        assert found.record.identity == expected.identity
    assert await here.keys.find_usable(alice.user_id, other.name, recent=True) is None


async def test_nobody_is_refused_by_what_is_remembered(database: Database, deaf: Worker, there: Worker, alice: User) -> None:
    key = await make_key(there.pool, alice)
    for _ in range(20):
        await deaf.sign(alice, key.name)
        await move(there, alice, key, Move.DEACTIVATE)
        assert await refusal_of(deaf.sign(alice, key.name)) is Reason.KEY_INACTIVE
        await move(there, alice, key, Move.REACTIVATE)
        await deaf.sign(alice, key.name)
    assert counter(database, key) == 40
    # A name that now belongs to another key, and a caller of another version.
    await deaf.sign(alice, key.name)
    other = await make_key(there.pool, alice)
    rows(database, "UPDATE cryptography.keys SET key_name = %s WHERE id = %s", key.name + "@1", key.identity.key_id)
    await move(there, alice, key, Move.DEACTIVATE)
    rows(database, "UPDATE cryptography.keys SET key_name = %s WHERE id = %s", key.name, other.identity.key_id)
    rows(database, "UPDATE authentication.users SET version = version + 1")
    await deaf.sign(alice, key.name)
    assert (counter(database, key), counter(database, other)) == (41, 1)


async def test_what_is_revoked_elsewhere_is_refused_at_once_every_time(deaf: Worker, there: Worker, alice: User) -> None:
    """Promise 3: the charge decides, whatever a worker remembers; this one is told nothing."""

    async def trial() -> None:
        key = await make_key(there.pool, alice)
        await deaf.sign(alice, key.name)
        assert await deaf.keys.find_usable(alice.user_id, key.name, recent=True) is not None
        await move(there, alice, key, Move.REVOKE)
        assert await refusal_of(deaf.sign(alice, key.name)) is Reason.KEY_REVOKED

    for _ in range(50):
        await asyncio.gather(*(trial() for _ in range(4)))


async def test_a_caller_who_is_locked_elsewhere_is_refused_at_once(database: Database, deaf: Worker, alice: User) -> None:
    key = await make_key(deaf.pool, alice)
    await deaf.sign(alice, key.name)
    rows(database, "UPDATE authentication.users SET locked_until = now() + interval '1 hour'")
    assert await refusal_of(deaf.sign(alice, key.name)) is Reason.CREDENTIALS_INVALID
    assert counter(database, key) == 1


async def test_ones_own_move_is_seen_at_once(deaf: Worker, alice: User) -> None:
    key = await make_key(deaf.pool, alice)
    for what, state in ((Move.DEACTIVATE, State.INACTIVE), (Move.REACTIVATE, State.ACTIVE), (Move.REVOKE, State.REVOKED)):
        await deaf.keys.find_usable(alice.user_id, key.name, recent=True)
        await move(deaf, alice, key, what)
        found = await deaf.keys.find(alice.user_id, key.name, recent=True)
        assert found is not None
        assert found.state is state


async def test_a_listener_that_is_cut_listens_again_and_drops_what_it_may_have_missed(
    database: Database, here: Worker, alice: User
) -> None:
    key = await make_key(here.pool, alice)
    await here.keys.find_usable(alice.user_id, key.name, recent=True)
    listening = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND query = 'LISTEN kms_changed'"
    before = rows(database, listening, database.name)
    assert len(before) == 1
    dropped = here.keys.status().dropped
    rows(database, "SELECT pg_terminate_backend(%s)", before[0]["pid"])
    rows(database, "UPDATE cryptography.keys SET deactivated_at = now()")
    assert await refusal_of(here.sign(alice, key.name)) is Reason.KEY_INACTIVE
    dropped = here.keys.status().dropped
    await until(lambda: here.keys.status().dropped > dropped)
    after = rows(database, listening, database.name)
    assert [row["pid"] for row in after] not in ([], [before[0]["pid"]])
    dropped = here.keys.status().dropped
    rows(database, "UPDATE cryptography.keys SET deactivated_at = NULL")
    await until(lambda: here.keys.status().dropped > dropped)


async def test_a_stale_draft_is_made_anew_from_the_database(database: Database, deaf: Worker, alice: User) -> None:
    key = await make_key(deaf.pool, alice)
    await deaf.sign(alice, key.name)
    rows(database, 'UPDATE cryptography.keys SET metadata = \'{"a": "b"}\'')
    await deaf.sign(alice, key.name)
    events = rows(database, "SELECT event_details ->> 'key_version' AS v FROM audit.security_events WHERE action = 'sign'")
    assert sorted(row["v"] for row in events) == ["1", "2"]


async def test_a_key_that_could_not_be_charged_is_not_read_again_for_it(
    database: Database, store: Pool, deaf: Worker, alice: User
) -> None:
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store, queue_max=0) as full:
        overfull = ForgettingLedger(full, deaf.keys, deaf.users)
        await deaf.keys.find_usable(alice.user_id, key.name, recent=True)
        dropped = deaf.keys.status().dropped
        assert await refusal_of(overfull.settle(sign(alice, key))) is Reason.STORE_UNAVAILABLE
    assert deaf.keys.status().dropped == dropped


async def test_a_listener_goes_on_behind_a_bug(database: Database) -> None:
    told: list[object] = []

    def drop(changed: object) -> None:
        told.append(changed)
        if len(told) == 1:
            raise LookupError

    async with heard(database.dsn, {"key": drop}):
        await until(lambda: len(told) == 2)


async def test_a_probe_remembers_the_last_answer_and_a_bug_is_none() -> None:
    class Answers:
        """A database that raises `error` while there is one."""

        error: Exception | None = None

        async def fetch(self, *_: object) -> None:
            if self.error is not None:
                raise self.error

    answers = Answers()
    probe = DatabaseProbe(cast(Pool, answers))
    assert probe.answers()
    answers.error = KmsError(Reason.STORE_UNAVAILABLE, "away")
    await probe.ask()
    assert not probe.answers()
    answers.error = None
    await probe.ask()
    assert probe.answers()
    answers.error = LookupError()
    with pytest.raises(LookupError):
        await probe.ask()
    assert not probe.answers()


async def test_a_refusal_that_stays_is_given_after_four_drafts(deaf: Worker, alice: User) -> None:
    key = await make_key(deaf.pool, alice)
    drafts = 0

    async def compute(call: Call, fresh: bool) -> PendingResult[None]:
        nonlocal drafts
        drafts += 1
        entry: Entry = sign(alice, replace(key, version=7))
        return PendingResult(None, entry)

    assert await refusal_of(Settling(deaf.ledger, Access(deaf.users)).settle_use(a_call(alice), compute, SINGLE)) is Reason.STALE
    assert drafts == 4
