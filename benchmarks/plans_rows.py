"""The rows of `plans.py`: the same generator for every size, with ids and names that can be told from their numbers.

User 0 owns a tenth of the keys, the sessions, the events and the rotations; the others share the rest. What a sweep takes at one
time (keys due for destruction, answers to be forgotten, keys to be confirmed, rotations that are due) has the same number of rows
in every size.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg

from kms.store.migrate import migrate

DUE: Final = 200
UNCONFIRMED: Final = 50
FORGOTTEN: Final = 1_000
ROTATIONS_DUE: Final = 100
ROTATOR_NUMBER: Final = 1
WORKERS: Final = 2
_CHUNK: Final = 500_000

# By number: %(n) is replaced before the statement is sent, so that the same words serve rows and their references.
_OWNER: Final = "md5('user' || CASE WHEN n %% 10 = 0 THEN 0 ELSE 1 + n %% (%(users)s - 1) END)::uuid"
_KEY: Final = "md5('key' || n)::uuid"
_PAST: Final = "'2024-01-01'::timestamptz + (now() - '2024-01-01') * (n::float8 / %(rows)s)"
_NUMBERS: Final = "FROM generate_series(%(first)s::int, %(last)s::int) AS n"

SMALL_TABLES: Final = """
    INSERT INTO authentication.users (id, username, email, password_hash, salt)
        SELECT md5('user' || n)::uuid, 'user' || n, 'user' || n || '@example.org', '!', '!'
        FROM generate_series(0, %(users)s - 1) AS n;
"""
ROTATOR: Final = """
    INSERT INTO authentication.user_roles (user_id, role_id)
        SELECT %(rotator)s, id FROM authentication.roles WHERE name = 'rotator'
"""
LEDGER_WRITERS: Final = """
    INSERT INTO cryptography.ledger_writers (writer_id, batch, written_at)
        SELECT md5('writer' || n)::uuid, n, now() FROM generate_series(1, 50) AS n
"""
FIRST_EPOCH: Final = """
    SELECT cryptography.begin_first_epoch(
        clock_timestamp(), here.system_identifier, here.timeline, here.database_oid, sha256('epoch')
    )
    FROM cryptography.location() AS here
"""
KEYS: Final = f"""
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_status, key_strength,
        created_at, revoked_at, destruction_scheduled_at, custody, origin
    )
    SELECT {_KEY}, {_OWNER}, 'key-' || lpad(n::text, 8, '0'), kind, CASE kind WHEN 'aes' THEN 'encryption' ELSE 'signing' END,
        nullif(kind, 'aes'),
        CASE kind WHEN 'aes' THEN 'kcv:0a1b2c' ELSE '-----BEGIN PUBLIC KEY-----' || repeat('A', 124) END, repeat('e', 300),
        CASE WHEN n %% 50 = 49 THEN 'revoked' ELSE 'active' END, 256, {_PAST}, CASE WHEN n %% 50 = 49 THEN now() END,
        CASE WHEN n <= {DUE} THEN now() - interval '1 hour' WHEN n %% 100 = 98 THEN now() + (1 + n %% 89) * interval '1 day' END,
        'SEALED', 'GENERATED'
    {_NUMBERS} CROSS JOIN LATERAL (SELECT (ARRAY['aes', 'secp256k1', 'secp256r1', 'ed25519'])[1 + n %% 4] AS kind)
"""
HEADS: Final = f"INSERT INTO audit.aggregate_heads SELECT {_KEY}, 'key', 1, {_OWNER} {_NUMBERS}"
DOMAIN_EVENTS: Final = f"""
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data, occurred_at)
        SELECT {_KEY}, 'key', 1, 'key.created', '{{"key_type": "aes"}}', {_PAST} {_NUMBERS}
"""
SECURITY_EVENTS: Final = f"""
    INSERT INTO audit.security_events (
        event_type, severity, user_id, source_ip, resource_type, resource_id, action, outcome, risk_score, event_details,
        created_at
    )
    SELECT 'key.used', CASE WHEN n %% 100 = 0 THEN 'high' ELSE 'low' END, {_OWNER}, '192.0.2.7', 'key',
        md5('key' || n %% %(keys)s)::uuid, 'sign', 'success', 0, '{{"charged": true, "key_version": 1}}', {_PAST}
    {_NUMBERS}
"""
SESSIONS: Final = f"""
    INSERT INTO authentication.user_sessions (user_id, session_token, refresh_token, is_active, expires_at, created_at)
        SELECT {_OWNER}, encode(sha256(('s' || n)::bytea), 'hex'), encode(sha256(('r' || n)::bytea), 'hex'), n %% 10 < 3,
            {_PAST} + interval '8 hours', {_PAST}
        {_NUMBERS}
"""
LOGINS: Final = f"""
    INSERT INTO authentication.login_history (user_id, login_method, success, created_at)
        SELECT {_OWNER}, 'password', true, {_PAST} {_NUMBERS}
