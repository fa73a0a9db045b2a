"""The keys as an auditor reads them, with what the trail says: exact, without envelopes, also after a restore."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kms.app import verifying
from kms.app.verifying import VerifyTrail, exported, verify_lines
from kms.dev.postgres import EmbeddedPostgres
from kms.domain.checkpoint import VerifierKey
from kms.domain.key_check import COLUMNS, COLUMNS_NOT_COMPARED, KeyReport, load
from kms.domain.lifecycle import Change, Move
from kms.domain.trail_check import NoteReader
from kms.store import key_table
from kms.store.backup import backup
from kms.store.epoch import Cause, begin_epoch
from kms.store.journal import Event, Journal
from kms.store.key_histories import key_histories
from kms.store.key_table import StoredKeyTable
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, open_pool
from kms.store.restore import restore
from kms.store.sealed_trail import StoredSealedTrail
from tests.fixtures.postgres import Database
from tests.store.backup_rows import add_key, add_user
from tests.store.records import RECORDS, mac
from tests.store.uses import a_call, make_key, make_user

# No trail here has a checkpoint.
READER: Final = NoteReader(VerifierKey("none", bytes(32)), lambda *_: False)
FORGED: Final = """
    INSERT INTO audit.security_events (event_type, severity, resource_id, event_details) VALUES ('key.used', 'low', %s, %s)
"""
TABLE_COLUMNS: Final = """
    SELECT column_name::text FROM information_schema.columns WHERE (table_schema, table_name) = ('cryptography', 'keys')
