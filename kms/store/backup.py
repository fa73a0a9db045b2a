"""`kms backup`: the database in one file, taken in one snapshot, with what is needed to see that it came back whole."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg

from kms.store.backup_catalog import read_catalog, read_properties, read_roles
from kms.store.backup_file import Manifest, new_private_file, seal
from kms.store.backup_tools import Tool, find_tool, run
from kms.store.errors import unavailable
from kms.store.journal import Head, Journal
from kms.store.pool import connection_settings

# Row security that is forced hides rows from the owner of the tables as well: a dump by him fails, or worse, is empty.
LOGIN_SEES_ALL: Final = """
    SELECT r.rolname::text AS name, r.rolsuper OR r.rolbypassrls AS sees_all, r.rolsuper AS is_superuser,
        current_setting('server_version_num')::int / 10000 AS server_version
    FROM pg_catalog.pg_roles AS r
    WHERE r.rolname = current_user
"""
SNAPSHOT: Final = "SELECT pg_export_snapshot(), clock_timestamp()"
NOW: Final = "SELECT clock_timestamp()"
_LOCK_WAIT: Final = "60s"


def backup(dsn: str, out: Path, journals: Sequence[Path] = ()) -> tuple[Path, Manifest]:
    """Write the database of *dsn* to the file *out*, or to a new file in the directory *out*; return its path and manifest.

    *journals* are begun where they do not exist, and their heads recorded. The file has mode 0600 and appears whole or not at
    all. Raises OSError, and STORE_UNAVAILABLE where the login does not see every row, or no pg_dump fits the server.
    """
    settings = connection_settings(dsn)
    with connected(settings) as connection:
        version = check_login_sees_all(connection)
        tool = find_tool("pg_dump", version)
        heads = tuple(Journal(path).begin(at=_now(connection)) for path in journals)
        properties = read_properties(connection)
        path = out / _file_name(properties.name, _now(connection)) if out.is_dir() else out
        with new_private_file(path) as temporary, connection.transaction():
            manifest = _dump(connection, tool, version, temporary, heads)
    return path, manifest


def connected(settings: dict[str, Any]) -> psycopg.Connection[Any]:
    """Return a connection in autocommit mode. Raises STORE_UNAVAILABLE."""
    try:
        connection = psycopg.connect(**settings, autocommit=True, prepare_threshold=None)
        connection.execute("SET timezone = 'UTC'")  # days are of 24 hours, as where MACs are made
        return connection
    except psycopg.OperationalError as error:
        raise unavailable(f"the database does not answer: {error}") from None


def check_login_sees_all(connection: psycopg.Connection[Any]) -> int:
    """Return the server's major version, or raise STORE_UNAVAILABLE saying what to do where row security hides rows."""
    row = connection.execute(LOGIN_SEES_ALL).fetchone()
    assert row is not None  # noqa: S101  # who is connected is a role
    name, sees_all, _, version = row
    if not sees_all:
        raise unavailable(
            f"the login {name} does not see every row, since row security is forced: use backup_user, which kms migrate and "
            "schema/bootstrap.sql make for this, or a superuser"
        )
    return int(version)


def _dump(connection: psycopg.Connection[Any], tool: Tool, version: int, target: Path, heads: tuple[Head, ...]) -> Manifest:
    # What is counted is what is dumped: both see the same snapshot.
    connection.execute(b"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    row = connection.execute(SNAPSHOT).fetchone()
    assert row is not None  # noqa: S101  # a SELECT without FROM gives a row
    snapshot, moment = row
    # No table refers to a large object, and backup_user cannot read what another login may have made of them.
    arguments = ["--format=custom", f"--file={target}", f"--snapshot={snapshot}", "--no-large-objects"]
    arguments.append(f"--lock-wait-timeout={_LOCK_WAIT}")
    settings = {**connection.info.get_parameters(), "password": connection.info.password or None}
    run(tool, settings, arguments)
    catalog = read_catalog(connection)
    roles, memberships = read_roles(connection)
    manifest = Manifest(
        created_at=moment.isoformat(),
        server_version=version,
        client_version=tool.version,
        properties=read_properties(connection),
        roles=roles,
        memberships=memberships,
        catalog=catalog.objects,
        rows=catalog.rows,
        journals=heads,
    )
    return seal(target, manifest)


def _now(connection: psycopg.Connection[Any]) -> datetime:
    row = connection.execute(NOW).fetchone()
    assert row is not None  # noqa: S101  # as above
    moment: datetime = row[0]
    return moment


def _file_name(database: str, moment: datetime) -> str:
    return f"{database.replace('/', '_')}-{moment:%Y%m%dT%H%M%S}.kmsbackup"
