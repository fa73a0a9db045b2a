"""Every constraint refuses what it is there for. They are found in the catalog, so that one without an example fails here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors, sql

from tests.fixtures.postgres import Database
from tests.store.examples import AES, BAD, BAD_REST, ONE_OF_EACH, OTHER, SECOND, THIRD_KEY, USER, Row

_OUR_TABLES: Final = b"""
    c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relnamespace::regnamespace::text !~ '^(pg_|information_schema)'
"""
_COLUMNS: Final = b"""
    SELECT c.oid::regclass::text, a.attname, a.attnotnull
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE """
_KEYS: Final = b"""
    SELECT c.oid::regclass::text, i.indexrelid::regclass::text,
        ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum = ANY (i.indkey))
    FROM pg_class AS c JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisunique
    WHERE """
_CONSTRAINTS: Final = b"""
    SELECT c.oid::regclass::text, k.conname::text,
        ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum = ANY (k.conkey))
    FROM pg_class AS c JOIN pg_constraint AS k ON k.conrelid = c.oid
    WHERE k.conparentid = 0 AND k.contype = %s AND """


@dataclass(frozen=True, slots=True)
class Constraint:
    """One of a table; `columns` are those that it speaks of."""

    table: str
    name: str
    columns: tuple[str, ...]


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A superuser, on a database with one row in every table, and a second user with a key."""
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        put(connection, "authentication.users", {**USER, "id": OTHER, "username": "other", "email": "other@example.org"})
        for table, row in ONE_OF_EACH.items():
            put(connection, table, row)
        put(connection, "cryptography.keys", {**AES, "id": THIRD_KEY, "key_name": "third"})
        put(connection, "cryptography.keys", {**AES, "id": OTHER, "user_id": OTHER})
        yield connection


def put(connection: psycopg.Connection[Any], table: str, row: Row) -> None:
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(*table.split(".")),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(map(sql.Literal, row.values())),
    )
    connection.execute(statement)


def constraints(admin: psycopg.Connection[Any], kind: str) -> list[Constraint]:
    rows = admin.execute(_CONSTRAINTS + _OUR_TABLES, (kind,)).fetchall()
    return [Constraint(table, name, tuple(columns)) for table, name, columns in rows]


def keys(admin: psycopg.Connection[Any]) -> list[Constraint]:
    return [Constraint(table, name, tuple(columns)) for table, name, columns in admin.execute(_KEYS + _OUR_TABLES)]


def second(admin: psycopg.Connection[Any], table: str) -> Row:
    """Return a row that can stand beside the first: other values in every column of a key that refers to nothing."""
    unique = {column for key in keys(admin) if key.table == table for column in key.columns}
    referring = {column for each in constraints(admin, "f") if each.table == table for column in each.columns}
    row = dict(ONE_OF_EACH[table])
    for column in unique - referring:
        row[column] = another(row[column])
    return row | SECOND.get(table, {})


def another(value: object) -> object:
    if isinstance(value, int):
        return value + 1
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    is_uuid = isinstance(value, str) and value.count("-") == 4 and len(value) == 36
    return str(uuid4()) if is_uuid else value if isinstance(value, str) and value.startswith("20") else f"{value}2"


def refusal(admin: psycopg.Connection[Any], table: str, row: Row) -> psycopg.Error | None:
    try:
        with admin.transaction(force_rollback=True):
            put(admin, table, row)
    except psycopg.Error as error:
        return error
    return None


def test_every_table_has_an_example_and_takes_two_rows(admin: psycopg.Connection[Any]) -> None:
    found = {table for table, _, _ in admin.execute(_COLUMNS + _OUR_TABLES)}
    assert found == set(ONE_OF_EACH)
    assert {table: refused for table in found if (refused := refusal(admin, table, second(admin, table)))} == {}


def test_every_column_that_must_be_there_refuses_nothing(admin: psycopg.Connection[Any]) -> None:
    wrong = []
    for table, column, is_required in admin.execute(_COLUMNS + _OUR_TABLES).fetchall():
        refused = refusal(admin, table, {**second(admin, table), column: None}) if is_required else None
        if is_required and not (isinstance(refused, errors.NotNullViolation) and refused.diag.column_name == column):
            wrong.append((table, column, refused))
    assert wrong == []


def test_every_key_refuses_a_second_row_with_its_values(admin: psycopg.Connection[Any]) -> None:
    wrong = []
    for key in keys(admin):
        first = ONE_OF_EACH[key.table]
        row = {**second(admin, key.table), **{column: first[column] for column in key.columns}}
        if "key_id" in row and "user_id" in key.columns:
            row["key_id"] = first["key_id"]
        if not isinstance(refused := refusal(admin, key.table, row), errors.UniqueViolation):
            wrong.append((key, refused))
    assert wrong == []
    assert len(keys(admin)) >= 35


def test_every_reference_refuses_what_is_not_there(admin: psycopg.Connection[Any]) -> None:
    """Each by itself: the other references of the table are dropped for the attempt."""
    references = constraints(admin, "f")
    wrong = []
    for reference in references:
        column = next((name for name in reference.columns if name not in ("user_id", "network_id")), reference.columns[0])
        missing = 999 if isinstance(ONE_OF_EACH[reference.table].get(column), int) else str(uuid4())
        row = {**second(admin, reference.table), column: missing}
        with admin.transaction(force_rollback=True):
            for other in references:
                if other.table == reference.table and other.name != reference.name:
                    drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}")
                    admin.execute(drop.format(sql.Identifier(*other.table.split(".")), sql.Identifier(other.name)))
            refused = refusal(admin, reference.table, row)
        if not isinstance(refused, errors.ForeignKeyViolation) or refused.diag.constraint_name != reference.name:
            wrong.append((reference, refused))
    assert wrong == []
    assert len(references) >= 30


def test_every_check_has_an_example_that_it_refuses(admin: psycopg.Connection[Any]) -> None:
    seen = set()
    for table, change in [*((table, change) for table, _, change in BAD), *BAD_REST]:
        refused = refusal(admin, table, {**second(admin, table), **change})
        if isinstance(refused, errors.CheckViolation):
            seen.add(refused.diag.constraint_name)
    assert sorted(each.name for each in constraints(admin, "c") if each.name not in seen) == []


def test_a_check_without_an_example_would_be_found(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"ALTER TABLE cryptography.keys ADD CONSTRAINT forgotten CHECK (key_strength > 0)")
    with pytest.raises(AssertionError, match="forgotten"):
        test_every_check_has_an_example_that_it_refuses(admin)
