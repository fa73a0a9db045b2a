"""The uses of keys as they are counted from the rows of the trail."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from kms.domain.ids import KeyId, UserId
from kms.rotation.usage import CountedUse, CountedUses
from kms.rotation.usage_postgres import StoredUses
from kms.store.pool import Pool
from tests.fixtures.postgres import Database
from tests.store.acting import add_user
from tests.store.uses import rows

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


async def test_uses_are_counted_and_what_is_no_use_is_not(database: Database, store: Pool) -> None:
    alice, bob = UserId(uuid4()), UserId(uuid4())
    used, unused = KeyId(uuid4()), KeyId(uuid4())
    now: datetime = rows(database, "SELECT date_trunc('second', now()) AS now")[0]["now"]
    for user, name in ((alice, "alice"), (bob, "bob")):
        add_user(database.admin_dsn, user, name)
    for minutes, user, event_type, action, outcome, key in (
        (9, alice, "key.used", "decrypt", "success", used),
        (8, alice, "key.used", "decrypt", "success", used),
        (7, alice, "request.refused", "Sign", "blocked", used),
        (6, alice, "key.used", "decrypt.reencrypt", "success", used),
        (5, bob, "key.used", "decrypt", "success", used),
        (4, alice, "key.used", "decrypt", "success", KeyId(uuid4())),
        (3, alice, "key.used", "decrypt", "success", used),
    ):
        rows(
            database,
            """INSERT INTO audit.security_events
                (event_type, severity, user_id, resource_id, action, outcome, source_ip, created_at)
            VALUES (%s, 'low', %s, %s, %s, %s, %s, %s)""",
            *(event_type, user, key, action, outcome, f"192.0.2.{minutes}", now - timedelta(minutes=minutes)),
        )

    async def counted(since: datetime | None, superseded: datetime = LONG_AGO, scanned_max: int = 100) -> CountedUses:
        found = await StoredUses(store, scanned_max).counted(alice, {used: superseded, unused: superseded}, since)
        assert found[unused].uses == []
        return found[used]

    def use(action: str, count: int, minutes: int) -> CountedUse:
        return CountedUse(action, alice, count, now - timedelta(minutes=minutes), f"192.0.2.{minutes}")

    every = [use("decrypt", 3, 3), use("decrypt.reencrypt", 1, 6)]
    assert await counted(LONG_AGO) == CountedUses(LONG_AGO, every)
    month = await counted(None)
    assert month.uses == every
    assert timedelta(0) <= month.since - (now - timedelta(days=30)) < timedelta(hours=1)
    since = now - timedelta(minutes=8)
    for moments in ((since, LONG_AGO), (LONG_AGO, since), (None, since)):
        assert await counted(*moments) == CountedUses(since, [use("decrypt", 2, 3), use("decrypt.reencrypt", 1, 6)])
    # Of the newest three entries one is a refusal.
    cut = CountedUses(now - timedelta(minutes=7), [use("decrypt", 1, 3), use("decrypt.reencrypt", 1, 6)])
    assert await counted(LONG_AGO, scanned_max=3) == cut
