"""`kms restore`: a database made of a backup, checked, in a new epoch, under its name only when all of that is done.

Until then it has a name of its own; whatever fails, it is dropped, and nothing else was touched but roles that were missing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from kms.store.backup import LOGIN_SEES_ALL, check_login_sees_all, connected
from kms.store.backup_catalog import DatabaseProperties, read_catalog, read_owners
from kms.store.backup_file import Manifest, read_manifest
from kms.store.backup_roles import make_roles
from kms.store.backup_tools import Tool, find_tool, run
from kms.store.epoch import Beginning, Cause, begin_epoch, continue_epoch, read_epoch
from kms.store.errors import unavailable
from kms.store.journal import Entry, Event, Head, check_continues, read_journal
from kms.store.migrate import migrate
from kms.store.pool import connection_settings
from kms.store.renewed_macs import TokenMac

HOLDS_ANYTHING: Final = """
    SELECT EXISTS (
        SELECT FROM pg_class AS c WHERE c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
    ) OR EXISTS (SELECT FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'public'))
"""
END_BACKEND: Final = "SELECT pg_terminate_backend(%(pid)s::int, %(milliseconds)s::bigint)"
DATABASE_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = %(name)s)"
MIGRATOR: Final = """
    SELECT (SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = to_regclass('public.schema_migrations')),
        session_user::text
"""
_MAINTENANCE: Final = "postgres"
_END_MILLISECONDS: Final = 10_000
_NAME_BYTES_MAX: Final = 63
_DIFFERENCES_TOLD: Final = 5


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restoration did. `applied` are migrations that are newer than the backup."""

    database: str
    created_at: str
    roles_made: tuple[str, ...]
    applied: tuple[str, ...]
    rows: int
    beginning: Beginning


def restore(dsn: str, file: Path, journals: Sequence[Path] = (), *, mac: TokenMac) -> Restored:
    """Restore the backup in *file* as the database that *dsn* names, which is not there yet or is empty.

    *journals* are all the journals whose heads the backup recorded; without them every key comes back inactive. *mac* is that of
    the token, for the records that change. Raises
    OSError, and STORE_UNAVAILABLE saying what to do; the database is then as it was before.
    """
    settings = connection_settings(dsn)
    target = _target(settings)
    manifest = read_manifest(file)
    entries, is_complete = read_journals(manifest, journals)
    with _maintained(settings) as server:
        is_there, tool = _check_target(server, settings, target), _restorer(server, manifest)
        with scratch_database(server, settings, manifest, target) as (scratch, made):
            _fill(scratch, tool, file, manifest)
            _give(server, str(scratch["dbname"]), manifest.properties.owner)
            applied = _brought_up_to_date(scratch)
            with connected(scratch) as connection:
                beginning = begin_epoch(
                    connection,
                    Cause.RESTORED,
                    entries,
                    is_complete=is_complete,
                    mac=mac,
                    backup_created_at=manifest.created_at,
                )
            _settle(server, str(scratch["dbname"]), target, manifest.properties, replaces=is_there)
    return Restored(target, manifest.created_at, made, applied, sum(manifest.rows.values()), beginning)


@contextmanager
def drilled(dsn: str, file: Path) -> Iterator[tuple[str, Manifest]]:
    """Restore the backup in *file* beside the database of *dsn*; yield the connection string of it, and drop it at the end.

    It begins no epoch and is not brought up to date. Raises as `restore` does.
    """
    settings = connection_settings(dsn)
    manifest = read_manifest(file)
    with _maintained(settings) as server:
        tool = _restorer(server, manifest)
        with scratch_database(server, settings, manifest, "kms_drill") as (scratch, _):
            _fill(scratch, tool, file, manifest)
            yield _dsn(scratch), manifest


def begin_recovered(dsn: str, journals: Sequence[Path], *, mac: TokenMac) -> Beginning:
    """Begin an epoch in the database of *dsn*, which was recovered to a point in time or restored by other means.

    That *journals* are all there are and have lost nothing is the operator's to know: here nothing recorded their heads.
    Without any, every key is in doubt. Raises OSError, and STORE_UNAVAILABLE.
    """
    found = [read_journal(path) for path in journals]
    entries = [entry for each in found for entry in each]
    with connected(connection_settings(dsn)) as connection:
        check_login_sees_all(connection)
        return begin_epoch(connection, Cause.RECOVERED, entries, is_complete=_are_written(found), mac=mac)


