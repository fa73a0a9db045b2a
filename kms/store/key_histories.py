"""The port `KeyHistories` in a temporary SQLite database, which SQLite keeps on disk once it has outgrown its cache."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kms.domain.key_check import History, KeyChange, KeyUse

_CACHE_KIB: Final = 16_384
_CREATE: Final = (
    f"PRAGMA cache_size = -{_CACHE_KIB}",
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA temp_store = FILE",
    "CREATE TABLE changes (key_id BLOB, version INTEGER, data TEXT, PRIMARY KEY (key_id, version)) WITHOUT ROWID",
    "CREATE TABLE keys (key_id BLOB PRIMARY KEY, used INTEGER, conflict INTEGER, last_row INTEGER, seen INTEGER) WITHOUT ROWID",
)
_ADD_CHANGE: Final = "INSERT INTO changes (key_id, version, data) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_FIND_CHANGE: Final = "SELECT data FROM changes WHERE key_id = ? AND version = ?"
_NOTE_KEY: Final = """
    INSERT INTO keys (key_id, used, conflict, last_row, seen) VALUES (:key_id, :used, :conflict, :last_row, 0)
    ON CONFLICT (key_id) DO UPDATE SET
        used = CASE WHEN excluded.used > coalesce(used, -1) THEN excluded.used ELSE used END,
        conflict = coalesce(conflict, excluded.conflict),
        last_row = max(last_row, excluded.last_row)
"""
_FIND_KEY: Final = "SELECT used, conflict, last_row FROM keys WHERE key_id = ?"
_FIND_CHANGES: Final = "SELECT version, data FROM changes WHERE key_id = ? ORDER BY version"
_SEE: Final = """
    INSERT INTO keys (key_id, last_row, seen) VALUES (?, 0, 1) ON CONFLICT (key_id) DO UPDATE SET seen = seen + 1 RETURNING seen
"""
_UNSEEN: Final = "SELECT key_id FROM keys WHERE seen = 0 ORDER BY key_id"


@dataclass(frozen=True, slots=True)
class StoredKeyHistories:
    """`KeyHistories` on a connection to SQLite."""

    connection: sqlite3.Connection

    def take(self, entry: KeyChange | KeyUse, row_number: int) -> None:
        """Take an entry that stands in the row *row_number* of the trail."""
        key_id, used, conflict = entry.key_id.bytes, None, None
        if isinstance(entry, KeyUse):
            used = entry.number
        elif not self.connection.execute(_ADD_CHANGE, (key_id, entry.version, entry.data)).rowcount:
            (known,) = self.connection.execute(_FIND_CHANGE, (key_id, entry.version)).fetchone()
            conflict = None if known == entry.data else entry.version
        parameters = {"key_id": key_id, "used": used, "conflict": conflict, "last_row": row_number}
        self.connection.execute(_NOTE_KEY, parameters)

    def see(self, key_id: UUID) -> bool:
        """Note that the table has this key. Return False where it was noted before."""
        (times,) = self.connection.execute(_SEE, (key_id.bytes,)).fetchone()
        return bool(times == 1)

    def find(self, key_id: UUID, signed_size: int) -> History:
        """Return what the trail says about a key; *signed_size* rows are under a checkpoint."""
        used, conflict, last_row = self.connection.execute(_FIND_KEY, (key_id.bytes,)).fetchone() or (None, None, 0)
        changes = tuple(self.connection.execute(_FIND_CHANGES, (key_id.bytes,)).fetchall())
        return History(changes, used, conflict, last_row > signed_size)

    def unseen(self) -> Iterator[UUID]:
        """Yield the keys of which the trail tells and that the table was not seen to have."""
        for (key_id,) in self.connection.execute(_UNSEEN):
            yield UUID(bytes=key_id)


@contextmanager
def key_histories() -> Iterator[StoredKeyHistories]:
    """Open an empty store of histories, which is gone at the end."""
    with closing(sqlite3.connect("", isolation_level=None)) as connection:
        for statement in _CREATE:
            connection.execute(statement)
        connection.execute("BEGIN")
        yield StoredKeyHistories(connection)
