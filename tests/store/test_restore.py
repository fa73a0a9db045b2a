"""A restored database is what was dumped, in a new epoch; whatever fails, it is not there, and nothing was touched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kms.app.records import Records
from kms.dev.postgres import EmbeddedPostgres, temporary_postgres
from kms.domain.algorithms import KeyType
from kms.domain.errors import KmsError, Reason
from kms.domain.lifecycle import Change, Move
from kms.domain.secret import Secret
from kms.store.backup import backup, connected
from kms.store.backup_catalog import read_catalog, read_properties, read_roles
from kms.store.backup_file import seal
from kms.store.epoch import Cause, begin_epoch, check_epoch, confirm_key, continue_epoch, current_epoch, unconfirmed_keys
from kms.store.journal import Event, Journal, changed_line, read_journal, superseded_line
from kms.store.lifecycle import StoredLifecycle
from kms.store.migrate import check, set_service_password
from kms.store.pool import Pool, connection_settings, open_pool
from kms.store.restore import drilled, restore, scratch_database
from tests.fixtures.postgres import Database
from tests.store.backup_rows import add_key, add_session, add_user, states
from tests.store.records import RECORDS, mac
from tests.store.uses import a_call, make_key, make_user

SOON = datetime.now(UTC) + timedelta(days=20)
PAST = datetime.now(UTC) - timedelta(minutes=1)


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def other(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The connection string of a database that is not there."""
    name = f"restored_{uuid4().hex[:8]}"
    yield postgres.superuser_dsn(name)
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


