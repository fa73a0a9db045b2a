"""Whoever has the password of the service's login changes that login by SQL. The service takes nothing from it and says so."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, LiteralString

import psycopg
import pytest
from psycopg import sql

from kms.dev.postgres import EmbeddedPostgres
from kms.domain.errors import KmsError, Reason
from kms.store.batches import connect
from kms.store.changes import heard
from kms.store.login_settings import LOGIN_SETTINGS, OWN_SETTINGS
from kms.store.pool import AS_JOB, BEFORE_LOGIN, Pool, connection_settings, open_pool
from tests.fixtures.postgres import Database, cloned

SERVICE: Final = "kms_service"
LIBRARY: Final = "local_preload_libraries"


@pytest.fixture
def own(postgres: EmbeddedPostgres) -> Iterator[Database]:
    """A database whose service login the test may alter: it has no settings again afterwards."""
    with cloned(postgres) as database:
        try:
            yield database
        finally:
            reset(database)


def reset(database: Database) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        for role in (SERVICE, "job_runner", "authenticated_users"):
            connection.execute(sql.SQL("ALTER ROLE {} RESET ALL").format(sql.Identifier(role)))
            name = sql.Identifier(database.name)
            connection.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} RESET ALL").format(sql.Identifier(role), name))


def as_service(database: Database, *statements: LiteralString) -> None:
    """Run the statements as the service's login, as one does who stole its password."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


ALTERATIONS: Final[dict[str, tuple[LiteralString, ...]]] = {
    "kms_service: search_path": ("ALTER ROLE kms_service SET search_path = evil, pg_catalog",),
    "kms_service: row_security": ("ALTER ROLE kms_service SET row_security = off",),
    "kms_service: role": ("ALTER ROLE CURRENT_USER SET role = job_runner",),
    "kms_service: default_transaction_read_only": ("ALTER ROLE kms_service SET default_transaction_read_only = on",),
    "kms_service: transform_null_equals": ("ALTER ROLE kms_service SET transform_null_equals = on",),
    "kms_service: enable_indexscan": (
        """DO $$ BEGIN EXECUTE
            format('ALTER ROLE kms_service IN DATABASE %I SET enable_indexscan = off', current_database());
        END $$""",
    ),
    "job_runner: search_path": ("SET ROLE job_runner", "ALTER ROLE job_runner SET search_path = evil"),
}


@contextmanager
def refused(setting: str) -> Iterator[None]:
    with pytest.raises(KmsError) as caught:
        yield
    role = setting.partition(":")[0]
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert setting in caught.value.message
    assert f"ALTER ROLE {role} RESET ALL;" in caught.value.message


async def open_and_close(dsn: str) -> None:
    async with open_pool(dsn, 1):
        pass


@pytest.mark.parametrize("setting", ALTERATIONS)
async def test_a_login_that_was_given_settings_is_refused_and_the_remedy_is_named(own: Database, setting: str) -> None:
    as_service(own, *ALTERATIONS[setting])
    with refused(setting):
        await open_and_close(own.dsn)
    with refused(setting):
        await connect(connection_settings(own.dsn), seconds=30)
    reset(own)
    await open_and_close(own.dsn)
    await (await connect(connection_settings(own.dsn), seconds=30)).close()


async def test_a_setting_made_while_the_service_runs_is_in_no_session_that_answers(own: Database) -> None:
    """Sessions that are open go on as they are. A new one is refused until the setting is gone, and the pool recovers then."""
    path: LiteralString = "SELECT current_setting('search_path') AS path, pg_backend_pid() AS pid"
    async with open_pool(own.dsn, 1, wait_seconds=1) as pool:
        before = (await pool.fetch(AS_JOB, path))[0]
        as_service(own, "ALTER ROLE kms_service SET search_path = evil, pg_catalog")
        assert await pool.fetch(AS_JOB, path) == [before]
        end_session(own, before["pid"])
        with pytest.raises(KmsError) as caught:
            await pool.fetch(AS_JOB, path)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        reset(own)
        after = await answered(pool, path)
        assert (after["path"], after["path"]) == (before["path"], "pg_catalog, pg_temp")


def end_session(database: Database, pid: int) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        assert connection.execute("SELECT pg_terminate_backend(%s, 60000)", (pid,)).fetchone() == (True,)


async def answered(pool: Pool, query: LiteralString) -> dict[str, object]:
    async with asyncio.timeout(100):
        while True:
            try:
                return (await pool.fetch(AS_JOB, query))[0]
            except KmsError:
                await asyncio.sleep(0.1)


def test_a_setting_that_was_taken_back_after_the_session_began_is_still_found(own: Database) -> None:
    as_service(own, "ALTER ROLE kms_service SET enable_seqscan = off")
    with psycopg.connect(own.dsn, autocommit=True) as connection:
        reset(own)
        connection.execute(OWN_SETTINGS)
        assert connection.execute(LOGIN_SETTINGS).fetchone() == (["kms_service: enable_seqscan"],)


