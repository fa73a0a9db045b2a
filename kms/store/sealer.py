"""Which worker seals the trail: the one that holds an advisory lock, on a connection of its own. The others wait for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import psycopg
import structlog

from kms.domain.errors import KmsError
from kms.store.batches import DirectConnection, connect
from kms.store.pool import connection_settings

TAKE_LOCK: Final = "SELECT pg_try_advisory_lock(hashtext('audit.sealer')) AS is_held"
_ANSWER_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 1.0
_AFTER_FAILURE_SECONDS: Final = 5.0
_LOG = structlog.get_logger("kms.store.sealer")


class Seals(Protocol):
    """What seals."""

    async def seal(self) -> int:
        """Seal what can be sealed."""
        ...

    async def export_missing(self) -> None:
        """Write outside what is missing there."""
        ...


@asynccontextmanager
async def sealed(dsn: str, sealing: Callable[[], Awaitable[Seals]], *, interval_seconds: float) -> AsyncIterator[None]:
    """Seal the trail every *interval_seconds* within the block, whenever this process holds the lock.

    *sealing* is called when it was taken, and may fail. Whatever fails is logged and tried again: nothing else waits for it.
    """
    settings = connection_settings(dsn)

    async def run() -> None:
        while True:
            try:
                connection = await connect(settings, seconds=_ANSWER_SECONDS)
                try:
                    await _await_lock(connection)
                    await _seal_while_held(connection, await sealing(), interval_seconds)
                finally:
                    await connection.close()
            except (KmsError, psycopg.Error) as error:
                _LOG.warning("the trail is not sealed", error=str(error))
            except Exception:  # noqa: BLE001  # a bug here must not end sealing, and is seen in the log
                _LOG.exception("bug in the sealer")
            await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _await_lock(connection: DirectConnection) -> None:
    while not await connection.ask(TAKE_LOCK, {}, seconds=_ANSWER_SECONDS):  # noqa: ASYNC110  # what is awaited is another process
        await asyncio.sleep(_RETRY_SECONDS)


async def _seal_while_held(connection: DirectConnection, sealing: Seals, interval_seconds: float) -> None:
    await sealing.export_missing()
    size = -1
    while not connection.is_lost:
        found = await sealing.seal()
        if size < 0:
            _LOG.info("sealing the trail", rows=found)
        size = found
        await asyncio.sleep(interval_seconds)
