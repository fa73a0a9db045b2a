"""The embedded stack: everything in one directory, with a PostgreSQL of its own.

A directory is used by one stack at a time and is found again by the next.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from kms.dev.postgres import DURABLE, EmbeddedPostgres, embedded_postgres
from kms.dev.stack import Stack, StackDatabase, prepared
from kms.dev.stack_files import StackFiles, free_port
from kms.domain.secret import Secret

DATABASE: Final = "kms"
PORT: Final = 7443
PUBLISHING_PORT: Final = 7480


def default_directory() -> Path:
    """Return where `kms dev` keeps everything: below /var/lib for root, else below the user's data directory (XDG)."""
    if os.geteuid() == 0:
        return Path("/var/lib/neo-kms/dev")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "neo-kms/dev"


@contextmanager
def dev_stack(directory: Path, *, port: int = PORT, settings: Mapping[str, str] = DURABLE) -> Iterator[Stack]:
    """Prepare the stack in *directory*, made on first use, with its PostgreSQL running until the end.

    *port* 0 takes a free one. It publishes on port 7480 with the usual port, else on a free one. *settings* are PostgreSQL's.
    Raises `KmsError`, saying why.
    """
    directory = directory.absolute()
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)  # PostgreSQL's user passes through it to its data
    files = StackFiles(directory, token=directory / "token")
    with embedded_postgres(files.postgres, settings) as postgres:
        address = f"127.0.0.1:{port or free_port()}"
        publishes_on = f"127.0.0.1:{PUBLISHING_PORT if port == PORT else free_port()}"
        yield prepared(files, _database(postgres), listen=address, address=address, publishes_on=publishes_on)


def _database(postgres: EmbeddedPostgres) -> StackDatabase:
    with psycopg.connect(postgres.superuser_dsn(), autocommit=True) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    password = Secret(postgres.service_password().encode())
    return StackDatabase(postgres.superuser_dsn(DATABASE), postgres.service_dsn(DATABASE), password)
