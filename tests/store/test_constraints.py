"""What the tables themselves refuse, whoever writes."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from tests.fixtures.postgres import Database
from tests.store.examples import AES, BAD, FOREIGN, GOOD, OTHER, OWNER, USER, WRAPPING, Row


@pytest.fixture
def admin(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A superuser, with two users of whom each has a key of the same id."""
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        for user, name in ((OWNER, "alice"), (OTHER, "bob")):
            put(connection, "authentication.users", {**USER, "id": user, "username": name, "email": f"{name}@example.org"})
            put(connection, "cryptography.keys", {**AES, "id": user, "user_id": user, "key_name": "first"})
        yield connection


def put(connection: psycopg.Connection[Any], table: str, row: Row) -> None:
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(*table.split(".")),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(map(sql.Literal, row.values())),
    )
    connection.execute(statement)


def refusal(connection: psycopg.Connection[Any], table: str, row: Row) -> type[psycopg.Error] | None:
    try:
        with connection.transaction(force_rollback=True):
            put(connection, table, row)
    except psycopg.Error as error:
        return type(error)
    return None


def test_good_rows_are_taken(admin: psycopg.Connection[Any]) -> None:
    assert [(table, row) for table, row in GOOD if refusal(admin, table, row) is not None] == []


def test_each_bad_row_is_refused_by_a_check(admin: psycopg.Connection[Any]) -> None:
    too_long = (errors.CheckViolation, errors.StringDataRightTruncation)
    taken = [(table, change) for table, row, change in BAD if refusal(admin, table, {**row, **change}) not in too_long]
    assert taken == []


def test_a_reference_to_another_users_row_is_refused(admin: psycopg.Connection[Any]) -> None:
    taken = [(table, row) for table, row in FOREIGN if refusal(admin, table, row) is not errors.ForeignKeyViolation]
    assert taken == []


def test_what_must_be_there_must_be_there(admin: psycopg.Connection[Any]) -> None:
    for table, row in (("cryptography.keys", AES), ("authentication.users", USER), ("cryptography.wrapping_keys", WRAPPING)):
        for column in row:
            refused = refusal(admin, table, {**row, column: None})
            assert refused in (errors.NotNullViolation, errors.CheckViolation), (table, column)


def test_a_name_and_an_address_are_unique(admin: psycopg.Connection[Any]) -> None:
    assert refusal(admin, "cryptography.keys", {**AES, "key_name": "first"}) is errors.UniqueViolation
    assert refusal(admin, "authentication.users", {**USER, "username": "alice"}) is errors.UniqueViolation
    assert refusal(admin, "authentication.users", {**USER, "email": "alice@example.org"}) is errors.UniqueViolation


def test_a_token_object_is_one_keys_until_it_is_destroyed(admin: psycopg.Connection[Any]) -> None:
    resident = {**AES, "custody": "RESIDENT", "hsm_key_id": "00ff"}
    put(admin, "cryptography.keys", resident)
    for user in (OWNER, OTHER):
        another = {**resident, "user_id": user, "key_name": "another"}
        assert refusal(admin, "cryptography.keys", another) is errors.UniqueViolation
    admin.execute(b"UPDATE cryptography.keys SET destroyed_at = now(), encrypted_private_key = '' WHERE hsm_key_id = '00ff'")
    put(admin, "cryptography.keys", {**resident, "user_id": OTHER})


def test_a_user_with_rows_cannot_be_deleted(admin: psycopg.Connection[Any]) -> None:
    with pytest.raises(errors.ForeignKeyViolation):
        admin.execute("DELETE FROM authentication.users WHERE id = %s", (OWNER,))


def test_every_change_but_a_charge_advances_the_version(admin: psycopg.Connection[Any]) -> None:
    def version_after(change: bytes) -> int:
        admin.execute(
            b"UPDATE cryptography.keys SET " + change + b" WHERE key_name = 'first' AND user_id = '" + OWNER.encode() + b"'"
        )
        row = admin.execute("SELECT version FROM cryptography.keys WHERE id = %s", (OWNER,)).fetchone()
        assert row is not None
        return int(row[0])

    assert version_after(b"usage_counter = usage_counter + 1, last_used_at = now()") == 1
    assert version_after(b"record_mac = sha256('')") == 1  # it is that of the version
    columns = admin.execute(
        b"SELECT attname FROM pg_attribute WHERE attrelid = 'cryptography.keys'::regclass AND attnum > 0 AND NOT attisdropped"
    ).fetchall()
    # An envelope alone moves to another generation of master keys: the key is the same.
    assert version_after(b"encrypted_private_key = encrypted_private_key || 'x'") == 1
    same = ("usage_counter", "last_used_at", "record_mac", "encrypted_private_key")
    changing = [name for (name,) in columns if name not in same]
    versions = [version_after(f"{name} = {name}".encode()) for name in changing]
    assert versions == list(range(2, len(changing) + 2))
    assert version_after(b"version = 1") == len(changing) + 2


def test_a_change_is_dated(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"UPDATE authentication.users SET mfa_enabled = true")
    assert admin.execute(b"SELECT count(*) FROM authentication.users WHERE updated_at > created_at").fetchone() == (2,)
