"""Migrations: files `V<version>__<description>.sql`, run once each, in order, and remembered with their checksums.

Each file is plain SQL that `psql -1 -f` would run too. It runs in one transaction with the row that records it, unless its
first line is `-- kms: no transaction`: such a file holds one statement that can be repeated.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from kms.domain.secret import Secret
from kms.store.errors import unavailable
from kms.store.pool import AS_JOB, Pool, connection_settings

NO_TRANSACTION: Final = b"-- kms: no transaction"
NOT_MIGRATIONS: Final = frozenset({"bootstrap.sql"})
_FILE_NAME: Final = re.compile(r"V(\d{4}\.\d{2}\.\d{2}\.\d{3})__([a-z0-9_]+)\.sql")
_LOCK_ID: Final = 0x6B6D73  # "kms"

# row_security = off makes an error of what row security would otherwise hide from the owner of the tables.
SETTINGS: Final = """
    SELECT set_config('row_security', 'off', false), set_config('statement_timeout', '15min', false),
        set_config('client_min_messages', 'warning', false), set_config('lock_timeout', %(lock_timeout)s, false)
"""
# Not SET ROLE: migrations take roles themselves, and RESET ROLE must not come back to a superuser.
AS_ROLE: Final = "SELECT set_config('session_authorization', %(role)s, false)"
LOCK: Final = "SELECT pg_advisory_lock(%(id)s)"
HISTORY_EXISTS: Final = "SELECT to_regclass('public.schema_migrations') IS NOT NULL AS found"
HISTORY: Final = "SELECT version, script_name, checksum FROM public.schema_migrations ORDER BY version"
RECORD: Final = """
    INSERT INTO public.schema_migrations (version, description, script_name, checksum)
    VALUES (%(version)s, %(description)s, %(script_name)s, %(checksum)s)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """A file of `schema/`."""

    version: str
    description: str
    script_name: str
    content: bytes

    @property
    def checksum(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def in_transaction(self) -> bool:
        """Whether it runs in a transaction."""
        return self.content.split(b"\n", 1)[0].rstrip() != NO_TRANSACTION


@dataclass(frozen=True, slots=True)
class Applied:
    """A row of `schema_migrations`."""

    version: str
    script_name: str
    checksum: str


def migrations(directory: Traversable | None = None) -> tuple[Migration, ...]:
    """Return the migrations in *directory*, by default those that came with this program, in order.

    Raises STORE_UNAVAILABLE for a file whose name is not that of a migration and for two of one version.
    """
    found = []
    for file in (directory or files("kms") / "schema").iterdir():
        if not file.name.endswith(".sql") or file.name in NOT_MIGRATIONS:
            continue
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            raise unavailable(f"{file.name}: expected a name like V2025.01.23.001__what_it_does.sql")
        found.append(Migration(match[1], match[2].replace("_", " "), file.name, file.read_bytes()))
    ordered = sorted(found, key=lambda migration: migration.version)
    for one, other in itertools.pairwise(ordered):
        if one.version == other.version:
            raise unavailable(f"{one.script_name} and {other.script_name} have the same version")
    return tuple(ordered)


def pending(known: Sequence[Migration], applied: Sequence[Applied]) -> list[Migration]:
    """Return the migrations still to run, or raise STORE_UNAVAILABLE naming every way in which files and rows disagree."""
    by_version = {migration.version: migration for migration in known}
    newest = max((row.version for row in applied), default="")
    done = {row.version for row in applied}
    faults = [f"{row.script_name} was applied, but is not in this program" for row in applied if row.version not in by_version]
    faults += [
        f"{row.script_name} was changed after it was applied"
        for row in applied
        if row.version in by_version and by_version[row.version].checksum != row.checksum
    ]
    waiting = [migration for migration in known if migration.version not in done]
    faults += [f"{each.script_name} was not applied, but a later one was" for each in waiting if each.version < newest]
    if faults:
        raise unavailable("the database was not made by the migrations of this program: " + "; ".join(faults))
    return waiting


def migrate(dsn: str, directory: Traversable | None = None, *, wait_seconds: int = 60, role: str | None = None) -> list[str]:
    """Run the migrations that are pending in *dsn*, in *role* if it is given, and return the names of their files.

    A second runner waits for the first at most *wait_seconds*. Raises STORE_UNAVAILABLE; the failing file has changed nothing.
    """
    known = migrations(directory)
    with _connected(dsn) as connection:
        if role is not None:
            connection.execute(AS_ROLE, {"role": role})
        connection.execute(SETTINGS, {"lock_timeout": f"{wait_seconds}s"})
        try:
            connection.execute(LOCK, {"id": _LOCK_ID})
        except psycopg.errors.LockNotAvailable:
            raise unavailable("another migration of this database is running; try again when it has ended") from None
        connection.execute(SETTINGS, {"lock_timeout": "10s"})
        waiting = pending(known, _history(connection))
        for migration in waiting:
            _run(connection, migration)
    return [migration.script_name for migration in waiting]


def check(dsn: str, directory: Traversable | None = None) -> list[str]:
    """Return the names of the files that are pending in *dsn*, or raise STORE_UNAVAILABLE as `migrate` would."""
    with _connected(dsn) as connection:
        return [migration.script_name for migration in pending(migrations(directory), _history(connection))]


async def check_schema(pool: Pool) -> None:
    """Raise STORE_UNAVAILABLE, saying what to run, unless the pool's database is at the schema of this program."""
    rows = await pool.fetch(AS_JOB, HISTORY)
    waiting = pending(migrations(), [Applied(row["version"], row["script_name"], row["checksum"]) for row in rows])
    if waiting:
        raise unavailable(f"{len(waiting)} migrations are pending, from {waiting[0].script_name}: run `kms migrate`")


def set_service_password(dsn: str, password: Secret, *, role: LiteralString = "kms_service") -> None:
    """Give the service's login a password. The server gets a SCRAM-SHA-256 verifier (RFC 5802), never the password."""
    with _connected(dsn) as connection:
        verifier = connection.pgconn.encrypt_password(password.reveal(), role.encode(), b"scram-sha-256").decode()
        connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier)))


@contextmanager
def _connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    try:
        with psycopg.connect(**connection_settings(dsn), autocommit=True, prepare_threshold=None) as connection:
            yield connection
    except psycopg.OperationalError as error:
        raise unavailable(f"the database does not answer: {error}") from None
    except psycopg.errors.InsufficientPrivilege as error:
        advice = "use the login that owns the schema: a superuser, or one prepared by schema/bootstrap.sql"
        raise unavailable(f"{error.diag.message_primary}; {advice}") from None


def _history(connection: psycopg.Connection[Any]) -> list[Applied]:
    found = connection.execute(HISTORY_EXISTS).fetchone()
    if found is None or not found[0]:
        return []
    return [Applied(*row) for row in connection.execute(HISTORY)]


def _run(connection: psycopg.Connection[Any], migration: Migration) -> None:
    try:
        if migration.in_transaction:
            with connection.transaction():
                connection.execute(migration.content)
                _record(connection, migration)
        else:
            connection.execute(migration.content)
            _record(connection, migration)
    except psycopg.Error as error:
        raise unavailable(f"{migration.script_name} failed: {error.diag.message_primary or error}") from None


def _record(connection: psycopg.Connection[Any], migration: Migration) -> None:
    names = ("version", "description", "script_name", "checksum")
    connection.execute(RECORD, {name: getattr(migration, name) for name in names})
