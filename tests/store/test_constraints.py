"""What the tables themselves refuse, whoever writes."""

from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest
from psycopg import errors, sql

from tests.fixtures.postgres import Database

Row = dict[str, object]
OWNER: Final = "00000000-0000-4000-8000-000000000001"
OTHER: Final = "00000000-0000-4000-8000-000000000002"
AES: Final[Row] = {
    "user_id": OWNER,
    "key_name": "good",
    "key_type": "aes",
    "key_purpose": "encryption",
    "public_key": "kcv:0a1b2c",
    "encrypted_private_key": "envelope",
    "key_strength": 256,
    "custody": "SEALED",
    "origin": "GENERATED",
}
USER: Final[Row] = {"username": "carol", "email": "carol@example.org", "password_hash": "!", "salt": "!"}
ROTATION: Final[Row] = {"user_id": OWNER, "old_key_id": OWNER, "rotation_reason": "age"}
CERTIFICATE: Final[Row] = {
    "user_id": OWNER,
    "key_id": OWNER,
    "certificate_type": "x509",
    "certificate_data": "MII",
}
SESSION: Final[Row] = {
    "user_id": OWNER,
    "session_token": "0" * 64,
    "refresh_token": "1" * 64,
    "expires_at": "2030-01-01",
}
WRAPPING: Final[Row] = {"id": OWNER, "kind": "kek", "generation": 1, "token_serial": "1"}
PAST, FUTURE = "2020-01-01", "2999-01-01"

GOOD: Final[list[tuple[str, Row]]] = [
    ("cryptography.keys", AES),
    ("cryptography.keys", {**AES, "usage_counter": 2**62, "max_usage_count": None}),
    ("cryptography.keys", {**AES, "usage_counter": 5, "max_usage_count": 5}),
    ("cryptography.keys", {**AES, "key_name": "a" * 90 + "@999999999"}),
    ("cryptography.keys", {**AES, "expires_at": FUTURE}),
    ("cryptography.keys", {**AES, "key_status": "revoked", "revoked_at": PAST}),
    ("cryptography.keys", {**AES, "key_status": "compromised", "compromised_at": PAST, "compromise_occurred_at": PAST}),
    ("cryptography.keys", {**AES, "destroyed_at": PAST, "encrypted_private_key": ""}),
    ("cryptography.keys", {**AES, "custody": "RESIDENT", "hsm_key_id": "00ff"}),
    ("authentication.users", USER),
    ("authentication.user_sessions", SESSION),
    ("cryptography.key_rotations", ROTATION),
    ("cryptography.certificates", CERTIFICATE),
    ("cryptography.wrapping_keys", WRAPPING),
]
BAD_KEYS: Final[tuple[Row, ...]] = (
    {"usage_counter": -1},
    {"usage_counter": -1, "max_usage_count": 5},
    {"usage_counter": 6, "max_usage_count": 5},
    {"max_usage_count": 0},
    {"max_usage_count": -1, "usage_counter": -2},
    {"key_name": ""},
    {"key_name": "-a"},
    {"key_name": "a b"},
    {"key_name": "a" * 91},
    {"key_name": "a@0"},
    {"key_name": "a\n"},
    {"key_name": OWNER},
    {"key_name": "AAAAAAAA-0000-4000-8000-00000000000A"},
    {"key_type": "dsa"},
    {"key_type": "rsa"},
    {"key_purpose": "anything"},
    {"key_curve": "secp256k1"},
    {"key_strength": 512},
    {"public_key": "-----BEGIN PUBLIC KEY-----"},
    {"public_key": "kcv:0A1B2C"},
    {"encrypted_private_key": ""},
    {"destroyed_at": PAST},
    {"key_status": "pending"},
    {"key_status": "revoked"},
    {"revoked_at": PAST},
    {"key_status": "compromised"},
    {"compromise_occurred_at": PAST},
    {"expires_at": PAST},
    {"custody": "PLAIN"},
    {"custody": "RESIDENT"},
    {"hsm_key_id": "00ff"},
    {"custody": "RESIDENT", "hsm_key_id": "xyz"},
    {"origin": "FOUND"},
    {"bound_to": "b" * 51},
    {"version": 0},
    {"metadata": "[]"},
)
BAD: Final[list[tuple[str, Row, Row]]] = [
    *(("cryptography.keys", AES, change) for change in BAD_KEYS),
    ("authentication.users", USER, {"username": "ab"}),
    ("authentication.users", USER, {"email": "nobody"}),
    ("authentication.users", USER, {"email": "a@b.c|d"}),
    ("authentication.users", USER, {"password_changed_at": None}),
    ("authentication.user_sessions", SESSION, {"session_token": "plain"}),
    ("authentication.user_sessions", SESSION, {"refresh_token": "plain"}),
    ("cryptography.key_rotations", ROTATION, {"new_key_id": OWNER}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "completed", "completed_at": PAST}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "completed"}),
    ("cryptography.key_rotations", ROTATION, {"completed_at": PAST}),
    ("cryptography.key_rotations", ROTATION, {"migration_status": "begun"}),
    ("cryptography.certificates", CERTIFICATE, {"certificate_type": "pgp"}),
    ("cryptography.certificates", CERTIFICATE, {"revocation_status": "lost"}),
    ("cryptography.wrapping_keys", WRAPPING, {"kind": "other"}),
    ("cryptography.wrapping_keys", WRAPPING, {"generation": 0}),
]
FOREIGN: Final[list[tuple[str, Row]]] = [
    ("cryptography.keys", {**AES, "user_id": "00000000-0000-4000-8000-00000000dead"}),
    ("cryptography.keys", {**AES, "user_id": OTHER, "parent_key_id": OWNER}),
    ("cryptography.key_rotations", {**ROTATION, "user_id": OTHER}),
    ("cryptography.key_rotations", {**ROTATION, "new_key_id": OTHER}),
    ("cryptography.certificates", {**CERTIFICATE, "user_id": OTHER}),
    ("authentication.user_sessions", {**SESSION, "user_id": "00000000-0000-4000-8000-00000000dead"}),
]


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
    columns = admin.execute(
        b"SELECT attname FROM pg_attribute WHERE attrelid = 'cryptography.keys'::regclass AND attnum > 0 AND NOT attisdropped"
    ).fetchall()
    changing = [name for (name,) in columns if name not in ("usage_counter", "last_used_at")]
    versions = [version_after(f"{name} = {name}".encode()) for name in changing]
    assert versions == list(range(2, len(changing) + 2))
    assert version_after(b"version = 1") == len(changing) + 2


def test_a_change_is_dated(admin: psycopg.Connection[Any]) -> None:
    admin.execute(b"UPDATE authentication.users SET mfa_enabled = true")
    assert admin.execute(b"SELECT count(*) FROM authentication.users WHERE updated_at > created_at").fetchone() == (2,)
