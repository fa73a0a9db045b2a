"""Migrations: once each, in order, by one runner at a time, and never over a database that disagrees."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.store.migrate import Applied, Migration, check, check_schema, migrate, migrations, pending, set_service_password
from kms.store.pool import Pool, open_pool
from tests.fixtures.clusters import Clusters
from tests.fixtures.postgres import Database

REPOSITORY = Path(__file__).parents[2]
SCHEMA = REPOSITORY / "schema"
NAMES = [migration.script_name for migration in migrations()]


@pytest.fixture(scope="module")
def bare(clusters: Clusters) -> Iterator[EmbeddedPostgres]:
    """A server on which nothing was ever migrated."""
    with clusters.empty() as server:
        yield server


@pytest.fixture
def empty(postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """The connection string of an empty database, on a server where the roles exist."""
    name = f"empty_{abs(hash(request.node.name))}"
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield postgres.superuser_dsn(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the migrations, to be tampered with."""
    return Path(shutil.copytree(SCHEMA, tmp_path / "schema"))


def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query.encode()).fetchall()


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(KmsError) as caught:
        work()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value.message


def test_an_empty_server_becomes_usable(bare: EmbeddedPostgres) -> None:
    with psycopg.connect(bare.superuser_dsn(), autocommit=True) as connection:
        connection.execute(b"CREATE DATABASE from_nothing")
    dsn = bare.superuser_dsn("from_nothing")
    assert check(dsn) == NAMES
    assert migrate(dsn) == NAMES
    assert check(dsn) == []
    recorded = rows(dsn, "SELECT script_name, checksum, description FROM public.schema_migrations ORDER BY version")
    assert recorded == [(each.script_name, each.checksum, each.description) for each in migrations()]
    assert recorded[1][2] == "create authentication schema"


def test_a_second_run_changes_nothing(empty: str) -> None:
    migrate(empty)
    before = rows(empty, "SELECT version, applied_at FROM public.schema_migrations")
    assert migrate(empty) == []
    assert rows(empty, "SELECT version, applied_at FROM public.schema_migrations") == before


def test_each_file_is_what_psql_runs(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        for migration in migrations():
            with connection.transaction():
                connection.execute(migration.content)
    assert rows(empty, "SELECT count(*) FROM public.schema_migrations") == [(0,)]


def test_the_readme_says_what_each_migration_makes() -> None:
    rows_of_files = [line.split("|")[1] for line in (SCHEMA / "README.md").read_text().splitlines() if line.startswith("| `")]
    told = {number for cell in rows_of_files for number in re.findall(r"`(\d{3})`", cell)}
    assert [name for name in NAMES if name.partition("__")[0][-3:] not in told] == []


def test_every_earlier_state_migrates_forward(empty: str, directory: Path) -> None:
    for newest in range(1, len(NAMES) + 1):
        for name in NAMES:
            (directory / name).unlink(missing_ok=True)
        for name in NAMES[:newest]:
            shutil.copy(SCHEMA / name, directory)
        assert migrate(empty, directory) == [NAMES[newest - 1]]


def test_a_changed_file_is_refused_and_named(empty: str, directory: Path) -> None:
    migrate(empty)
    with (directory / NAMES[1]).open("a") as file:
        file.write("-- a word more\n")
    for work in (migrate, check):
        message = refused(lambda work=work: work(empty, directory))  # type: ignore[misc]  # bound at once
        assert f"{NAMES[1]} was changed" in message


def test_a_lost_file_is_refused_and_named(empty: str, directory: Path) -> None:
    migrate(empty)
    (directory / NAMES[-1]).unlink()
    assert f"{NAMES[-1]} was applied, but is not in this program" in refused(lambda: migrate(empty, directory))


def test_a_file_older_than_an_applied_one_is_refused_and_does_not_run(empty: str, directory: Path) -> None:
    migrate(empty)
    (directory / "V2025.01.22.001__too_late.sql").write_text("CREATE TABLE public.too_late ();")
    assert "V2025.01.22.001__too_late.sql was not applied, but a later one was" in refused(lambda: migrate(empty, directory))
    assert rows(empty, "SELECT to_regclass('public.too_late')") == [(None,)]


def test_all_disagreements_are_told_at_once() -> None:
    known = [Migration("1", "", "one.sql", b""), Migration("2", "", "two.sql", b"")]
    message = refused(lambda: pending(known, [Applied("2", "two.sql", "other"), Applied("3", "three.sql", "")]))
    assert all(part in message for part in ("three.sql was applied", "two.sql was changed", "one.sql was not applied"))


def test_a_failing_file_changes_nothing_and_those_before_it_stay(empty: str, directory: Path) -> None:
    migrate(empty)
    (directory / "V2099.01.01.001__good.sql").write_text("CREATE TABLE public.good ();")
    (directory / "V2099.01.01.002__bad.sql").write_text("CREATE TABLE public.half (); SELECT 1/0;")
    assert "V2099.01.01.002__bad.sql failed: division by zero" in refused(lambda: migrate(empty, directory))
    assert rows(empty, "SELECT to_regclass('public.half'), to_regclass('public.good')::text") == [(None, "good")]
    assert check(empty, directory) == ["V2099.01.01.002__bad.sql"]


def test_a_file_that_says_so_runs_outside_a_transaction(empty: str, directory: Path) -> None:
    migrate(empty)
    index = "CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_later ON authentication.roles (created_at);"
    (directory / "V2099.01.01.001__index.sql").write_text(f"-- kms: no transaction\n{index}\n")
    assert migrate(empty, directory) == ["V2099.01.01.001__index.sql"]
    assert rows(empty, "SELECT to_regclass('authentication.idx_later')::text") == [("authentication.idx_later",)]


@pytest.mark.parametrize(
    "name", ["V1__short.sql", "V2025.01.23.010_one_underscore.sql", "notes.sql", "V2025.01.23.010__Upper.sql"]
)
def test_a_file_that_is_no_migration_is_refused(directory: Path, name: str) -> None:
    (directory / name).touch()
    assert f"{name}: expected a name like" in refused(lambda: migrations(directory))


def test_two_files_of_one_version_are_refused(directory: Path) -> None:
    (directory / "V2025.01.23.001__twin.sql").touch()
    assert "have the same version" in refused(lambda: migrations(directory))


def test_two_runners_at_once_do_the_work_once(empty: str) -> None:
    start = threading.Barrier(2)

    def run(_: int) -> list[str]:
        start.wait()
        return migrate(empty)

    with ThreadPoolExecutor(2) as executor:
        outcomes = list(executor.map(run, range(2)))
    assert sorted(outcomes) == [[], NAMES]


@pytest.mark.slow
def test_databases_of_one_server_are_migrated_at_once(bare: EmbeddedPostgres) -> None:
    with psycopg.connect(bare.superuser_dsn(), autocommit=True) as connection:
        for number in range(4):
            connection.execute(f"CREATE DATABASE twin_{number}".encode())
    start = threading.Barrier(4)

    def run(number: int) -> list[str]:
        start.wait()
        return migrate(bare.superuser_dsn(f"twin_{number}"))

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(run, range(4))) == [NAMES] * 4


