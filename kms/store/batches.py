"""A connection that settles batches of uses, one statement and one round trip each.

Every batch has a number. The database keeps the last one of each connection with its verdicts, so that a batch whose answer
was lost can be looked up on another connection; one that had not arrived by then is kept from ever counting.
"""

import asyncio
import json
import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row

from kms.app.ports import Entry
from kms.store.errors import unavailable
from kms.store.login_settings import LOGIN_SETTINGS, OWN_SETTINGS, refused_settings
from kms.store.pool import Parameters

SETTLE: Final = "SELECT cryptography.settle(%(writer)s, %(number)s, %(entries)s) AS verdicts"
SETTLED: Final = "SELECT cryptography.settled(%(writer)s, %(number)s) AS verdicts"
CONFIGURE: Final = """
    SELECT set_config('statement_timeout', '4s', false), set_config('lock_timeout', '1s', false),
        set_config('idle_in_transaction_session_timeout', '4s', false),
        -- No other holds for a batch whose last bytes never arrive. PostgreSQL 16 does not have it.
        (SELECT set_config(name, '5s', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout')
"""
_CONNECT_SECONDS: Final = 2


class DirectConnection:
    """A connection of our own, outside the pool. It never waits for an answer longer than it is told."""

    def __init__(self, connection: AsyncConnection[DictRow]) -> None:
        self._connection = connection

    @property
    def is_lost(self) -> bool:
        """Whether nothing more will come of it."""
        return self._connection.closed or _has_ended(self._connection.pgconn.socket)

    async def ask(self, query: LiteralString, parameters: Parameters, *, seconds: float) -> Any:  # noqa: ANN401  # one value
        """Return the one value of one row. Raises `psycopg.Error`; without an answer in *seconds* the connection is cut."""
        asking = asyncio.ensure_future(self._connection.execute(query, parameters, prepare=True))
        answered, _ = await asyncio.wait({asking}, timeout=seconds)
        if not answered:
            # psycopg would wait for the server's consent to a cancellation, and a server that is stopped gives none.
            self.cut()
        row = await (await asking).fetchone()
        assert row is not None  # noqa: S101  # a SELECT of a function gives a row or raises
        return next(iter(row.values()))

    def cut(self) -> None:
        """End the connection without asking anybody."""
        if not self._connection.closed:
            with socket.socket(fileno=os.dup(self._connection.pgconn.socket)) as ours:
                ours.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """End the connection."""
        await self._connection.close()


async def connect(settings: Mapping[str, Any], *, seconds: float) -> DirectConnection:
    """Return a configured connection, or raise STORE_UNAVAILABLE, also for a login that has settings of its own."""
    opened: AsyncConnection[DictRow] | None = None
    try:
        opened = await AsyncConnection[DictRow].connect(
            **{**settings, "connect_timeout": _CONNECT_SECONDS}, autocommit=True, row_factory=dict_row
        )
        connection = DirectConnection(opened)
        await connection.ask(OWN_SETTINGS, {}, seconds=seconds)
        await connection.ask(CONFIGURE, {}, seconds=seconds)
        settings_of_login = await connection.ask(LOGIN_SETTINGS, {}, seconds=seconds)
    except (psycopg.OperationalError, OSError) as error:
        if opened is not None:
            await opened.close()
        raise unavailable("the database does not answer") from error
    if settings_of_login:
        await opened.close()
        raise refused_settings(settings_of_login)
    return connection


class BatchConnection:
    """A connection with its writer id and the number of its last batch."""

    def __init__(self, connection: DirectConnection) -> None:
        self.connection = connection
        self.writer_id: UUID = uuid4()
        self.number = 0

    async def settle(self, texts: Sequence[str], *, seconds: float) -> list[str]:
        """Settle uses as `encoded` gives them; return a verdict for each, "" for one that is no text. Raises `psycopg.Error`."""
        numbered = ",".join(f'{{"n":{n},{text[1:]}' for n, text in enumerate(texts, start=1))
        parameters = {"writer": self.writer_id, "number": self.number + 1, "entries": f"[{numbered}]"}
        self.number += 1
        try:
            return _verdicts(await self.connection.ask(SETTLE, parameters, seconds=seconds), len(texts))
        except psycopg.Error:
            if not self.connection.is_lost:
                self.number -= 1  # the server says that it has not happened, so the number is free
            raise

    async def settled(self, writer_id: UUID, number: int, size: int, *, seconds: float) -> list[str] | None:
        """Return the verdicts of another connection's batch of *size* uses. None: it has not happened, and never will."""
        verdicts = await self.connection.ask(SETTLED, {"writer": writer_id, "number": number}, seconds=seconds)
        return None if verdicts is None else _verdicts(verdicts, size)


def _verdicts(answer: object, size: int) -> list[str]:
    """Return *size* verdicts. A function that the database's owner replaced may return anything at all."""
    if not isinstance(answer, list) or len(answer) != size:
        return [""] * size
    return [verdict if isinstance(verdict, str) else "" for verdict in answer]


def _has_ended(descriptor: int) -> bool:
    """Whether the server has ended an idle connection: it has nothing else to say, so there is something to read."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(0))


def encoded(entry: Entry) -> str:
    """Return the entry as the JSON object that `cryptography.key_use` is read from, without its number."""
    columns: dict[str, object] = {
        "user_id": str(entry.call.user.user_id),
        "user_version": entry.call.user.version,
        "request_id": entry.call.request_id,
        "peer": entry.call.peer,
        "action": entry.action,
        "key_id": str(entry.key_id),
        "key_version": entry.version,
        "use": entry.use,
        "is_charged": entry.is_charged,
        "details": dict(entry.details),
    }
    if entry.repeat is not None:
        columns |= {
            "rpc": entry.repeat.rpc,
            "repeat_id": entry.repeat.request_id,
            "body_mac": "\\x" + entry.repeat.body_mac.hex(),
            "result": "\\x" + entry.repeat.result.hex(),
        }
    return json.dumps(columns, separators=(",", ":"))
