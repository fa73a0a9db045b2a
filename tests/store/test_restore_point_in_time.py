"""Recovery to a point in time, with the settings that docs/operations.md names: a base backup, archived WAL, a target time."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kms.dev.postgres import DURABLE, EmbeddedPostgres, embedded_postgres
from kms.dev.postgres_binaries import server_account
from kms.domain.errors import KmsError
from kms.domain.secret import Secret
from kms.store.epoch import check_epoch
from kms.store.migrate import migrate, set_service_password
from kms.store.pool import open_pool
from kms.store.restore import begin_recovered
from tests.store.backup_rows import add_key, add_session, add_user, states
from tests.store.records import RECORDS, mac


@contextmanager
def on(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def archiving(archive: Path) -> dict[str, str]:
    """The settings of the specification's section 8.2, whose wal_keep_segments is wal_keep_size since PostgreSQL 13."""
    return {
        **DURABLE,
        "wal_level": "replica",
        "archive_mode": "on",
        "archive_command": f"test ! -f {archive}/%f && cp %p {archive}/%f",
        "max_wal_senders": "3",
        "wal_keep_size": "1GB",
    }


def await_that(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def value(connection: psycopg.Connection[Any], query: bytes) -> Any:  # noqa: ANN401  # whatever the query gives
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def base_backup(server: EmbeddedPostgres, target: Path) -> None:
    account = server_account()
    account.make_directory(target)
    paths = ["--pgdata", str(target), "--host", str(server.socket_directory)]
    program = str(server.bin_directory / "pg_basebackup")
    command = [program, *paths, "--username", "copier", "--checkpoint=fast", "--wal-method=none"]
    done = account.run(command)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the server's account reaches; pytest closes its own to others."""
    with tempfile.TemporaryDirectory(prefix="kms-recovery-", ignore_cleanup_errors=True) as name:
        found = Path(name)
        found.chmod(0o711)
        yield found


@pytest.mark.slow
async def test_a_database_recovered_to_a_moment_is_as_it_was_then_and_wants_an_epoch(directory: Path) -> None:
    archive = directory / "archive"
    server_account().make_directory(archive)
    recovered = directory / "recovered"
    recovered.mkdir(mode=0o711)
    with embedded_postgres(directory / "origin", archiving(archive)) as server:
        with on(server.superuser_dsn()) as connection:
            connection.execute(b"CREATE DATABASE kms")
        dsn = server.superuser_dsn("kms")
        migrate(dsn)
        set_service_password(dsn, Secret(server.service_password().encode()))
        password = server.service_password()
        async with open_pool(server.service_dsn("kms"), 1) as pool:
            await check_epoch(pool, RECORDS)
        with on(dsn) as connection:
            connection.execute(b"CREATE ROLE copier LOGIN REPLICATION")
            with (server.directory / "data" / "pg_hba.conf").open("a") as rules:
                rules.write("local replication copier trust\n")
            connection.execute(b"SELECT pg_reload_conf()")
            base_backup(server, recovered / "data")
            owner = add_user(connection)
            add_session(connection, owner)
            add_key(connection, owner, "before")
            await asyncio.sleep(0.2)
            moment = value(connection, b"SELECT clock_timestamp()::text")
            await asyncio.sleep(0.2)
            add_key(connection, owner, "after")
            segment = value(connection, b"SELECT pg_walfile_name(pg_switch_wal())")
            await_that((archive / segment).exists)
    (recovered / "data" / "recovery.signal").touch()
    server_account().own(recovered / "data" / "recovery.signal")
    (recovered / "service.password").write_text(password)
    settings = {
        **DURABLE,
        "restore_command": f"cp {archive}/%f %p",
        "recovery_target_time": moment,
        "recovery_target_action": "promote",
    }
    with embedded_postgres(recovered, settings) as server, on(server.superuser_dsn("kms")) as connection:
        await_that(lambda: value(connection, b"SELECT NOT pg_is_in_recovery()"))
        assert states(connection) == {"before": "active"}
        async with open_pool(server.service_dsn("kms"), 1) as pool:
            with pytest.raises(KmsError, match="recovered to a point in time"):
                await check_epoch(pool, RECORDS)
            beginning = begin_recovered(server.superuser_dsn("kms"), [], mac=mac)
            assert (beginning.number, beginning.unconfirmed) == (2, 1)
            await check_epoch(pool, RECORDS)
        assert states(connection) == {"before": "inactive"}
        assert value(connection, b"SELECT count(*) FROM authentication.user_sessions") == 0