def continue_moved(dsn: str, mac: TokenMac) -> int:
    """Begin an epoch in which nothing is in doubt, since the operator says that nothing was lost; return its number.

    Raises STORE_UNAVAILABLE where the database is where it was served last.
    """
    with connected(connection_settings(dsn)) as connection:
        check_login_sees_all(connection)
        epoch = read_epoch(connection)
        if epoch is None or epoch.is_here:
            raise unavailable("the database is where it was served last: there is nothing to do")
        return continue_epoch(connection, mac)


def read_journals(manifest: Manifest, journals: Sequence[Path]) -> tuple[list[Entry], bool]:
    """Return what *journals* say, and whether they are all that the backup knew of, and something was written to each.

    Changes of keys are left out where the backup holds them. Raises STORE_UNAVAILABLE where some were given and a head that the
    backup recorded is in none of them.
    """
    found = [read_journal(path) for path in journals]
    if journals:
        entries, names = tuple(entry for each in found for entry in each), ", ".join(map(str, journals))
        for head in manifest.journals:
            check_continues(entries, head, names)
    return [entry for each in found for entry in _not_held(each, manifest.journals)], bool(manifest.journals) and _are_written(
        found
    )


def _not_held(journal: tuple[Entry, ...], heads: Sequence[Head]) -> list[Entry]:
    """Return the lines but for changes up to the head at the time of the backup, which took it before it took the database."""
    held = max((entry.head.sequence for entry in journal if entry.head in heads), default=0)
    return [entry for entry in journal if entry.event is not Event.KEY_CHANGED or entry.head.sequence > held]


def _are_written(journals: Sequence[tuple[Entry, ...]]) -> bool:
    """Whether each journal tells of something: one that was only begun does not show that anybody writes to it."""
    return bool(journals) and all(len(journal) > 1 for journal in journals)


