"""The MACs that records get once, on an operator's word: rows of a database from before there were any.

After that a record without a MAC is refused like one with a wrong MAC, and the token says that it is so.
"""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from dataclasses import dataclass
from typing import Any, Final, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from kms.domain.errors import KmsError, Reason
from kms.domain.key_row import AUTHENTICATED, epoch_bytes, key_bytes
from kms.store.backup import check_login_sees_all, connected
from kms.store.errors import unavailable
from kms.store.pool import connection_settings
from kms.store.renewed_macs import RENEW, TokenMac, is_proven

_COLUMNS: Final[LiteralString] = ", ".join(AUTHENTICATED)
PAGE: Final = f"SELECT {_COLUMNS}, record_mac FROM cryptography.keys WHERE id > %(after)s ORDER BY id LIMIT 1000"
# Nothing that was adopted may have changed since it was read.
LOCK: Final = "LOCK TABLE cryptography.keys, cryptography.epochs IN SHARE ROW EXCLUSIVE MODE"
EPOCHS: Final = """
    SELECT number, cause, begun_at, backup_created_at, system_identifier, timeline, database_oid
    FROM cryptography.epochs
    WHERE record_mac IS NULL
"""
ADOPT_EPOCH: Final = "UPDATE cryptography.epochs SET record_mac = %(mac)s WHERE number = %(number)s"
RECORD: Final = """
    SELECT audit.record_security_event(
        'records.adopted', 'high', NULL, NULL, NULL, NULL, NULL, 'adopt', 'success', 60, %(details)s
    )
"""
_FIRST: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of the keys' records: how many are as the service left them, and the ids of the others."""

    proven: int
    without_mac: tuple[UUID, ...]
    invalid: tuple[UUID, ...]


def check_records(dsn: str, mac: TokenMac) -> Checked:
    """Prove the record of every key in the database of *dsn*. Raises STORE_UNAVAILABLE."""
    with connected(connection_settings(dsn)) as connection:
        check_login_sees_all(connection)
        proven, without_mac, invalid = 0, list[UUID](), list[UUID]()
        after = _FIRST
        while rows := _page(connection, after):
            after = rows[-1]["id"]
            for row in rows:
                if row["record_mac"] is None:
                    without_mac.append(row["id"])
                elif is_proven(row, mac):
                    proven += 1
                else:
                    invalid.append(row["id"])
    return Checked(proven, tuple(without_mac), tuple(invalid))


def adopt_records(dsn: str, mac: TokenMac) -> int:
    """Give each key and epoch without a MAC its own, all or none, and return how many keys. Raises STORE_UNAVAILABLE.

    A record that has a MAC is left as it is, be it right or wrong.
    """
    adopted, after = 0, _FIRST
    with connected(connection_settings(dsn)) as connection:
        check_login_sees_all(connection)
        with connection.transaction():
            connection.execute(LOCK)
            while rows := _page(connection, after):
                after = rows[-1]["id"]
                bare = [row for row in rows if row["record_mac"] is None]
                connection.execute(RENEW, {"ids": [row["id"] for row in bare], "macs": [_mac(mac, row) for row in bare]})
                adopted += len(bare)
            for epoch in connection.cursor(row_factory=dict_row).execute(EPOCHS).fetchall():
                connection.execute(ADOPT_EPOCH, {"number": epoch["number"], "mac": mac(epoch_bytes(epoch))})
            connection.execute(RECORD, {"details": Jsonb({"keys": adopted})})
    return adopted


def _mac(mac: TokenMac, row: dict[str, Any]) -> bytes:
    try:
        return mac(key_bytes(row))
    except KmsError as error:
        if error.reason is not Reason.RECORD_INVALID:
            raise
        raise unavailable(
            f"the key {row['id']} has a value that no key of ours has: nothing was adopted; look at its row"
        ) from None


def _page(connection: psycopg.Connection[Any], after: UUID) -> list[dict[str, Any]]:
    return connection.cursor(row_factory=dict_row).execute(PAGE, {"after": after}).fetchall()