def test_a_runner_does_not_wait_for_ever(empty: str) -> None:
    with psycopg.connect(empty) as other:
        other.execute(b"SELECT pg_advisory_lock(7040371)")
        assert "another migration of this database is running" in refused(lambda: migrate(empty, wait_seconds=1))


def test_the_prepared_migrator_needs_no_superuser(clusters: Clusters) -> None:
    with clusters.empty() as server:
        with psycopg.connect(server.superuser_dsn(), autocommit=True) as connection:
            connection.execute(b"CREATE DATABASE first")
            connection.execute(b"CREATE DATABASE second")
        for database in ("first", "second"):  # the second finds the roles that the first has made
            with psycopg.connect(server.superuser_dsn(database)) as connection:
                connection.execute((SCHEMA / "bootstrap.sql").read_bytes())
            set_service_password(server.superuser_dsn(), Secret(server.service_password().encode()), role="kms_migrator")
            dsn = server.service_dsn(database).replace("kms_service", "kms_migrator")
            assert migrate(dsn) == NAMES
            set_service_password(dsn, Secret(server.service_password().encode()))
            assert rows(server.service_dsn(database), "SELECT current_user") == [("kms_service",)]
            owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname IN ('authentication', 'cryptography', 'public')"
            assert rows(server.superuser_dsn(database), owners) == [("kms_migrator",)]
            with psycopg.connect(server.service_dsn(database)) as service, pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute(b"SELECT lo_create(0)")


def test_the_services_own_login_may_not_migrate(database: Database, directory: Path) -> None:
    (directory / "V2099.01.01.001__more.sql").write_text("CREATE TABLE public.more ();")
    assert "schema/bootstrap.sql" in refused(lambda: migrate(database.dsn, directory))


def test_the_server_gets_a_verifier_and_never_the_password(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(b"CREATE ROLE scram_probe LOGIN")
    set_service_password(postgres.superuser_dsn(), Secret(b"correct horse"), role="scram_probe")
    stored = rows(postgres.superuser_dsn(), "SELECT rolpassword FROM pg_authid WHERE rolname = 'scram_probe'")
    assert str(stored[0][0]).startswith("SCRAM-SHA-256$4096:")
    assert "correct horse" not in postgres.log_file.read_text()
    login = postgres.superuser_dsn().replace("user=postgres", "user=scram_probe password='correct horse'")
    assert rows(login, "SELECT current_user") == [("scram_probe",)]


@pytest.mark.parametrize("dsn", ["host=/nowhere user=x", "postgresql://u:hunter2@[bad", "hunter2"])
def test_a_bad_connection_string_is_refused_without_being_shown(dsn: str) -> None:
    assert "hunter2" not in refused(lambda: migrate(dsn))


async def test_the_service_finds_its_schema_current(store: Pool) -> None:
    await check_schema(store)


async def test_the_service_says_what_to_run_when_migrations_are_pending(database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(
            b"DELETE FROM public.schema_migrations WHERE version = (SELECT max(version) FROM public.schema_migrations)"
        )
    async with open_pool(database.dsn, 1) as pool:
        with pytest.raises(KmsError, match=f"1 migrations are pending, from {NAMES[-1]}: run `kms migrate`"):
            await check_schema(pool)


def test_an_installed_wheel_brings_its_migrations(empty: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kms", "schema"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(tmp_path), "."], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", *offline, "--target", str(installed), str(wheel)], check=True, capture_output=True)
    program = "import sys, kms; from kms.store.migrate import migrate; print(kms.__file__, *migrate(sys.argv[1]), sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", program, empty],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines() == [str(installed / "kms" / "__init__.py"), *NAMES]