@contextmanager
def scratch_database(
    server: psycopg.Connection[Any], settings: dict[str, Any], manifest: Manifest, prefix: str
) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Make the roles of the backup and an empty database; yield its settings and the roles made; drop it if it is still there."""
    made = tuple(make_roles(server, manifest.roles, manifest.memberships))
    ending = f"_{uuid4().hex[:12]}"
    name = prefix.encode()[: _NAME_BYTES_MAX - len(ending)].decode(errors="ignore") + ending
    properties = manifest.properties
    query = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {}{}").format(
        sql.Identifier(name), sql.Literal(properties.encoding), _locale(properties)
    )
    try:
        server.execute(query)
        # Nobody but us, until it is finished.
        server.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
        yield {**settings, "dbname": name}, made
    except psycopg.Error as error:
        raise unavailable(f"the backup could not be restored: {error.diag.message_primary or error}") from None
    finally:
        _drop(server, settings, name)


def _drop(server: psycopg.Connection[Any], settings: dict[str, Any], name: str) -> None:
    """Drop the scratch database, also where an interrupt came in the middle of a statement on *server*."""
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    if server.info.transaction_status is TransactionStatus.IDLE:
        server.execute(drop)
        return
    # It takes no other statement, and what it was doing may be making that very database.
    pid = server.info.backend_pid
    server.close()
    with connected(settings) as another:
        another.execute(END_BACKEND, {"pid": pid, "milliseconds": _END_MILLISECONDS})
        another.execute(drop)


def _restorer(server: psycopg.Connection[Any], manifest: Manifest) -> Tool:
    """Return the pg_restore for *server* and the backup. Raises STORE_UNAVAILABLE where the server is too old for the file."""
    version = check_login_sees_all(server)
    if version < (newest := max(manifest.server_version, manifest.client_version)):
        raise unavailable(
            f"the backup was made of PostgreSQL {manifest.server_version} with pg_dump of {manifest.client_version}, and this "
            f"server is PostgreSQL {version}: restore it into a server of {newest} or later"
        )
    return find_tool("pg_restore", version)


def _fill(scratch: dict[str, Any], tool: Tool, file: Path, manifest: Manifest) -> None:
    """Load the archive into the scratch database and compare what came of it with what was dumped."""
    with connected(scratch) as connection:
        run(tool, scratch, ["--exit-on-error", "--single-transaction", str(file)])
        found = manifest.contents.differences(read_catalog(connection))
    if found:
        raise unavailable(f"what came of the backup is not what was dumped: {_told(found)}")


def _give(server: psycopg.Connection[Any], name: str, owner: str) -> None:
    server.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(name), sql.Identifier(owner)))


def _brought_up_to_date(scratch: dict[str, Any]) -> tuple[str, ...]:
    """Run the pending migrations as who has run the others, and return their names.

    What they make must not be the superuser's: the next migration could not alter it, nor backup_user read it.
    """
    with connected(scratch) as connection:
        found = connection.execute(MIGRATOR).fetchone()
        assert found is not None  # noqa: S101  # a SELECT without FROM gives a row
        migrator, login = found
        before = read_owners(connection)
        applied = migrate(_dsn(scratch), role=migrator)
        after = read_owners(connection)
    strays = [name for name, owner in after.items() if owner == login != migrator and before.get(name) != login]
    if strays:
        raise unavailable(f"the migrations of the restored database left what is not its owner's: {_told(sorted(strays))}")
    return tuple(applied)


def _told(differences: Sequence[str]) -> str:
    beyond = len(differences) - _DIFFERENCES_TOLD
    return "; ".join(differences[:_DIFFERENCES_TOLD]) + (f"; and {beyond} more" if beyond > 0 else "")


def _settle(server: psycopg.Connection[Any], name: str, target: str, properties: DatabaseProperties, *, replaces: bool) -> None:
    """Give the scratch database its rights and its name."""
    database = sql.Identifier(name)
    for grantee, privilege in properties.acl:
        role = sql.SQL("PUBLIC") if grantee == "PUBLIC" else sql.Identifier(grantee)
        words = {"CONNECT": sql.SQL("CONNECT"), "CREATE": sql.SQL("CREATE"), "TEMPORARY": sql.SQL("TEMPORARY")}
        server.execute(sql.SQL("GRANT {} ON DATABASE {} TO {}").format(words[privilege], database, role))
    if replaces:
        server.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(target)))
    server.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(database, sql.Identifier(target)))


@contextmanager
def _maintained(settings: dict[str, Any]) -> Iterator[psycopg.Connection[Any]]:
    """Connect to the database from which others are made, with a login that may make all that a backup holds."""
    with connected({**settings, "dbname": _MAINTENANCE}) as server:
        row = server.execute(LOGIN_SEES_ALL).fetchone()
        if row is None or not row[2]:
            raise unavailable(
                "restoring takes a superuser, since it makes extensions, roles that bypass row security, and what others own: "
                "name one in [migration] for this command"
            )
        yield server


def _check_target(server: psycopg.Connection[Any], settings: dict[str, Any], target: str) -> bool:
    """Return whether the database exists. Raises STORE_UNAVAILABLE for one that holds anything."""
    row = server.execute(DATABASE_EXISTS, {"name": target}).fetchone()
    if row is None or not row[0]:
        return False
    with connected(settings) as connection:
        held = connection.execute(HOLDS_ANYTHING).fetchone()
    if held is None or held[0]:
        raise unavailable(
            f'the database "{target}" is not empty, and nothing is restored over it: stop the service and rename it '
            f'(ALTER DATABASE "{target}" RENAME TO …), or name another in [migration]'
        )
    return True


def _target(settings: dict[str, Any]) -> str:
    name = settings.get("dbname") or settings.get("user")
    if not name or name == _MAINTENANCE:
        raise unavailable(f'expected a connection string that names the database to be made, other than "{_MAINTENANCE}"')
    return str(name)


def _locale(properties: DatabaseProperties) -> sql.Composable:
    """Return the locale of the backup's database; of another provider than libc the cluster's own is taken."""
    if properties.locale_provider != "c":
        return sql.SQL("")
    return sql.SQL(" LOCALE_PROVIDER libc LC_COLLATE {} LC_CTYPE {}").format(
        sql.Literal(properties.lc_collate), sql.Literal(properties.lc_ctype)
    )


def _dsn(settings: dict[str, Any]) -> str:
    return make_conninfo(**settings)
