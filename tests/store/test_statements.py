"""Every SQL constant of the store is valid against the migrated schema, and the SQL mirror of the states is exact."""

import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
from psycopg.pq import ExecStatus

import kms.certificates.postgres
import kms.jobs
import kms.rotation
import kms.store
from kms.domain.lifecycle import Standing, effective_state
from kms.store.login_settings import OWN_SETTINGS
from kms.store.renewed_macs import KEEP
from tests.fixtures.postgres import Database

_STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b")
_PARAMETER = re.compile(r"%%|%\((\w+)\)s|%s")
_NOW = datetime(2030, 1, 1, tzinfo=UTC)


def statements() -> Iterator[tuple[str, str]]:
    packages = (kms.store, kms.jobs, kms.rotation, kms.certificates.postgres)
    for module in (each for package in packages for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")):
        for name, value in vars(importlib.import_module(module.name)).items():
            # A fragment, from which statements are put together, begins with an underscore.
            if isinstance(value, str) and name.isupper() and not name.startswith("_") and _STATEMENT.match(value):
                yield f"{module.name}.{name}", value


def numbered(statement: str) -> str:
    """Return the statement with $1, $2 … for psycopg's parameters."""
    numbers: dict[str, int] = {}
    positions = itertools.count()

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        return f"${numbers.setdefault(match[1] or str(next(positions)), len(numbers) + 1)}"

    return _PARAMETER.sub(replaced, statement)


def test_the_search_for_statements_finds_them() -> None:
    found = dict(statements())
    known = {"keys.PAGE", "pool.ACT_AS", "users.FIND_BY_URI", "migrate.RECORD"}
    assert {"kms.jobs.postgres.TAKE_LOCK", "kms.rotation.leases.CLAIM", *(f"kms.store.{name}" for name in known)} <= set(found)


def test_every_statement_prepares(database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        connection.execute(KEEP)  # a table of the transaction's own, which others of that module read
        connection.execute(OWN_SETTINGS)  # with the search path of the service: names of others are qualified
        for name, statement in statements():
            result = connection.pgconn.prepare(b"", numbered(statement).encode())
            assert result.status == ExecStatus.COMMAND_OK, f"{name}: {result.error_message.decode()}"


def test_a_statement_with_an_unknown_column_would_not_prepare(database: Database) -> None:
    with psycopg.connect(database.admin_dsn) as connection:
        result = connection.pgconn.prepare(b"probe", b"SELECT no_such_column FROM cryptography.keys")
        assert result.status == ExecStatus.FATAL_ERROR


def test_the_state_in_sql_is_the_state_in_python_for_every_combination(database: Database) -> None:
    moments = (None, _NOW - timedelta(days=1), _NOW, _NOW + timedelta(days=1))
    statuses = ("active", "inactive", "expired", "compromised", "revoked")
    combinations = [
        (status, days, is_spent)
        for status in statuses
        for days in itertools.product(moments, repeat=6)
        for is_spent in (False, True)
    ]
    columns = [
        [status for status, _, _ in combinations],
        *(list(column) for column in zip(*(days for _, days, _ in combinations), strict=True)),
        [is_spent for _, _, is_spent in combinations],
    ]
    query = b"""
        SELECT cryptography.effective_status(status, activated, deactivated, superseded, expires, scheduled, destroyed, $1, spent)
        FROM unnest(
            $2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[], $7::timestamptz[],
            $8::timestamptz[], $9::boolean[]
        ) WITH ORDINALITY AS row (status, activated, deactivated, superseded, expires, scheduled, destroyed, spent, number)
        ORDER BY number
    """
    with psycopg.RawCursor(psycopg.connect(database.admin_dsn)) as cursor:
        cursor.execute(query, (_NOW, *columns))
        found = [row[0] for row in cursor.fetchall()]
        cursor.connection.close()
    assert found == [effective_state(Standing(status, *days, is_spent=spent), _NOW) for status, days, spent in combinations]
    assert len(found) == 2 * 5 * 4**6
