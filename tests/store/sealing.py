"""A trail sealed with a key of a real token, and looked at as the auditor looks at it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from typing import Final

import psycopg
from psycopg import sql

from kms.app.history import SeenCheckpoint
from kms.app.keyring import Keyring
from kms.app.sealing import ALGORITHM, Sealing
from kms.app.sealing_key import SealingKeys
from kms.app.trail_ports import CheckpointMemory
from kms.app.verifying import exported, verify_lines
from kms.dev.postgres import EmbeddedPostgres
from kms.domain.trail_check import NoteReader, TrailReport
from kms.hsm.token_hsm import TokenHsm
from kms.hsm.uninterrupted import uninterrupted
from kms.pki.public_keys import PublicKeyOperations
from kms.store.history_events import StoredHistoryEvents
from kms.store.keys import StoredKeys
from kms.store.pool import Pool, open_pool
from kms.store.sealed_trail import StoredSealedTrail
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS

ORIGIN: Final = "neo-kms/audit"
EVENT: Final = b"""
    INSERT INTO audit.security_events (event_type, severity, source_ip, event_details)
    VALUES ('sign', 'low', '192.0.2.1', '{"n": "\\u00e9\\u0001\\\\\\""}')
"""
DOMAIN_EVENT: Final = b"""
    INSERT INTO audit.domain_events (aggregate_id, aggregate_type, aggregate_version, event_type, event_data)
    VALUES (gen_random_uuid(), 'key', 1, 'created', '{"a": 1}')
"""
_numbers: Final = count(1)


def write(admin: psycopg.Connection[object], times: int = 3) -> None:
    """Write some rows, two in each transaction."""
    for _ in range(times):
        with admin.transaction():
            admin.execute(EVENT)
            admin.execute(DOMAIN_EVENT)


async def sealing_of(pool: Pool, hsm: TokenHsm, memory: CheckpointMemory) -> Sealing:
    """Return what seals the trail of the database, with the key of its user: a process that has seen nothing yet."""
    keys = StoredKeys(pool, RECORDS)
    found = SealingKeys(keys, Keyring(keys, hsm, uninterrupted), StoredUsers(pool).find_or_create_service, is_valid, ORIGIN)
    events, key = StoredHistoryEvents(pool), await found.find_or_make()
    return Sealing(StoredSealedTrail(pool), hsm, key, memory, events, lambda: datetime.now(UTC))


def restarted(sealing: Sealing) -> Sealing:
    """Return the same as another process of its machine, which has seen nothing yet."""
    return replace(sealing, seen=SeenCheckpoint())


def is_valid(pem: str, signed: bytes, signature: bytes) -> bool:
    return PublicKeyOperations().is_valid(pem, ALGORITHM, signed, signature)


async def lines_of(dsn: str, after_size: int = 0) -> list[bytes]:
    """Return the exported trail."""
    async with open_pool(dsn, 2) as pool:
        return [line.encode() async for line in exported(StoredSealedTrail(pool), after_size)]


def checked(reader: NoteReader, lines: Sequence[bytes], outside: Sequence[bytes] = ()) -> TrailReport:
    """Verify without a database."""
    return verify_lines(reader, lambda: lines, lambda: outside)


@contextmanager
def copy_of(postgres: EmbeddedPostgres, database: Database) -> Iterator[Database]:
    """A copy of a database that nobody is connected to, dropped at the end."""
    name = f"copy_{next(_numbers)}"
    quoted = sql.Identifier(name)
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(quoted, sql.Identifier(database.name)))
        connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO kms_service").format(quoted))
        try:
            yield Database(name, postgres.service_dsn(name), postgres.superuser_dsn(name))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
