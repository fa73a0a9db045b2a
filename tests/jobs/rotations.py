"""Rotations that wait in a database, as tests put them there."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg

from tests.fixtures.postgres import Database
from tests.store.acting import add_user

ALICE = UUID("00000000-0000-4000-8000-0000000000a1")
OLD, NEW = UUID("00000000-0000-4000-8000-0000000000b1"), UUID("00000000-0000-4000-8000-0000000000b2")
KEY = """
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    ) VALUES (%s, %s, %s, 'aes', 'encryption', 'kcv:000000', 'x', 256, 'SEALED', 'GENERATED')
"""
ROTATION = """
    INSERT INTO cryptography.key_rotations (id, user_id, old_key_id, rotation_reason, next_attempt_at)
    VALUES (%s, %s, %s, 'age', now() - make_interval(secs => %s))
"""


class Rotations:
    """Rotations of one key, seen and moved in time by a superuser."""

    def __init__(self, database: Database) -> None:
        self._dsn = database.admin_dsn
        self._has_rotated_old = False
        add_user(database.admin_dsn, ALICE, "alice")
        for key, name in ((OLD, "old"), (NEW, "new")):
            self.run(KEY, (key, ALICE, name))

    def run(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser and return its rows."""
        with psycopg.connect(self._dsn) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def add(self, count: int = 1) -> list[UUID]:
        """Add rotations that are due, the first for longest, and return their ids."""
        ids = [uuid4() for _ in range(count)]
        for number, rotation in enumerate(ids):
            self.run(ROTATION, (rotation, ALICE, self._key_to_rotate(), count - number))
        return ids

    def _key_to_rotate(self) -> UUID:
        """Return a key that has no rotation yet: `OLD` first."""
        if not self._has_rotated_old:
            self._has_rotated_old = True
            return OLD
        key = uuid4()
        self.run(KEY, (key, ALICE, f"key-{key.hex[:12]}"))
        return key

    def pass_time(self, seconds: float) -> None:
        """Let *seconds* pass for everything that waits or is leased."""
        self.run(
            "UPDATE cryptography.key_rotations SET next_attempt_at = next_attempt_at - make_interval(secs => %s)", (seconds,)
        )

    def of(self, rotation: UUID, *columns: str) -> tuple[Any, ...]:
        """Return columns of a rotation."""
        return self.run(f"SELECT {', '.join(columns)} FROM cryptography.key_rotations WHERE id = %s", (rotation,))[0]

    def wait_of(self, rotation: UUID) -> float:
        """Return in how many seconds a worker may claim the rotation."""
        return float(self.of(rotation, "extract(epoch FROM next_attempt_at - clock_timestamp())")[0])