def test_what_a_session_depends_on_it_sets_itself_whatever_its_login_says(own: Database) -> None:
    as_service(
        own,
        "ALTER ROLE kms_service SET search_path = evil, pg_catalog",
        "ALTER ROLE kms_service SET row_security = off",
        "ALTER ROLE kms_service SET role = job_runner",
        "ALTER ROLE kms_service SET synchronous_commit = off",
        "ALTER ROLE kms_service SET bytea_output = 'escape'",
        "ALTER ROLE kms_service SET default_transaction_read_only = on",
    )
    shown = b"""
        SELECT current_user::text, current_setting('search_path'), current_setting('row_security'),
            current_setting('synchronous_commit'), current_setting('bytea_output'), current_setting('transaction_read_only')
    """
    with psycopg.connect(own.dsn, autocommit=True) as connection:
        before = connection.execute(shown).fetchone()
        assert before == ("job_runner", "evil, pg_catalog", "off", "off", "escape", "on")
        connection.execute(OWN_SETTINGS)
        after = connection.execute(shown).fetchone()
        assert after == (SERVICE, "pg_catalog, pg_temp", "on", "on", "hex", "off")


async def test_the_listener_hears_nothing_over_a_session_with_settings_of_the_login_and_hears_again(own: Database) -> None:
    listening = b"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
    as_service(own, "ALTER ROLE kms_service SET search_path = evil")
    dropped = asyncio.Event()

    async def heard_something() -> bool:
        try:
            await asyncio.wait_for(dropped.wait(), 2)
        except TimeoutError:
            return False
        return True

    async with heard(own.dsn, {"key": lambda _: dropped.set(), "user": lambda _: None}):
        assert not await heard_something()
        reset(own)
        async with asyncio.timeout(100):
            await dropped.wait()
        with psycopg.connect(own.admin_dsn) as connection:
            assert connection.execute(listening).fetchone() == (1,)


async def test_a_library_that_the_login_wants_locks_the_login_out_and_never_runs(own: Database) -> None:
    """PostgreSQL loads no library for it but those in its plugins directory. What remains is a denial of service."""
    as_service(own, "ALTER ROLE kms_service SET local_preload_libraries = 'no_such_library'")
    with pytest.raises(KmsError) as caught:
        await open_and_close(own.dsn)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    reset(own)
    await open_and_close(own.dsn)


@pytest.mark.parametrize(
    "alteration",
    [
        "ALTER ROLE kms_service SUPERUSER",
        "ALTER ROLE kms_service BYPASSRLS",
        "ALTER ROLE kms_service CREATEROLE",
        "ALTER ROLE kms_service REPLICATION",
        "ALTER ROLE kms_service VALID UNTIL 'infinity'",
        "ALTER ROLE kms_service CONNECTION LIMIT 1",
        "ALTER ROLE kms_service NOLOGIN",
        "ALTER ROLE kms_service SET session_replication_role = replica",
        "ALTER ROLE kms_service SET session_preload_libraries = 'x'",
        "ALTER ROLE kms_service SET log_statement = 'none'",
        "ALTER ROLE kms_ledger SET search_path = evil",
        "ALTER ROLE postgres SET search_path = evil",
        "GRANT kms_ledger TO kms_service",
        "REVOKE admin_users FROM kms_service",
        "SET session_replication_role = replica",
        "SET SESSION AUTHORIZATION postgres",
        "SET ROLE kms_ledger",
        "CREATE SCHEMA evil",
        "CREATE TEMPORARY TABLE keys (id uuid)",
        "CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql RETURN pg_catalog.now()",
        "ALTER SYSTEM SET work_mem = '1GB'",
        "SELECT 1 FROM pg_catalog.pg_authid",
    ],
)
def test_postgresql_refuses_the_login_everything_else(own: Database, alteration: LiteralString) -> None:
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue)):
        as_service(own, alteration)


async def test_the_login_can_lock_the_service_out_by_its_password_and_no_more(own: Database) -> None:
    """This PostgreSQL cannot prevent. `docs/threats.md` says how an operator takes the effect away."""
    stored = b"SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = 'kms_service'"
    with psycopg.connect(own.admin_dsn, autocommit=True) as connection:
        row = connection.execute(stored).fetchone()
        assert row is not None
        async with open_pool(own.dsn, 1) as pool:
            await answered(pool, "SELECT 1 AS one")
            as_service(own, "ALTER ROLE kms_service PASSWORD 'stolen'")
            try:
                assert await pool.fetch(BEFORE_LOGIN, "SELECT 1 AS one") == [{"one": 1}]  # who is in, stays in
                with pytest.raises(KmsError) as caught:
                    await open_and_close(own.dsn)
                assert caught.value.reason is Reason.STORE_UNAVAILABLE
            finally:
                connection.execute(sql.SQL("ALTER ROLE kms_service PASSWORD {}").format(sql.Literal(row[0])))
        await open_and_close(own.dsn)