@contextmanager
def on(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(KmsError) as caught:
        work()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value.message


def databases(postgres: EmbeddedPostgres) -> set[str]:
    with on(postgres.superuser_dsn()) as connection:
        return {name for (name,) in connection.execute(b"SELECT datname::text FROM pg_database")}


def service_dsn(dsn: str, postgres: EmbeddedPostgres) -> str:
    return make_conninfo(dsn, user="kms_service", password=postgres.service_password())


def test_what_is_restored_is_what_was_dumped(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    add_key(admin, add_user(admin), "payments")
    file, manifest = backup(database.admin_dsn, tmp_path / "one", [tmp_path / "journal"])
    restored = restore(other, file, [tmp_path / "journal"], mac=mac)
    assert (restored.rows, restored.applied, restored.roles_made) == (sum(manifest.rows.values()), (), ())
    with on(other) as connection:
        assert read_catalog(connection).objects == manifest.catalog
        assert read_properties(connection).acl == manifest.properties.acl
        assert read_properties(connection).owner == manifest.properties.owner
        assert read_roles(connection) == (manifest.roles, manifest.memberships)
        row = connection.execute(b"SELECT key_name, encrypted_private_key FROM cryptography.keys").fetchone()
        may_make_large_objects = connection.execute(b"SELECT has_function_privilege('kms_service', 'lo_create(oid)', 'EXECUTE')")
        assert may_make_large_objects.fetchone() == (False,)
    assert row == ("payments", "x")
    assert check(other) == []


@pytest.mark.slow
def test_a_server_that_never_had_the_roles_gets_them_first(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    add_key(admin, add_user(admin), "payments")
    file, manifest = backup(database.admin_dsn, tmp_path / "one")
    with temporary_postgres() as bare:
        restored = restore(bare.superuser_dsn("kms"), file, mac=mac)
        assert {"kms_service", "kms_lifecycle"} < set(restored.roles_made)
        with on(bare.superuser_dsn("kms")) as connection:
            assert read_roles(connection) == (manifest.roles, manifest.memberships)
        set_service_password(bare.superuser_dsn(), Secret(b"new"))
        with on(make_conninfo(bare.superuser_dsn("kms"), user="kms_service", password="new")) as service:  # noqa: S106  # of this test
            service.execute(b"SET ROLE admin_users")
            assert service.execute(b"SELECT key_name FROM cryptography.keys").fetchall() == [("payments",)]


def test_a_role_that_may_do_more_here_is_refused(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    admin.execute(b"CREATE ROLE mighty NOLOGIN")
    try:
        admin.execute(b"GRANT USAGE ON SCHEMA public TO mighty")
        file, _ = backup(database.admin_dsn, tmp_path / "one")
        admin.execute(b"ALTER ROLE mighty BYPASSRLS LOGIN")
        before = databases(postgres)
        assert 'the role "mighty" exists here and may do more than it did: BYPASSRLS, LOGIN' in refused(
            lambda: restore(other, file, mac=mac)
        )
        assert databases(postgres) == before
    finally:
        admin.execute(b"DROP OWNED BY mighty")
        admin.execute(b"DROP ROLE mighty")


def test_an_empty_database_of_that_name_is_taken(database: Database, other: str, tmp_path: Path) -> None:
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    with on(database.admin_dsn) as connection:
        connection.execute(f"CREATE DATABASE {psycopg.conninfo.conninfo_to_dict(other)['dbname']}".encode())
    restore(other, file, mac=mac)
    assert check(other) == []


def test_nothing_is_restored_over_a_database_that_holds_anything(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    add_user(admin)
    before = databases(postgres)
    assert "is not empty, and nothing is restored over it" in refused(lambda: restore(database.admin_dsn, file, mac=mac))
    assert databases(postgres) == before
    assert admin.execute(b"SELECT count(*) FROM authentication.users").fetchone() == (1,)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (b"DELETE FROM cryptography.keys", "cryptography.keys has 0 rows instead of 1"),
        (b"DROP POLICY keys_own_data ON cryptography.keys", "policy cryptography.keys.keys_own_data is missing"),
        (b"ALTER POLICY keys_own_data ON cryptography.keys USING (TRUE)", "policy cryptography.keys.keys_own_data is another"),
        (b"ALTER TABLE cryptography.keys NO FORCE ROW LEVEL SECURITY", "relation cryptography.keys is another"),
        (b"GRANT DELETE ON cryptography.keys TO admin_users", "relation cryptography.keys is another"),
        (b"GRANT UPDATE (version) ON cryptography.keys TO admin_users", "column cryptography.keys.version is another"),
        (b"ALTER TABLE cryptography.epochs OWNER TO kms_login", "relation cryptography.epochs is another"),
        (
            b"ALTER FUNCTION cryptography.begin_first_epoch OWNER TO postgres",
            "function cryptography.begin_first_epoch(",
        ),
        (b"ALTER TABLE cryptography.keys DISABLE TRIGGER tr_keys_advance_version", "trigger cryptography.keys.tr_keys_advance"),
        (b"DROP INDEX cryptography.idx_keys_expires_at", "index cryptography.idx_keys_expires_at is missing"),
        (b"ALTER TABLE cryptography.keys DROP CONSTRAINT usage_within_limit", "usage_within_limit is missing"),
        (b"GRANT USAGE ON SCHEMA cryptography TO backup_reader", "schema cryptography is another"),
        (b"CREATE TABLE public.more ()", "relation public.more was not in it"),
    ],
)
def test_every_difference_is_told(admin: psycopg.Connection[Any], spoil: bytes, told: str) -> None:
    add_key(admin, add_user(admin), "payments")
    before = read_catalog(admin)
    with admin.transaction(force_rollback=True):
        admin.execute(b"CREATE ROLE backup_reader")
        admin.execute(spoil)
        found = before.differences(read_catalog(admin))
    assert any(told in each for each in found), found


def test_what_came_back_otherwise_is_dropped(
    postgres: EmbeddedPostgres, database: Database, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    before = databases(postgres)

    def spoiled(connection: psycopg.Connection[Any]) -> object:
        connection.execute(b"DROP POLICY keys_own_data ON cryptography.keys")
        return read_catalog(connection)

    monkeypatch.setattr("kms.store.restore.read_catalog", spoiled)
    assert "not what was dumped: policy cryptography.keys.keys_own_data is missing" in refused(
        lambda: restore(other, file, mac=mac)
    )
    assert databases(postgres) == before


@pytest.mark.parametrize(("made_of", "made_with"), [(18, 18), (16, 18)])
def test_a_server_that_is_too_old_for_the_backup_is_refused_before_anything_is_made(
    postgres: EmbeddedPostgres, database: Database, other: str, tmp_path: Path, made_of: int, made_with: int
) -> None:
    file, manifest = backup(database.admin_dsn, tmp_path / "one")
    newer = tmp_path / "newer"
    newer.write_bytes(file.read_bytes()[: manifest.dump_bytes])
    seal(newer, replace(manifest, server_version=made_of, client_version=made_with))
    before = databases(postgres)
    for work in (lambda: restore(other, newer, mac=mac), lambda: drilled(other, newer).__enter__()):
        assert f"made of PostgreSQL {made_of} with pg_dump of 18, and this server is PostgreSQL 17: restore it into" in refused(
            work
        )
    assert databases(postgres) == before


def test_a_login_that_cannot_restore_is_told_what_to_do(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    before = databases(postgres)
    admin.execute(b"CREATE ROLE nearly_mighty LOGIN BYPASSRLS CREATEDB CREATEROLE PASSWORD 'secret'")
    try:
        nearly_mighty = make_conninfo(other, user="nearly_mighty", password="secret")  # noqa: S106  # of this test
        for login in (service_dsn(other, postgres), nearly_mighty):
            assert "restoring takes a superuser" in refused(lambda: restore(login, file, mac=mac))  # noqa: B023  # called at once
    finally:
        admin.execute(b"DROP ROLE nearly_mighty")
    assert databases(postgres) == before


def test_an_interrupt_in_the_middle_of_a_statement_leaves_no_copy_of_the_keys(
    postgres: EmbeddedPostgres, database: Database, tmp_path: Path
) -> None:
    _, manifest = backup(database.admin_dsn, tmp_path / "one")
    settings, before = connection_settings(postgres.superuser_dsn()), databases(postgres)

    def interrupted() -> None:
        with connected(settings) as server, scratch_database(server, settings, manifest, "interrupted"):
            assert databases(postgres) != before
            server.pgconn.send_query(b"SELECT pg_sleep(60)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert databases(postgres) == before


def test_a_restore_begins_an_epoch_that_the_service_accepts(
    postgres: EmbeddedPostgres, database: Database, other: str, tmp_path: Path
) -> None:
    file, manifest = backup(database.admin_dsn, tmp_path / "one")
    assert restore(other, file, mac=mac).beginning.number == 1
    with on(other) as connection:
        row = connection.execute(b"SELECT cause, backup_created_at FROM cryptography.epochs").fetchone()
    assert row == ("RESTORED", datetime.fromisoformat(manifest.created_at))


async def test_a_database_that_was_never_served_begins_its_first_epoch(database: Database) -> None:
    async with open_pool(database.dsn, 1) as pool:
        assert await current_epoch(pool) is None
        await check_epoch(pool, RECORDS)
        await check_epoch(pool, RECORDS)
        epoch = await current_epoch(pool)
    assert epoch is not None
    assert (epoch.number, epoch.cause, epoch.is_here) == (1, "FIRST_START", True)


async def test_what_pg_restore_alone_made_is_not_served_until_an_epoch_is_begun(
    postgres: EmbeddedPostgres, database: Database, tmp_path: Path
) -> None:
    async with open_pool(database.dsn, 1) as pool:
        await check_epoch(pool, RECORDS)
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    with drilled(database.admin_dsn, file) as (dsn, _), on(dsn) as connection:
        connection.execute(b"DO $$BEGIN EXECUTE format('GRANT CONNECT ON DATABASE %I TO kms_service', current_database()); END$$")
        async with open_pool(service_dsn(dsn, postgres), 1) as pool:
            with pytest.raises(KmsError, match="Run `kms epoch begin`"):
                await check_epoch(pool, RECORDS)
            begin_epoch(connection, Cause.RECOVERED, [], is_complete=False, mac=mac)
            await check_epoch(pool, RECORDS)
            connection.execute(b"UPDATE cryptography.epochs SET timeline = '0000000A' WHERE number = 2")
            with pytest.raises(KmsError, match="begun without the token"):
                await check_epoch(pool, RECORDS)
            assert continue_epoch(connection, mac) == 3
            await check_epoch(pool, RECORDS)


def test_sessions_and_grants_do_not_come_back_nor_rows_of_any_table_that_says_so(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    owner, other_user = add_user(admin), add_user(admin)
    add_session(admin, owner)
    admin.execute(
        b"INSERT INTO cryptography.key_grants (owner_id, key_id, grantee_id, operations, granted_by)"
        b" VALUES (%s, %s, %s, '{sign}', %s)",
        (owner, add_key(admin, owner, "granted"), other_user, owner),
    )
    admin.execute(b"CREATE TABLE authentication.api_tokens AS SELECT 1 AS id")
    admin.execute(b"COMMENT ON TABLE authentication.api_tokens IS 'Emptied by a restore: revoked ones would come back.'")
    file, _ = backup(database.admin_dsn, tmp_path / "one")
    emptied = restore(other, file, mac=mac).beginning.emptied
    tables = {"authentication.api_tokens", "authentication.user_sessions", "cryptography.key_grants"}
    assert tables <= set(emptied)
    with on(other) as connection:
        for table in tables:
            assert connection.execute(b"SELECT count(*) FROM " + table.encode()).fetchone() == (0,)


def some_keys(admin: psycopg.Connection[Any], owner: UUID) -> dict[str, UUID]:
    """Add a key of each standing; return them by name."""
    inactive: dict[str, Any] = {"max_usage_count": 10, "key_status": "inactive"}
    kinds: dict[str, dict[str, Any]] = {
        "free": {},
        "limited": {"max_usage_count": 10, "usage_counter": 3},
        "limited-inactive": {**inactive, "deactivated_at": PAST},
        "limited-superseded": {**inactive, "superseded_at": PAST},
        "limited-revoked": {"max_usage_count": 10, "revoked_at": PAST, "key_status": "revoked"},
        "limited-pending": {"max_usage_count": 10, "destruction_scheduled_at": SOON},
        "limited-due": {"max_usage_count": 10, "destruction_scheduled_at": PAST},
        "aes": {},
    }
    return {name: add_key(admin, owner, name, **columns) for name, columns in kinds.items()}


IN_DOUBT = {"limited", "limited-inactive", "limited-pending", "limited-due", "aes"}


def test_with_its_journal_keys_whose_uses_are_counted_come_back_inactive(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    keys = some_keys(admin, add_user(admin))
    before = states(admin)
    Journal(tmp_path / "journal").append(Event.KEY_REVOKED, uuid4(), occurred_at=PAST, reason="")
    file, _ = backup(database.admin_dsn, tmp_path / "one", [tmp_path / "journal"])
    beginning = restore(other, file, [tmp_path / "journal"], mac=mac).beginning
    assert (beginning.unconfirmed, beginning.deactivated) == (5, 4)
    with on(other) as connection:
        assert states(connection) == before | {
            "limited": "inactive",
            "aes": "inactive",
            "limited-due": "pending_destruction",
        }
        waiting = connection.execute(b"SELECT key_id, deactivated_by_restore FROM cryptography.restored_keys").fetchall()
        pending = connection.execute(
            b"SELECT deactivated_at FROM cryptography.keys WHERE key_name = 'limited-pending'"
        ).fetchone()
    assert dict(waiting) == {keys[name]: name != "limited-inactive" for name in IN_DOUBT}
    assert pending != (None,), "it could be spared its destruction, and would be active again"


def test_a_destruction_that_may_have_been_cancelled_since_the_backup_is_put_off(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    key = add_key(admin, add_user(admin), "spared", destruction_scheduled_at=SOON)
    journal = Journal(tmp_path / "journal")
    journal.append(Event.KEY_REVOKED, uuid4(), occurred_at=PAST, reason="")
    file, _ = backup(database.admin_dsn, tmp_path / "one", [journal.path])
    restore(other, file, [journal.path], mac=mac)
    with on(other) as connection:
        connection.execute(b"UPDATE cryptography.keys SET destruction_scheduled_at = '2020-01-01'")
        begin_epoch(connection, Cause.RESTORED, [], is_complete=True, mac=mac)
        query = b"SELECT destruction_scheduled_at > now() + interval '6 days', destroyed_at FROM cryptography.keys WHERE id = %s"
        assert connection.execute(query, (key,)).fetchone() == (True, None)


_LOSSES = [
    (True, True, False),
    pytest.param(True, False, True, marks=pytest.mark.slow),
    pytest.param(False, True, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("written", "recorded", "given"), _LOSSES)
def test_without_its_journal_every_key_comes_back_inactive(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path, *, written: bool, recorded: bool, given: bool
) -> None:
    some_keys(admin, add_user(admin))
    journal = Journal(tmp_path / "journal")
    if written:
        journal.append(Event.KEY_REVOKED, uuid4(), occurred_at=PAST, reason="")
    file, _ = backup(database.admin_dsn, tmp_path / "one", [journal.path] if recorded else [])
    # A journal that the backup did not know may be anybody's; to one that tells of nothing perhaps nobody writes.
    assert restore(other, file, [journal.path] if given else [], mac=mac).beginning.unconfirmed == 6
    with on(other) as connection:
        assert "active" not in states(connection).values()


def test_a_journal_whose_end_is_lost_is_refused_before_anything_is_made(
    postgres: EmbeddedPostgres, database: Database, other: str, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(Event.KEY_REVOKED, uuid4(), occurred_at=PAST, reason="")
    file, _ = backup(database.admin_dsn, tmp_path / "one", [journal.path])
    journal.path.write_text(journal.path.read_text().splitlines(keepends=True)[0])
    before = databases(postgres)
    assert "its end is lost" in refused(lambda: restore(other, file, [journal.path], mac=mac))
    assert databases(postgres) == before


def test_the_journal_is_replayed(database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path) -> None:
    owner = add_user(admin)
    keys = {name: add_key(admin, owner, name) for name in ("revoked", "compromised", "both", "destroyed", "spared")}
    certificate = uuid4()
    query = b"""
        INSERT INTO cryptography.certificates (
            id, user_id, key_id, certificate_type, certificate_data, fingerprint, profile, issuance_status, tbs_sha256,
            spki_sha256, record_mac
        ) VALUES ($1, $2, $3, 'x509', 'x', '00', 'server', 'imported', sha256(''), sha256(''), sha256(''))
    """
    psycopg.RawCursor(admin).execute(query, [certificate, owner, keys["spared"]])
    file, _ = backup(database.admin_dsn, tmp_path / "one", [tmp_path / "journal"])
    journal = Journal(tmp_path / "journal")
    told = [
        (Event.KEY_REVOKED, keys["revoked"]),
        (Event.KEY_REVOKED, keys["revoked"]),
        (Event.KEY_COMPROMISED, keys["compromised"]),
        (Event.KEY_COMPROMISED, keys["both"]),
        (Event.KEY_REVOKED, keys["both"]),
        (Event.KEY_DESTROYED, keys["destroyed"]),
        (Event.CERTIFICATE_REVOKED, certificate),
        (Event.USER_DISABLED, owner),
        (Event.KEY_REVOKED, uuid4()),  # made after the backup
    ]
    for minutes, (event, subject) in enumerate(told):
        journal.append(event, subject, occurred_at=PAST + timedelta(minutes=minutes), reason="lost")
    replayed = restore(other, file, [journal.path], mac=mac).beginning.replayed
    assert [replayed[event] for event in (Event.KEY_REVOKED, Event.KEY_COMPROMISED, Event.KEY_DESTROYED)] == [2, 1, 1]
    with on(other) as connection:
        found = states(connection)
        assert found == {
            "revoked": "revoked",
            "compromised": "compromised",
            "both": "revoked",
            "destroyed": "destroyed",
            "spared": "active",
        }
        row = connection.execute(b"SELECT revoked_at FROM cryptography.keys WHERE key_name = 'revoked'").fetchone()
        assert row == (PAST,), "the first telling counts"
        row = connection.execute(b"SELECT encrypted_private_key FROM cryptography.keys WHERE key_name = 'destroyed'").fetchone()
        assert row == ("",)
        row = connection.execute(b"SELECT revocation_status FROM cryptography.certificates").fetchone()
        assert row == ("revoked",)
        query = b"SELECT id FROM authentication.find_user_by_uri($1)"
        assert psycopg.RawCursor(connection).execute(query, [owner]).fetchall() == []


async def test_a_key_that_was_changed_after_the_backup_waits_for_its_confirmation(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    owner = add_user(admin)
    before, after, _ = (add_key(admin, owner, name) for name in ("before", "after", "untouched"))
    journals = [Journal(tmp_path / "one-machine"), Journal(tmp_path / "another")]
    for journal in journals:
        journal.write(changed_line(before, 2, occurred_at=PAST, what="deactivate"))
    file, _ = backup(database.admin_dsn, tmp_path / "one", [journal.path for journal in journals])
    journals[1].write(changed_line(after, 2, occurred_at=PAST, what="deactivate"))
    beginning = restore(other, file, [journal.path for journal in journals], mac=mac).beginning
    assert (beginning.unconfirmed, beginning.deactivated) == (1, 1)
    async with open_pool(service_dsn(other, postgres), 1) as pool:
        assert [each.key_id for each in await unconfirmed_keys(pool)] == [after]
        with on(other) as connection:
            assert states(connection) == {"before": "active", "after": "inactive", "untouched": "active"}
        assert await confirm_key(pool, RECORDS, after, 3), "without a limit the count is that of its uses"
    with on(other) as connection:
        assert states(connection)["after"] == "active"


def test_a_rotation_that_the_backup_does_not_have_is_told(
    database: Database, admin: psycopg.Connection[Any], other: str, tmp_path: Path
) -> None:
    owner, lost = add_user(admin), [uuid4(), uuid4()]
    before = add_key(admin, owner, "before", key_status="inactive", superseded_at=PAST)
    once, twice, untold = (add_key(admin, owner, name) for name in ("once", "twice", "untold"))
    journals = [Journal(tmp_path / "one-machine"), Journal(tmp_path / "another")]
    file, _ = backup(database.admin_dsn, tmp_path / "one", [journal.path for journal in journals])
    for key, successor in ((before, once), (once, lost[0]), (twice, uuid4()), (lost[0], lost[1])):
        journals[0].write(superseded_line(key, 2, successor, occurred_at=PAST))
    # As the follower writes it, who does not know the successor.
    for key in (once, untold):
        journals[1].write(changed_line(key, 2, occurred_at=PAST, what="key.superseded: old successor=x"))
    beginning = restore(other, file, [journal.path for journal in journals], mac=mac).beginning
    assert beginning.superseded == (once, twice, untold)
    assert beginning.lost_successors[::2] == (lost[0], lost[1])
    assert len(beginning.lost_successors) == 3
    with on(other) as connection:
        assert states(connection) == {"before": "inactive", "once": "inactive", "twice": "inactive", "untold": "inactive"}


async def test_an_administrator_confirms_a_key_with_a_count(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    keys = some_keys(admin, add_user(admin))
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    async with open_pool(database.dsn, 1) as pool:
        assert {each.key_id for each in await unconfirmed_keys(pool)} == {keys[name] for name in IN_DOUBT}
        for count in (2, 11, 2**80):
            with pytest.raises(KmsError) as caught:
                await confirm_key(pool, RECORDS, keys["limited"], count)
            assert caught.value.reason is Reason.MALFORMED
        assert await confirm_key(pool, RECORDS, keys["limited"], 7)
        with pytest.raises(KmsError) as caught:
            await confirm_key(pool, RECORDS, keys["aes"], 2**32 + 1)
        assert caught.value.reason is Reason.MALFORMED
        assert not await confirm_key(pool, RECORDS, keys["aes"], 2**32), "at its limit"
        assert not await confirm_key(pool, RECORDS, keys["limited-inactive"], 1)
        with pytest.raises(KmsError) as caught:
            await confirm_key(pool, RECORDS, keys["limited"], 8)
        assert caught.value.reason is Reason.KEY_NOT_FOUND
        assert {each.key_id for each in await unconfirmed_keys(pool)} == {keys["limited-pending"], keys["limited-due"]}
    found = states(admin)
    assert (found["limited"], found["aes"], found["limited-inactive"]) == ("active", "inactive", "inactive")
    assert admin.execute(b"SELECT usage_counter FROM cryptography.keys WHERE key_name = 'limited'").fetchone() == (7,)


async def test_a_key_that_changes_while_it_is_confirmed_is_stale(database: Database, admin: psycopg.Connection[Any]) -> None:
    key = add_key(admin, add_user(admin), "aes")
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)

    async def change_and_mac(data: bytes) -> bytes:
        admin.execute(b'UPDATE cryptography.keys SET metadata = \'{"a": "b"}\' WHERE id = %s', (key,))
        return mac(data)

    async with open_pool(database.dsn, 1) as pool:
        with pytest.raises(KmsError) as caught:
            await confirm_key(pool, Records(change_and_mac, RECORDS.clock), key, 0)
    assert caught.value.reason is Reason.STALE


async def test_what_a_restore_does_to_a_key_has_the_reason_restored(
    store: Pool, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    user = await make_user(store, "alice")
    key, revoked = await make_key(store, user, KeyType.AES), await make_key(store, user)
    journal = Journal(tmp_path / "journal")
    journal.append(Event.KEY_REVOKED, revoked.identity.key_id, occurred_at=PAST, reason="lost")
    begin_epoch(admin, Cause.RESTORED, read_journal(journal.path), is_complete=True, mac=mac)
    domain = "SELECT event_type, event_data ->> 'reason' FROM audit.domain_events WHERE event_type <> 'key.created' ORDER BY 1"
    security = "SELECT event_type, event_details ->> 'reason' FROM audit.security_events WHERE event_type = 'key.deactivated'"
    assert admin.execute(domain).fetchall() == [("key.deactivated", "RESTORED"), ("key.revoked", "RESTORED")]
    assert admin.execute(security).fetchall() == [("key.deactivated", "RESTORED")]
    reactivate = StoredLifecycle(store, RECORDS).move(a_call(user), key.identity.key_id, Move.REACTIVATE, Change(), version=None)
    with pytest.raises(KmsError, match="was restored from a backup, and waits until an administrator confirms") as caught:
        await reactivate
    assert caught.value.reason is Reason.KEY_INACTIVE
    assert await confirm_key(store, RECORDS, key.identity.key_id, 5)
    row = admin.execute("SELECT event_data ->> 'reason' FROM audit.domain_events WHERE event_type = 'key.reactivated'").fetchone()
    assert row == (None,), "what was said of the restore is not said of what comes later"


def test_nobody_confirms_a_key_of_his_own(database: Database, admin: psycopg.Connection[Any]) -> None:
    owner = add_user(admin)
    key = add_key(admin, owner, "limited", max_usage_count=10)
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    with psycopg.connect(database.dsn) as service:
        service.execute("SELECT set_config('role', 'admin_users', true), set_config('app.user_id', %s, true)", (str(owner),))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="nobody confirms a key of his own"):
            service.execute("SELECT cryptography.confirm_restored_key(%s, 5, 2, NULL)", (key,))


def test_whatever_reactivates_keys_does_not_reactivate_one_that_waits(admin: psycopg.Connection[Any]) -> None:
    owner = add_user(admin)
    add_key(admin, owner, "limited", max_usage_count=10)
    add_key(admin, owner, "free", deactivated_at=PAST, key_status="inactive")
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    reactivate = "UPDATE cryptography.keys SET deactivated_at = NULL, key_status = 'active' WHERE key_name = %s"
    admin.execute(reactivate, ("free",))
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="waits until an administrator confirms"):
        admin.execute(reactivate, ("limited",))


async def test_a_key_that_waited_at_the_backup_waits_on_and_then_comes_back(
    database: Database, admin: psycopg.Connection[Any]
) -> None:
    key = add_key(admin, add_user(admin), "limited", max_usage_count=10)
    confirmed = add_key(admin, add_user(admin), "other", max_usage_count=10)
    begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    async with open_pool(database.dsn, 1) as pool:
        await confirm_key(pool, RECORDS, confirmed, 1)
        assert begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac).unconfirmed == 2
        assert {each.epoch for each in await unconfirmed_keys(pool)} == {2}
        assert await confirm_key(pool, RECORDS, key, 5)
        assert await confirm_key(pool, RECORDS, confirmed, 5)
    assert states(admin) == {"limited": "active", "other": "active"}


def test_an_epoch_begins_whole_or_not_at_all(admin: psycopg.Connection[Any], tmp_path: Path) -> None:
    owner = add_user(admin)
    add_session(admin, owner)
    key = add_key(admin, owner, "aes")
    journal = Journal(tmp_path / "journal")
    journal.append(Event.KEY_REVOKED, key, occurred_at=PAST, reason="")
    admin.execute(b"ALTER TABLE cryptography.restored_keys ADD CHECK (false)")
    with pytest.raises(psycopg.errors.CheckViolation):
        begin_epoch(admin, Cause.RECOVERED, read_journal(journal.path)[:0], is_complete=True, mac=mac)
    assert admin.execute(b"SELECT count(*) FROM authentication.user_sessions").fetchone() == (1,)
    assert admin.execute(b"SELECT count(*) FROM cryptography.epochs").fetchone() == (0,)
    assert states(admin) == {"aes": "active"}


def test_a_key_whose_change_was_swallowed_comes_back_without_a_mac(admin: psycopg.Connection[Any]) -> None:
    owner = add_user(admin)
    kept, swallowed = (add_key(admin, owner, name, max_usage_count=10) for name in ("kept", "swallowed"))
    admin.execute(b"""
        CREATE FUNCTION public.swallow() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN
            RETURN CASE WHEN NEW.key_name = 'swallowed' AND NEW.record_mac IS NOT NULL THEN NULL ELSE NEW END;
        END $$
    """)
    admin.execute(b"CREATE TRIGGER a_swallow BEFORE UPDATE ON cryptography.keys FOR EACH ROW EXECUTE FUNCTION public.swallow()")
    beginning = begin_epoch(admin, Cause.RECOVERED, [], is_complete=True, mac=mac)
    assert beginning.invalid == (swallowed,)
    found = dict(admin.execute(b"SELECT id, record_mac IS NULL FROM cryptography.keys").fetchall())
    assert found == {kept: False, swallowed: True}
