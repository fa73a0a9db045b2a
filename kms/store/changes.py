"""What changes in the database is heard as it commits, on a connection of its own (LISTEN), and dropped from the caches.

Nothing is decided by it. While it does not hear, what is remembered is as good as its age: at most a second. So the caches stay
as they are then, and do not send all their reads at once to a database that is in trouble already.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import psycopg
import structlog
from psycopg import AsyncConnection

from kms.domain.errors import KmsError
from kms.store.login_settings import take_own_settings
from kms.store.pool import connection_settings

LISTEN: Final = "LISTEN kms_changed"
_RETRY_SECONDS: Final = 0.5
_LOG = structlog.get_logger("kms.store.changes")

Drop = Callable[[UUID | None], None]


@asynccontextmanager
async def heard(dsn: str, drops: Mapping[str, Drop]) -> AsyncIterator[None]:
    """Call `drops[kind](id)` for each change within the block; with None, for all of them, where some may not have been heard.

    *drops* has the kinds `key` and `user`. A connection that is lost is made again, for as long as it takes.
    """
    running = asyncio.create_task(_hear(connection_settings(dsn), drops), name="changes")
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _hear(settings: Mapping[str, Any], drops: Mapping[str, Drop]) -> None:
    is_heard = True
    while True:
        try:
            async with await AsyncConnection.connect(**settings, autocommit=True) as connection:
                await take_own_settings(connection)
                await connection.execute(LISTEN)
                is_heard = True
                # What was changed before the database began to tell.
                _drop_all(drops)
                async for notice in connection.notifies():
                    _drop(drops, notice.payload)
        except (KmsError, psycopg.Error, OSError) as error:
            if is_heard:
                _LOG.warning("changes are not heard", error=type(error).__name__)
            is_heard = False
        except Exception:  # noqa: BLE001 - a bug about one change must not make it deaf for all later ones
            _LOG.exception("bug in the listener")
        await asyncio.sleep(_RETRY_SECONDS)


def _drop(drops: Mapping[str, Drop], payload: str) -> None:
    """Drop what *payload* names, a kind and an id; of what is not understood, everything: anybody may send on a channel."""
    kind, _, text = payload.partition(" ")
    try:
        drops[kind](UUID(text))
    except (KeyError, ValueError):
        _drop_all(drops)


def _drop_all(drops: Mapping[str, Drop]) -> None:
    for drop in drops.values():
        drop(None)
