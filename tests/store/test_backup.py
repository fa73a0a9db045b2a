"""A backup: one private file, whole or not at all, that shows every damage, by a login that sees every row."""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from kms.dev.postgres import EmbeddedPostgres
from kms.domain.errors import KmsError, Reason
from kms.store import backup_tools
from kms.store.backup import backup
from kms.store.backup_file import read_manifest
from kms.store.backup_tools import Tool, find_tool
from kms.store.journal import Journal, head_of, read_journal
from tests.fixtures.postgres import Database
from tests.store.backup_rows import add_key, add_user


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        yield connection


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(KmsError) as caught:
        work()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value.message


def test_a_backup_says_what_is_in_it(database: Database, admin: psycopg.Connection[Any], tmp_path: Path) -> None:
    add_key(admin, add_user(admin), "payments")
    path, manifest = backup(database.admin_dsn, tmp_path / "one")
    assert path == tmp_path / "one"
    assert read_manifest(path) == manifest
    assert (manifest.rows["cryptography.keys"], manifest.rows["authentication.users"]) == (1, 1)
    assert {"schema cryptography", "policy cryptography.keys.keys_own_data"} < manifest.catalog.keys()
    assert manifest.properties.name == database.name
    assert manifest.properties.acl == (("kms_service", "CONNECT"),)
    assert {"kms_service", "kms_lifecycle", "authenticated_users"} < {role.name for role in manifest.roles}


def test_the_file_is_an_archive_that_pg_restore_reads_as_it_is(database: Database, tmp_path: Path) -> None:
    path, _ = backup(database.admin_dsn, tmp_path / "one")
    tool = find_tool("pg_restore", 17)
    listed = subprocess.run([tool.path, "--list", path], capture_output=True, text=True, check=True)
    assert "TABLE DATA cryptography keys postgres" in listed.stdout
    script = subprocess.run([tool.path, "--file=-", path], capture_output=True, text=True, check=False)
    assert (script.returncode, script.stderr) == (0, "")