"""
ANSWERS: Final = f"""
    INSERT INTO cryptography.request_records
        SELECT {_OWNER}, 'Sign', 'request-' || n, sha256('body'), sha512('result'), gen_random_uuid(),
            CASE WHEN n <= {FORGOTTEN} THEN now() - interval '2 days' ELSE now() - n %% 72000 * interval '1 second' END
        {_NUMBERS}
"""
CERTIFICATES: Final = f"""
    INSERT INTO cryptography.certificates (id, user_id, key_id, certificate_type, certificate_data)
        SELECT md5('certificate' || n)::uuid, {_OWNER}, {_KEY}, 'x509', repeat('c', 800) {_NUMBERS}
"""
RESTORED: Final = f"""
    INSERT INTO cryptography.restored_keys (
        key_id, user_id, epoch, status_before, deactivated_by_restore, confirmed_at, confirmed_count
    )
    SELECT {_KEY}, {_OWNER}, 1, 'active', true, CASE WHEN n > {UNCONFIRMED} THEN now() END, CASE WHEN n > {UNCONFIRMED} THEN 0 END
    {_NUMBERS}
"""
# Each finished rotation leads to the next key; every fiftieth has failed.
ROTATIONS: Final = f"""
    INSERT INTO cryptography.key_rotations (
        id, user_id, old_key_id, new_key_id, rotation_reason, initiated_by, migration_status, completed_at, created_at,
        next_attempt_at, attempts, request_mac
    )
    SELECT md5('rotation' || n)::uuid, {_OWNER}, {_KEY}, CASE WHEN n > {ROTATIONS_DUE} THEN md5('key' || n + 1)::uuid END, 'age',
        {_OWNER}, kind, CASE kind WHEN 'completed' THEN {_PAST} END, {_PAST}, {_PAST}, 1, sha256('request')
    {_NUMBERS} CROSS JOIN LATERAL (
        SELECT CASE WHEN n <= {ROTATIONS_DUE} THEN 'pending' WHEN n %% 50 = 1 THEN 'failed' ELSE 'completed' END AS kind
    )
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How many rows a database has."""

    users: int
    keys: int
    events: int
    sessions: int

    def hundredth(self) -> "Size":
        """Return a hundredth of it."""
        return Size(self.users // 100, self.keys // 100, self.events // 100, self.sessions // 100)

    def owner(self, number: int) -> UUID:
        """Return the owner of the key (the session, the answer) of that number."""
        return user_id(0 if number % 10 == 0 else 1 + number % (self.users - 1))


def user_id(number: int) -> UUID:
    """Return the id of a user."""
    return _id("user", number)


def key_id(number: int) -> UUID:
    """Return the id of a key."""
    return _id("key", number)


def rotation_id(number: int) -> UUID:
    """Return the id of a rotation."""
    return _id("rotation", number)


def certificate_id(number: int) -> UUID:
    """Return the id of a certificate."""
    return _id("certificate", number)


def key_name(number: int) -> str:
    """Return the name of a key."""
    return f"key-{number:08}"


def generate(dsn: str, size: Size) -> None:
    """Migrate the empty database of *dsn* and fill it: indexes in place, triggers off, statistics and visibility at the end."""
    migrate(dsn)
    _send(dsn, SMALL_TABLES, {"users": size.users})
    _send(dsn, ROTATOR, {"rotator": user_id(ROTATOR_NUMBER)})
    _send(dsn, LEDGER_WRITERS, {})
    _send(dsn, FIRST_EPOCH, {})
    wanted = {
        SECURITY_EVENTS: size.events,
        KEYS: size.keys,
        HEADS: size.keys,
        DOMAIN_EVENTS: size.keys,
        SESSIONS: size.sessions,
        LOGINS: size.sessions,
        ANSWERS: max(size.keys // 5, 2 * FORGOTTEN),
        CERTIFICATES: size.keys // 10,
        RESTORED: size.keys // 10,
        ROTATIONS: size.keys,
    }
    chunks = [
        (statement, {"users": size.users, "keys": size.keys, "rows": rows, "first": first, "last": min(first + _CHUNK - 1, rows)})
        for statement, rows in wanted.items()
        for first in range(1, rows + 1, _CHUNK)
    ]
    with ThreadPoolExecutor(WORKERS) as workers:
        _all_done(workers.map(lambda chunk: _send(dsn, *chunk), chunks))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(b"VACUUM (ANALYZE)")
        connection.execute(b"CHECKPOINT")


def _send(dsn: str, statement: str, parameters: dict[str, int]) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection, psycopg.ClientCursor(connection) as cursor:
        cursor.execute(b"SET session_replication_role = replica")  # no triggers, and so no foreign keys
        cursor.execute(statement.encode(), parameters)


def _all_done(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _id(kind: str, number: int) -> UUID:
    return UUID(hashlib.md5(f"{kind}{number}".encode(), usedforsecurity=False).hexdigest())
