"""The pool: for whom it acts, whom it refuses, and what happens when the database goes away."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.errors import NoDataFound

from kms.dev.postgres import FAST_UNSAFE, EmbeddedPostgres, embedded_postgres
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.domain.secret import Secret
from kms.rotation.rotation import rotation_not_found
from kms.store.errors import NO_REFUSALS, Refusals
from kms.store.migrate import set_service_password
from kms.store.pool import ACT_AS, AS_ADMINISTRATOR, AS_JOB, BEFORE_LOGIN, Acting, Pool, as_user, check_server, open_pool
from tests.fixtures.clusters import Clusters, passable_directory
from tests.fixtures.postgres import Database, template_of
from tests.store.uses import make_user

WHO = "SELECT current_user::text AS role, current_setting('app.user_id') AS user_id"
CUT = b"""
    SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
    WHERE usename = 'kms_service' AND datname = current_database()
"""
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
ROLE_NOW = "SELECT current_user::text AS role, current_setting('app.user_id', true) AS user_id"


async def unavailable(dsn: str) -> str:
    with pytest.raises(KmsError) as caught:
        async with open_pool(dsn, 1):
            pass
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value.message


@pytest.mark.parametrize("acting", [AS_JOB, AS_ADMINISTRATOR, BEFORE_LOGIN, as_user(UserId(uuid4()))])
async def test_a_transaction_acts_for_whom_it_says_and_no_longer(database: Database, acting: Acting) -> None:
    expected = {"role": "kms_service" if acting is BEFORE_LOGIN else acting.role, "user_id": acting.user_id}
    async with open_pool(database.dsn, 1) as pool:
        assert await pool.fetch(acting, WHO) == [expected]
        async with pool.transaction(acting) as connection:
            assert await (await connection.execute(WHO)).fetchone() == expected
        after = (await pool._connections.getconn(),)
        assert await (await after[0].execute(ROLE_NOW)).fetchone() == {"role": "kms_service", "user_id": ""}
        await pool._connections.putconn(after[0])


async def test_users_at_once_never_mix(store: Pool) -> None:
    async def ask(user_id: UserId) -> None:
        rows = await store.fetch(as_user(user_id), "SELECT authentication.current_user_id() AS user_id")
        assert rows == [{"user_id": user_id}]

    await asyncio.gather(*(ask(UserId(uuid4())) for _ in range(100)))


async def test_a_block_that_raises_is_rolled_back(database: Database, store: Pool) -> None:
    async def change_and_raise() -> None:
        async with store.transaction(AS_ADMINISTRATOR) as connection:
            await (await connection.execute("SELECT authentication.create_service_user('signer')")).fetchone()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await change_and_raise()
    with psycopg.connect(database.admin_dsn) as connection:
        assert connection.execute(b"SELECT count(*) FROM authentication.users").fetchone() == (0,)


@contextmanager
def refused_with(cause: type[psycopg.Error]) -> Iterator[None]:
    """Expect STORE_UNAVAILABLE because of *cause*."""
    with pytest.raises(KmsError) as caught:
        yield
    assert (caught.value.reason, type(caught.value.__cause__)) == (Reason.STORE_UNAVAILABLE, cause)


async def test_an_error_at_commit_is_raised(database: Database, store: Pool) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(
            b"CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE unique_violation; END $$;"
            b"CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON authentication.users DEFERRABLE INITIALLY DEFERRED"
            b" FOR EACH ROW EXECUTE FUNCTION public.refuse()"
        )
    with refused_with(psycopg.errors.UniqueViolation):
        async with store.transaction(AS_ADMINISTRATOR) as connection:
            await (await connection.execute("SELECT authentication.create_service_user('signer')")).fetchone()
    assert await store.fetch(BEFORE_LOGIN, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_statement_that_was_sent_and_never_fetched_still_raises(store: Pool) -> None:
    with refused_with(psycopg.errors.DivisionByZero):
        async with store.transaction(AS_JOB) as connection:
            await connection.execute("SELECT 1/0")


async def test_a_caller_whose_standing_ended_is_refused_for_that_and_not_told_to_try_again(store: Pool) -> None:
    query = "SELECT cryptography.clear_rotation_policy('k', 1, 'r', '')"
    with pytest.raises(KmsError) as caught:
        await store.fetch(as_user(UserId(uuid4())), query)
    assert caught.value.reason is Reason.CREDENTIALS_INVALID


async def test_what_a_statement_raises_means_what_its_caller_says(store: Pool) -> None:
    user = await make_user(store, "caller")
    query = "SELECT cryptography.retry_rotation(gen_random_uuid(), %(version)s, 'r', '192.0.2.1')"
    refusals: Refusals = {NoDataFound: rotation_not_found}
    for said, reason in ((refusals, Reason.ROTATION_NOT_FOUND), (NO_REFUSALS, Reason.STORE_UNAVAILABLE)):
        with pytest.raises(KmsError) as caught:
            await store.fetch(as_user(user.user_id), query, {"version": user.version}, refusals=said)
        assert caught.value.reason is reason


async def test_a_confirmed_write_waits_for_the_disk(store: Pool) -> None:
    assert await store.fetch(BEFORE_LOGIN, "SELECT current_setting('synchronous_commit') AS value") == [{"value": "on"}]


async def test_a_read_is_one_transaction(store: Pool) -> None:
    query = "SELECT now() < statement_timestamp() AS began_before, pg_current_xact_id_if_assigned() AS number"
    assert await store.fetch(AS_JOB, query) == [{"began_before": True, "number": None}]


async def test_the_migration_login_is_refused(database: Database) -> None:
    assert "use kms_service" in await unavailable(database.admin_dsn)


@pytest.mark.parametrize(
    "power",
    [
        "ALTER ROLE probe BYPASSRLS",
        "ALTER ROLE probe CREATEROLE",
        "GRANT kms_login TO probe WITH INHERIT FALSE, SET TRUE",
        "GRANT admin_users TO probe WITH INHERIT TRUE",
        "CREATE SCHEMA probes AUTHORIZATION probe",
    ],
)
async def test_a_login_with_any_power_is_refused(database: Database, power: str) -> None:
    roles = "authenticated_users, admin_users, auditor_users, job_runner"
    dsn = database.dsn.replace("user=kms_service", "user=probe")
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(b"DROP ROLE IF EXISTS probe")
        connection.execute(b"CREATE ROLE probe LOGIN")
        connection.execute(f"GRANT {roles} TO probe WITH INHERIT FALSE, SET TRUE".encode())
        connection.execute(f"GRANT CONNECT ON DATABASE {database.name} TO probe".encode())
        password = dsn.partition("password='")[2].removesuffix("'")
        set_service_password(database.admin_dsn, Secret(password.encode()), role="probe")
        try:
            async with open_pool(dsn, 1) as pool:
                assert await pool.fetch(BEFORE_LOGIN, "SELECT 1 AS one") == [{"one": 1}]
            connection.execute(power.encode())
            assert "the login probe may do more" in await unavailable(dsn)
        finally:
            connection.execute(b"DROP OWNED BY probe CASCADE")
            connection.execute(b"DROP ROLE probe")


@pytest.mark.parametrize("owner", ["kms_service", "job_runner"])
async def test_a_login_that_owns_a_large_object_is_refused(database: Database, owner: str) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        row = connection.execute(b"SELECT lo_from_bytea(0, 'abc')").fetchone()
        assert row is not None
        try:
            async with open_pool(database.dsn, 1):
                pass
            connection.execute(f"ALTER LARGE OBJECT {row[0]} OWNER TO {owner}".encode())
            assert "owns large objects" in await unavailable(database.dsn)
        finally:
            connection.execute(f"SELECT lo_unlink({row[0]})".encode())


async def test_a_login_without_the_roles_is_told_to_migrate(database: Database) -> None:
    dsn = database.dsn.replace("user=kms_service", "user=bystander")
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(b"CREATE ROLE bystander LOGIN")
        connection.execute(f"GRANT CONNECT ON DATABASE {database.name} TO bystander".encode())
        set_service_password(database.admin_dsn, Secret(dsn.partition("password='")[2][:-1].encode()), role="bystander")
        try:
            assert "run `kms migrate`" in await unavailable(dsn)
        finally:
            connection.execute(b"DROP OWNED BY bystander")
            connection.execute(b"DROP ROLE bystander")


async def test_a_wrong_password_is_told_without_it(database: Database) -> None:
    message = await unavailable(database.dsn.partition(" password=")[0] + " password=hunter2")
    assert "password authentication failed" in message
    assert "hunter2" not in message


async def test_nobody_at_the_address_is_told_at_once() -> None:
    started = time.monotonic()
    assert "no connection to the database" in await unavailable("host=/nowhere user=kms_service dbname=kms")
    assert time.monotonic() - started < 1


async def test_a_server_that_may_lose_data_is_refused_unless_allowed(store: Pool) -> None:
    with pytest.raises(KmsError, match="fsync = on"):
        await check_server(store)
    await check_server(store, allow_unsafe=True)


async def test_too_many_callers_wait_and_then_are_refused(database: Database) -> None:
    async with open_pool(database.dsn, 1, wait_seconds=0.2) as pool, pool.transaction(AS_JOB):
        with pytest.raises(KmsError) as caught:
            await pool.fetch(AS_JOB, "SELECT 1 AS one")
        assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_cancelled_call_leaves_a_connection_that_works(database: Database) -> None:
    async with open_pool(database.dsn, 1) as pool:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pool.fetch(AS_JOB, "SELECT pg_sleep(30)")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), pool.transaction(AS_JOB) as connection:
                await (await connection.execute("SELECT pg_sleep(30)")).fetchall()
        assert await pool.fetch(BEFORE_LOGIN, "SELECT current_user::text AS role") == [{"role": "kms_service"}]
        assert time.monotonic() - started < 2


async def test_a_flood_of_cancelled_calls_loses_no_connection(database: Database) -> None:
    async with open_pool(database.dsn, 4) as pool:
        until = time.monotonic() + 2.0
        answers: list[str] = []
        short = itertools.cycle(n * 0.0003 for n in range(1, 14))
        longer = itertools.cycle(n * 0.0007 for n in range(1, 17))

        async def impatient() -> None:
            while time.monotonic() < until:
                with suppress(TimeoutError, KmsError):
                    async with asyncio.timeout(next(short)):
                        await pool.fetch(AS_JOB, "SELECT 1 AS one")
                with suppress(TimeoutError, KmsError):
                    async with asyncio.timeout(next(longer)), pool.transaction(AS_JOB) as connection:
                        await (await connection.execute("SELECT 1 AS one")).fetchall()
                await asyncio.sleep(0.001)

        async def patient(number: int) -> None:
            while time.monotonic() < until:
                rows = await pool.fetch(AS_JOB, "SELECT %(n)s::int AS n", {"n": number})
                answers.append("right" if rows == [{"n": number}] else f"wrong: {rows}")

        await asyncio.gather(*(impatient() for _ in range(8)), *(patient(number) for number in range(3)))
        assert set(answers) == {"right"}
        # As many at once as there are connections: none was lost. Each waits for a lock that nobody frees until all wait.
        with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_advisory_lock(4711)")
            waiting = [asyncio.create_task(pool.fetch(AS_JOB, "SELECT pg_advisory_lock_shared(4711)")) for _ in range(4)]
            while admin.execute(WAITING).fetchone() != (4,):  # noqa: ASYNC110  # no event here
                await asyncio.sleep(0.01)
            admin.execute("SELECT pg_advisory_unlock(4711)")
            await asyncio.gather(*waiting)


async def test_a_connection_cut_in_a_call_is_an_error_and_the_next_call_works(database: Database) -> None:
    async with open_pool(database.dsn, 2) as pool:
        sleeping = asyncio.create_task(pool.fetch(BEFORE_LOGIN, "SELECT pg_sleep(30)"))
        with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
            while not connection.execute(CUT + b" AND query ~ '^SELECT pg_sleep'").fetchall():  # noqa: ASYNC110  # no event here
                await asyncio.sleep(0.01)
        with pytest.raises(KmsError) as caught:
            await sleeping
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert await pool.fetch(BEFORE_LOGIN, "SELECT 1 AS one") == [{"one": 1}]


async def test_connections_that_were_cut_while_idle_are_not_handed_out(database: Database) -> None:
    async with open_pool(database.dsn, 4) as pool:
        await asyncio.gather(*(pool.fetch(BEFORE_LOGIN, "SELECT pg_sleep(0.05)") for _ in range(8)))
        with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
            assert len(connection.execute(CUT).fetchall()) >= 2
        for _ in range(8):
            assert await pool.fetch(BEFORE_LOGIN, "SELECT 1 AS one") == [{"one": 1}]


async def test_a_statement_whose_columns_changed_their_type_is_an_error_and_the_next_call_works(database: Database) -> None:
    ask = "SELECT occurred FROM audit.changed"
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute("CREATE TABLE audit.changed AS SELECT 1 AS occurred")
        admin.execute("GRANT SELECT ON audit.changed TO job_runner")
        async with open_pool(database.dsn, 1) as pool:
            assert await pool.fetch(AS_JOB, ask) == [{"occurred": 1}]
            admin.execute("ALTER TABLE audit.changed ALTER COLUMN occurred TYPE text")
            with pytest.raises(KmsError) as caught:
                await pool.fetch(AS_JOB, ask)
            assert caught.value.reason is Reason.STORE_UNAVAILABLE
            assert await pool.fetch(AS_JOB, ask) == [{"occurred": "1"}]


@pytest.fixture
def mortal_directory(clusters: Clusters) -> Iterator[Path]:
    """That of a migrated cluster, nobody else's."""
    with passable_directory() as own:
        clusters.copy_migrated(own)
        yield own


