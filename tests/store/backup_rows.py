"""Rows for the tests of backups: a user with keys of every kind of interest, and a session; on a database of the superuser's."""

from typing import Any
from uuid import UUID, uuid4

import psycopg

from tests.store.records import renew_macs

PEM = "-----BEGIN PUBLIC KEY-----\n"
ADD_USER = b"INSERT INTO authentication.users (id, username, email, password_hash, salt) VALUES ($1, $2, $3, '!', '!')"
ADD_SESSION = b"""
    INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, expires_at)
    VALUES ($1, repeat('0', 64), repeat('1', 64), now() + interval '1 hour')
"""
ADD_KEY = b"""
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_strength, custody, origin,
        max_usage_count, usage_counter, deactivated_at, superseded_at, revoked_at, destruction_scheduled_at, key_status
    ) VALUES ($1, $2, $3, $4, $5, $6, $7, 'x', 256, 'SEALED', 'GENERATED', $8, $9, $10, $11, $12, $13, $14)
"""
STATE = b"""
    SELECT key_name::text, cryptography.effective_status(
        key_status, activated_at, deactivated_at, superseded_at, expires_at, destruction_scheduled_at, destroyed_at, now(),
        usage_counter >= cryptography.usage_limit(key_type, max_usage_count)
    ) FROM cryptography.keys
"""


def add_user(connection: psycopg.Connection[Any]) -> UUID:
    """Add a user and return its id."""
    user_id = uuid4()
    psycopg.RawCursor(connection).execute(ADD_USER, [user_id, f"user-{user_id}", f"{user_id}@example.org"])
    return user_id


def add_session(connection: psycopg.Connection[Any], user_id: UUID) -> None:
    """Add a session that is still good."""
    psycopg.RawCursor(connection).execute(ADD_SESSION, [user_id])


def add_key(connection: psycopg.Connection[Any], user_id: UUID, name: str, **columns: Any) -> UUID:  # noqa: ANN401  # any column
    """Add an active key of *name* and return its id: AES where the name begins so, else secp256r1."""
    key_id, is_aes = uuid4(), name.startswith("aes")
    kind = ("aes", "encryption", None, "kcv:000000") if is_aes else ("secp256r1", "signing", "secp256r1", PEM)
    optional = ("max_usage_count", "usage_counter", "deactivated_at", "superseded_at", "revoked_at", "destruction_scheduled_at")
    defaults = {"usage_counter": 0, "key_status": "active"}
    values = [columns.get(column, defaults.get(column)) for column in (*optional, "key_status")]
    psycopg.RawCursor(connection).execute(ADD_KEY, [key_id, user_id, name, *kind, *values])
    renew_macs(connection)
    return key_id


def states(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Return the state of each key by its name."""
    return dict(connection.execute(STATE).fetchall())
