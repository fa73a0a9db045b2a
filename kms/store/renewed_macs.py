"""The MACs of keys that an operator's command changes by statements of its own: at the beginning of an epoch.

The rows are kept as they were. After the changes every row that was proven before must be what was expected of it, be it
changed or not: a trigger in a restored database could swallow a change. It gets the MAC of what it is then. Any other row has no
valid MAC, and so is refused.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import DictRow, dict_row

from kms.domain.errors import KmsError
from kms.domain.key_row import AUTHENTICATED, Row, key_bytes
from kms.domain.restoring import Restoring

_COLUMNS: Final[LiteralString] = ", ".join(AUTHENTICATED)
KEEP: Final = f"""
    CREATE TEMPORARY TABLE keys_before ON COMMIT DROP AS
    SELECT {_COLUMNS}, usage_counter, record_mac FROM cryptography.keys
"""
INDEX: Final = "ALTER TABLE pg_temp.keys_before ADD PRIMARY KEY (id)"
BEFORE: Final = f"""
    SELECT {", ".join(f"b.{column}" for column in AUTHENTICATED)}, b.usage_counter, b.record_mac
    FROM pg_temp.keys_before AS b
    WHERE b.id > %(after)s
    ORDER BY b.id
    LIMIT 1000
"""
AFTER: Final = f"SELECT {_COLUMNS} FROM cryptography.keys WHERE id = ANY (%(ids)s)"
RENEW: Final = """
    UPDATE cryptography.keys AS k
    SET record_mac = made.mac
    FROM unnest(%(ids)s::uuid[], %(macs)s::bytea[]) AS made (id, mac)
    WHERE k.id = made.id
"""
_FIRST: Final = UUID(int=0)

TokenMac = Callable[[bytes], bytes]
"""HMAC-SHA-256 under the token's MAC key, for a command that has the token to itself."""


@contextmanager
def renewed_macs(connection: psycopg.Connection[Any], restoring: Restoring, mac: TokenMac) -> Iterator[list[UUID]]:
    """Renew the MACs of the keys that the block changes, at its end; yield the list of those that have no valid one then."""
    connection.execute(KEEP)
    connection.execute(INDEX)
    invalid = list[UUID]()
    yield invalid
    after = _FIRST
    while rows := connection.cursor(row_factory=dict_row).execute(BEFORE, {"after": after}).fetchall():
        after = rows[-1]["id"]
        invalid += _renew(connection, rows, restoring, mac)


def is_proven(row: Row, mac: TokenMac) -> bool:
    """Whether *row* of `cryptography.keys` has the MAC that the token makes of it."""
    stored = row["record_mac"]
    try:
        return isinstance(stored, bytes) and hmac.compare_digest(mac(key_bytes(row)), stored)
    except KmsError:
        return False


def _renew(connection: psycopg.Connection[Any], before: list[DictRow], restoring: Restoring, mac: TokenMac) -> list[UUID]:
    cursor = connection.cursor(row_factory=dict_row)
    now = {row["id"]: row for row in cursor.execute(AFTER, {"ids": [row["id"] for row in before]}).fetchall()}
    renewed, invalid = dict[UUID, bytes | None](), list[UUID]()
    for row in before:
        after = now.get(row["id"])
        if after is None:
            invalid.append(row["id"])
            continue
        is_ours = is_proven(row, mac)
        is_expected = key_bytes({**restoring.applied(row), "version": after["version"]}) == key_bytes(after) if is_ours else False
        if not is_expected:
            invalid.append(row["id"])
            if is_ours:
                renewed[row["id"]] = None
        elif after["version"] != row["version"]:
            renewed[row["id"]] = mac(key_bytes(after))
    connection.execute(RENEW, {"ids": list(renewed), "macs": list(renewed.values())})
    return invalid