def test_the_file_is_for_its_owner_alone_whatever_the_umask(database: Database, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path, _ = backup(database.admin_dsn, tmp_path / "one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_in_a_directory_a_backup_gets_a_name(database: Database, tmp_path: Path) -> None:
    path, _ = backup(database.admin_dsn, tmp_path)
    assert path.parent == tmp_path
    assert re.fullmatch(database.name + r"-\d{8}T\d{6}\.kmsbackup", path.name)


def test_a_backup_is_never_written_over_another_file(database: Database, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("precious")
    with pytest.raises(FileExistsError):
        backup(database.admin_dsn, tmp_path / "one")
    assert (tmp_path / "one").read_text() == "precious"


def test_a_failed_backup_leaves_nothing(database: Database, admin: psycopg.Connection[Any], tmp_path: Path) -> None:
    admin.execute(b"CREATE VIEW public.broken AS SELECT 1 AS one")
    admin.execute(b"DELETE FROM pg_rewrite WHERE ev_class = 'public.broken'::regclass")
    assert "pg_dump failed" in refused(lambda: backup(database.admin_dsn, tmp_path / "one"))
    assert list(tmp_path.iterdir()) == []


def test_a_login_that_does_not_see_every_row_is_told_what_to_do(
    postgres: EmbeddedPostgres, database: Database, tmp_path: Path
) -> None:
    message = refused(lambda: backup(postgres.service_dsn(database.name), tmp_path / "one"))
    assert "use backup_user" in message
    assert "ALTER ROLE" not in message
    assert list(tmp_path.iterdir()) == []


def test_the_login_for_backups_dumps_what_a_superuser_dumps(
    postgres: EmbeddedPostgres, database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    add_key(admin, add_user(admin), "k")
    admin.execute(f"GRANT CONNECT ON DATABASE {database.name} TO backup_user".encode())
    admin.execute(b"ALTER ROLE backup_user PASSWORD 'secret'")
    login = make_conninfo(database.admin_dsn, user="backup_user", password="secret")  # noqa: S106  # of this test
    _, found = backup(login, tmp_path / "one")
    _, expected = backup(database.admin_dsn, tmp_path / "two")
    assert (found.rows, found.catalog, found.roles) == (expected.rows, expected.catalog, expected.roles)
    assert found.rows["cryptography.keys"] == 1


@pytest.mark.parametrize("bytes_lost", [1, 8, 16, 1000, 100_000])
def test_a_file_that_was_cut_off_is_no_backup(database: Database, tmp_path: Path, bytes_lost: int) -> None:
    path, _ = backup(database.admin_dsn, tmp_path / "one")
    content = path.read_bytes()
    path.write_bytes(content[:-bytes_lost])
    assert "its end is missing" in refused(lambda: read_manifest(path))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5])
def test_a_damaged_byte_is_seen(database: Database, tmp_path: Path, part: float) -> None:
    path, manifest = backup(database.admin_dsn, tmp_path / "one")
    content = bytearray(path.read_bytes())
    content[int(manifest.dump_bytes * part)] ^= 1
    path.write_bytes(content)
    assert "was damaged" in refused(lambda: read_manifest(path))


@pytest.mark.parametrize("content", [b"", b"KMSBKUP1", b"x" * 100, b"{}\0\0\0\0\0\0\0\x02KMSBKUP1"])
def test_what_is_no_backup_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one").write_bytes(content)
    assert str(tmp_path / "one") in refused(lambda: read_manifest(tmp_path / "one"))


def test_a_backup_knows_the_heads_of_the_journals(database: Database, tmp_path: Path) -> None:
    _, manifest = backup(database.admin_dsn, tmp_path / "one", [tmp_path / "a", tmp_path / "b"])
    assert manifest.journals == tuple(head_of(read_journal(tmp_path / name)) for name in ("a", "b"))
    again, _ = backup(database.admin_dsn, tmp_path / "two", [tmp_path / "a"])
    assert read_manifest(again).journals == (Journal(tmp_path / "a").begin(at=_unused()),)


def _unused() -> Any:  # noqa: ANN401  # the journal is there, so that no moment is written
    return None


def test_what_is_counted_is_what_is_dumped(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = backup_tools.run

    def add_a_row_meanwhile(tool: Tool, settings: dict[str, Any], arguments: list[str]) -> None:
        add_user(admin)
        run(tool, settings, arguments)
        add_user(admin)

    monkeypatch.setattr("kms.store.backup.run", add_a_row_meanwhile)
    path, manifest = backup(database.admin_dsn, tmp_path / "one")
    assert manifest.rows["authentication.users"] == 0
    options = ["--data-only", "--schema=authentication", "--table=users", "--file=-"]
    script = subprocess.run([find_tool("pg_restore", 17).path, *options, path], capture_output=True, text=True, check=True)
    assert "@example.org" not in script.stdout


def test_what_a_failed_program_says_first_and_last_is_told(tmp_path: Path) -> None:
    tool = tmp_path / "pg_dump"
    tool.write_text("#!/bin/sh\nseq -s ' and ' 5000 >&2; exit 1\n")
    tool.chmod(0o700)
    message = refused(lambda: backup_tools.run(Tool(tool, 17), {}, []))
    assert message.startswith("pg_dump failed: 1 and 2 and 3")
    assert message.endswith("4999 and 5000")
    assert len(message) < 1100


def test_a_large_object_of_anybody_does_not_keep_backup_user_from_his_backup(
    database: Database, admin: psycopg.Connection[Any], tmp_path: Path
) -> None:
    admin.execute(b"ALTER ROLE backup_user PASSWORD 'secret'")
    admin.execute(f"GRANT CONNECT ON DATABASE {database.name} TO backup_user".encode())
    admin.execute(b"SELECT lo_from_bytea(0, 'abc')")
    try:
        dsn = make_conninfo(database.admin_dsn, user="backup_user", password="secret")  # noqa: S106  # of this test
        path, _ = backup(dsn, tmp_path / "one")
    finally:
        admin.execute(b"SELECT lo_unlink(oid) FROM pg_largeobject_metadata")
    listed = subprocess.run([find_tool("pg_restore", 17).path, "--list", path], capture_output=True, text=True, check=True)
    assert "BLOB" not in listed.stdout


def test_the_password_is_in_no_argument(
    postgres: EmbeddedPostgres,
    database: Database,
    admin: psycopg.Connection[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    password = "not-in-any-argument'\\ %"  # noqa: S105  # of a role of this test
    admin.execute(f"CREATE ROLE dumper LOGIN SUPERUSER PASSWORD '{password.replace(chr(39), chr(39) * 2)}'".encode())
    seen = tmp_path / "arguments"
    spy = tmp_path / "bin" / "pg_dump"
    spy.parent.mkdir()
    real = find_tool("pg_dump", 17).path
    spy.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ tr "\\0" "\\n" </proc/$$/cmdline; env; }} >"{seen}"\nexec "{real}" "$@"\n'
    )
    spy.chmod(0o700)
    monkeypatch.setattr(backup_tools, "_candidates", lambda _: iter([spy]))
    monkeypatch.setenv("KMS_HSM_PIN", "a-pin")
    try:
        dsn = make_conninfo(postgres.superuser_dsn(database.name), user="dumper", password=password, keepalives_idle=7)
        backup(dsn, tmp_path / "one")
    finally:
        admin.execute(b"DROP ROLE dumper")
    arguments, _, environment = seen.read_text().partition("PGPASSWORD=")
    assert password not in arguments.partition("HOME=")[0]
    assert environment.startswith(password + "\n")
    assert "a-pin" not in seen.read_text()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with pg_dump and pg_restore of PostgreSQL 18, 15 and 17, which are all that is found."""
    for name in ("pg_dump", "pg_restore"):
        for version in (18, 15, 17):
            path = tmp_path / str(version) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/sh\necho "{name} (PostgreSQL) {version}.4 (Debian)"\n')
            path.chmod(0o700)
    found = lambda name: (tmp_path / version / name for version in ("18", "15", "17", "none"))  # noqa: E731
    monkeypatch.setattr(backup_tools, "_candidates", found)
    return tmp_path


def test_the_program_of_the_servers_version_is_taken_and_no_newer_one(tools: Path) -> None:
    assert [find_tool("pg_dump", version).version for version in (15, 17, 18)] == [15, 17, 18]
    message = refused(lambda: find_tool("pg_dump", 16))
    assert "the server is PostgreSQL 16 and takes pg_dump of the same version" in message
    assert "postgresql-client-16" in message
    assert f"found: {tools}/18/pg_dump of 18, {tools}/15/pg_dump of 15" in message


def test_every_directory_of_the_path_is_looked_through(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", ":".join(str(tools / version) for version in ("18", "15")))
    assert find_tool("pg_dump", 15).path == tools / "15" / "pg_dump"
    assert find_tool("pg_restore", 18).path == tools / "18" / "pg_restore"


def test_a_backup_that_could_not_be_restored_is_not_made(
    database: Database, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools / "17" / "pg_dump").unlink()
    assert "the server is PostgreSQL 17 and takes pg_dump of the same" in refused(
        lambda: backup(database.admin_dsn, tmp_path / "one")
    )
    assert not (tmp_path / "one").exists()
