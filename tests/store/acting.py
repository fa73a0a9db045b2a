"""Statements as the service's own login sends them: for a role and a user, in a transaction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

Rows = list[tuple[Any, ...]]


@contextmanager
def acting_for(dsn: str, role: str, user: object = "") -> Iterator[psycopg.Connection[Any]]:
    """A connection on which the transaction has begun as the service begins it; committed at the end."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)", (role, str(user)))
        yield connection


def run(dsn: str, role: str, user: object, query: str, parameters: Sequence[object] = ()) -> Rows:
    """Run one statement so, commit, and return its rows."""
    with acting_for(dsn, role, user) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def ensure_partitions(dsn: str, ahead: str) -> list[str]:
    """Make the partitions that are missing, one call for each, and return their names."""
    made: list[str] = []
    while found := run(dsn, "job_runner", "", "SELECT made::text FROM audit.ensure_partitions(%s) AS made", (ahead,)):
        made += [name for (name,) in found]
    return made


def add_user(admin_dsn: str, user: object, name: str) -> None:
    """Make a user, as the superuser."""
    with psycopg.connect(admin_dsn) as connection:
        connection.execute(
            "INSERT INTO authentication.users (id, username, email, password_hash, salt)"
            " VALUES (%s, %s, %s || '@example.org', '!', '!')",
            (user, name, name),
        )