"""


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.dsn, 3) as pool:
        yield pool


async def reports(pool: Pool, keys_max: int = 10_000) -> tuple[KeyReport, KeyReport]:
    """What comparing the keys finds, in the database and in an export of it."""
    trail, keys = StoredSealedTrail(pool), StoredKeyTable(pool)
    online = await VerifyTrail(trail, READER, keys).compare_keys(keys_max=keys_max)
    lines = [line.encode() async for line in exported(trail, 0, keys)]
    with key_histories() as histories:
        offline = verify_lines(READER, lambda: lines, histories=histories).keys
    assert online is not None
    assert offline is not None
    return online, offline


async def agreed(pool: Pool) -> list[tuple[str, str]]:
    """The differences, kind and column, which are the same in both."""
    online, offline = await reports(pool)
    assert (online.compared, online.findings) == (offline.compared, offline.findings)
    return [(each.difference, each.column) for each in online.findings]


def test_every_column_of_a_key_is_compared_or_named_as_not_compared(admin: psycopg.Connection[Any]) -> None:
    # A column that is new fails here: until an entry of the trail says it and it is compared, or it is named.
    found = {name for (name,) in admin.execute(TABLE_COLUMNS.encode())}
    assert found <= {*COLUMNS, *COLUMNS_NOT_COMPARED, "id", "version", "usage_counter"}
    assert {*COLUMNS, "version", "usage_counter"} <= found


async def test_what_an_auditor_reads_of_a_key_has_all_columns_but_the_envelope(
    pool: Pool, admin: psycopg.Connection[Any]
) -> None:
    await make_key(pool, await make_user(pool, "ada"))
    page = await StoredKeyTable(pool).page(None, 0, 10)
    table = {name for (name,) in admin.execute(TABLE_COLUMNS.encode())}
    assert set(load(page[0].row)) == table - {"encrypted_private_key", "record_mac"}
    admin.execute(b"SET ROLE auditor_users")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        admin.execute(b"SELECT encrypted_private_key FROM cryptography.keys")


async def test_keys_are_read_a_page_at_a_time_and_go_on_where_they_ended(
    pool: Pool, admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    user = add_user(admin)
    monkeypatch.setattr(verifying, "_KNOWN_KEYS_READ_MAX", 25)
    for number in range(60):
        add_key(admin, user, f"k{number}")
    verify = VerifyTrail(StoredSealedTrail(pool), READER, StoredKeyTable(pool))
    counts, after = list[int](), None
    while True:
        report = await verify.compare_keys(after, keys_max=20)
        assert report is not None
        assert report.differences == 0
        counts.append(report.compared)
        if not report.next_after:
            break
        after = UUID(report.next_after)
    assert counts == [25, 25, 10]
    with psycopg.connect(admin.info.dsn, password=admin.info.password, autocommit=True) as other:
        other.execute("SET session_replication_role = replica")
        other.execute("DELETE FROM cryptography.keys")
    online, offline = await reports(pool)
    assert (online.differences, offline.differences) == (60, 60)
    assert {each.difference for each in (*online.findings, *offline.findings)} == {"KEY_MISSING"}


async def test_uses_and_moves_of_the_service_fit(pool: Pool) -> None:
    user = await make_user(pool, "ada")
    key = await make_key(pool, user, max_usage_count=10)
    assert await agreed(pool) == []
    lifecycle = StoredLifecycle(pool, RECORDS)
    for move in (Move.DEACTIVATE, Move.REACTIVATE, Move.COMPROMISE, Move.REVOKE, Move.SCHEDULE_DESTRUCTION):
        await lifecycle.move(a_call(user), key.identity.key_id, move, Change(), version=None)
        assert await agreed(pool) == []


async def test_of_very_many_uses_the_highest_number_counts_though_a_clock_was_set_back(
    pool: Pool, admin: psycopg.Connection[Any]
) -> None:
    key = add_key(admin, add_user(admin), "k")
    admin.execute(
        """
        INSERT INTO audit.security_events (event_type, severity, resource_type, resource_id, created_at, event_details)
        SELECT 'key.used', 'low', 'key', %s, now() - n * interval '1 microsecond', jsonb_build_object('use_number', n)
        FROM generate_series(1, %s) AS n
        """,
        (key, key_table.USES_READ_MAX + 1),
    )
    admin.execute("UPDATE cryptography.keys SET usage_counter = %s WHERE id = %s", (key_table.USES_READ_MAX + 1, key))
    assert await agreed(pool) == []
    admin.execute("UPDATE cryptography.keys SET usage_counter = usage_counter - 1 WHERE id = %s", (key,))
    online, offline = await reports(pool)
    assert [each.column for each in offline.findings] == ["usage_counter"]
    # The newest by time have the lower numbers: only an export shows this one.
    assert [each.column for each in online.findings] == []


async def test_a_key_that_was_used_by_a_forged_entry_is_compared_all_the_same(pool: Pool, admin: psycopg.Connection[Any]) -> None:
    key = add_key(admin, add_user(admin), "k")
    for number in ("1e400", "-1e400", '"x"', "null"):
        admin.execute(FORGED, (key, f'{{"use_number": {number}}}'))
    assert [each.column for each in (await reports(pool))[0].findings] == ["usage_counter"]


async def test_what_a_restore_and_its_journal_do_to_keys_fits(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    user = add_user(admin)
    names = ("plain", "limited", "aes", "due", "aes-due")
    keys = {name: add_key(admin, user, name, max_usage_count=9 if name == "limited" else None) for name in names}
    admin.execute("UPDATE cryptography.keys SET destruction_scheduled_at = now() WHERE key_name LIKE '%%due'")
    journal = Journal(tmp_path / "journal")
    journal.append(Event.KEY_REVOKED, uuid4(), occurred_at=datetime.now(UTC), reason="")
    file, _ = backup(database.admin_dsn, tmp_path / "one", [tmp_path / "journal"])
    journal.append(Event.KEY_REVOKED, keys["plain"], occurred_at=datetime.now(UTC), reason="")
    other = f"restored_{uuid4().hex[:8]}"
    try:
        restore(postgres.superuser_dsn(other), file, [tmp_path / "journal"], mac=mac)
        dsn = make_conninfo(postgres.superuser_dsn(other), user="kms_service", password=postgres.service_password())
        async with open_pool(dsn, 2) as restored:
            assert await agreed(restored) == []
            online, offline = await reports(restored)
            assert online.compared == offline.compared == len(names)
            with psycopg.connect(postgres.superuser_dsn(other), autocommit=True) as connection:
                connection.execute("SET session_replication_role = replica")
                connection.execute(
                    "UPDATE cryptography.keys SET key_status = 'active', revoked_at = NULL WHERE key_name = 'plain'"
                )
            assert await agreed(restored) == [("KEY_DIFFERS", "key_status"), ("KEY_DIFFERS", "revoked_at")]
    finally:
        with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {other} WITH (FORCE)".encode())


async def test_a_recovery_to_a_moment_fits(pool: Pool, admin: psycopg.Connection[Any]) -> None:
    add_key(admin, add_user(admin), "aes")
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=False, mac=mac)
    assert await agreed(pool) == []