def kill(server: EmbeddedPostgres) -> None:
    """Kill the server as a power cut would: without a word."""
    postmaster = int((server.directory / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGKILL)


async def test_the_pool_survives_the_death_and_return_of_the_database(mortal_directory: Path) -> None:
    with embedded_postgres(mortal_directory, {**FAST_UNSAFE, "synchronous_commit": "on"}) as server:
        opened = open_pool(template_of(server).dsn, 4, wait_seconds=0.5)
        pool = await opened.__aenter__()
        await _until_it_answers(pool, seconds=60)
        kill(server)
        await asyncio.sleep(0.2)
    try:
        for _ in range(3):
            with pytest.raises(KmsError) as caught:
                await pool.fetch(AS_JOB, "SELECT 1 AS one")
            assert caught.value.reason is Reason.STORE_UNAVAILABLE
        with embedded_postgres(mortal_directory, FAST_UNSAFE):
            await asyncio.gather(*(_until_it_answers(pool, seconds=60) for _ in range(50)))
    finally:
        await opened.__aexit__(None, None, None)


async def _until_it_answers(pool: Pool, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            await pool.fetch(AS_JOB, "SELECT 1 AS one")
        except KmsError:
            assert time.monotonic() < deadline, "the pool did not recover"
        else:
            return


def test_every_transaction_begins_with_one_statement() -> None:
    assert ACT_AS.count("SELECT") == 1
