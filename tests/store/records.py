"""Records in the tests of the store: MACs under a key of the tests' own instead of a token's."""

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from kms.app.records import Records
from kms.domain.key_row import AUTHENTICATED, key_bytes

_KEY = b"of the tests"


def mac(data: bytes) -> bytes:
    return hmac.digest(_KEY, data, hashlib.sha256)


async def amac(data: bytes) -> bytes:
    return mac(data)


RECORDS = Records(amac, lambda: datetime.now(UTC))


def renew_macs(connection: psycopg.Connection[Any], *, only: UUID | None = None) -> None:
    """Give each key the MAC of its record as it is, as if the service had made what a test has made of it."""
    columns = sql.SQL(", ").join(map(sql.Identifier, AUTHENTICATED))
    found = connection.cursor(row_factory=dict_row).execute(sql.SQL("SELECT {} FROM cryptography.keys").format(columns))
    for row in found.fetchall():
        if only is not None and row["id"] != only:
            continue
        connection.execute("UPDATE cryptography.keys SET record_mac = %s WHERE id = %s", (mac(key_bytes(row)), row["id"]))
