"""A backup of an earlier schema, restored where migrations are run by a role that is no superuser."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kms.dev.postgres import EmbeddedPostgres
from kms.domain.errors import KmsError
from kms.domain.secret import Secret
from kms.store import restore as restoration
from kms.store.backup import backup
from kms.store.migrate import check, migrate, migrations, set_service_password
from kms.store.restore import restore
from tests.fixtures.clusters import Clusters
from tests.store.records import mac

SCHEMA = Path(__file__).parents[2] / "schema"
OLD = "2025.01.23.020"
UNREADABLE = b"""
    SELECT c.oid::regclass::text FROM pg_class AS c
    WHERE relkind IN ('r', 'p') AND relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
        AND NOT has_table_privilege('backup_user', oid, 'SELECT')
"""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A server with bootstrap.sql run, and a backup of the database `first`, at the schema of OLD."""

    server: EmbeddedPostgres
    file: Path

    def dsn_of(self, role: str, database: str) -> str:
        return make_conninfo(self.server.superuser_dsn(database), user=role, password=self.server.service_password())


@pytest.fixture(scope="module")
def prepared(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    directory = tmp_path_factory.mktemp("older")
    old = directory / "schema"
    old.mkdir()
    for migration in migrations():
        if migration.version <= OLD:
            shutil.copy(SCHEMA / migration.script_name, old)
    with clusters.empty() as server:
        with psycopg.connect(server.superuser_dsn(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE first")
        with psycopg.connect(server.superuser_dsn("first")) as connection:
            connection.execute((SCHEMA / "bootstrap.sql").read_bytes())
        for role in ("kms_migrator", "backup_user"):
            set_service_password(server.superuser_dsn(), Secret(server.service_password().encode()), role=role)
        found = Prepared(server, directory / "backup")
        migrate(found.dsn_of("kms_migrator", "first"), old)
        backup(server.superuser_dsn("first"), found.file)
        yield found


def rows(dsn: str, query: bytes) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query).fetchall()


def test_what_the_later_migrations_make_is_the_migrators(prepared: Prepared, tmp_path: Path) -> None:
    admin = prepared.server.superuser_dsn("second")
    assert len(restore(admin, prepared.file, mac=mac).applied) > 1
    assert check(prepared.dsn_of("kms_migrator", "second")) == []
    assert rows(admin, UNREADABLE) == []
    backup(prepared.dsn_of("backup_user", "second"), tmp_path / "again")
    later = tmp_path / "schema"
    shutil.copytree(SCHEMA, later)
    change = "ALTER TABLE cryptography.request_records ADD COLUMN note TEXT;"
    (later / "V2099.01.01.001__change_a_later_table.sql").write_text(change)
    assert len(migrate(prepared.dsn_of("kms_migrator", "second"), later)) == 1


def test_a_migration_that_leaves_something_to_the_superuser_undoes_the_restore(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoration, "migrate", lambda dsn, role: migrate(dsn))  # as the superuser
    with pytest.raises(KmsError, match="left what is not its owner's: function audit"):
        restore(prepared.server.superuser_dsn("third"), prepared.file, mac=mac)
    assert rows(prepared.server.superuser_dsn(), b"SELECT FROM pg_database WHERE datname ~ '^third'") == []
