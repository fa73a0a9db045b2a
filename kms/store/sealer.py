"""Which worker seals the trail: the one that holds an advisory lock, on a connection of its own. The others follow it.

A follower remembers the checkpoints of the others on its own machine, so that it refuses another history when it takes over.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Protocol

import psycopg
import structlog

from kms.domain.errors import KmsError
from kms.domain.history import HistoryError
from kms.store.batches import DirectConnection, connect
from kms.store.pool import connection_settings

TAKE_LOCK: Final = "SELECT pg_try_advisory_lock(hashtext('audit.sealer')) AS is_held"
_ANSWER_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 1.0
_FOLLOW_SECONDS: Final = 3.0
_AFTER_FAILURE_SECONDS: Final = 5.0
_LOG = structlog.get_logger("kms.store.sealer")


class Follows(Protocol):
    """What remembers the checkpoints of others."""

    async def follow(self) -> None:
        """Remember what others have made."""
        ...


class Seals(Protocol):
    """What seals."""

    async def seal(self) -> int:
        """Seal what can be sealed."""
        ...


@dataclass(slots=True)
class HistoryWatch:
    """Why this process signs nothing, or nothing: it changes when a history is refused, and when one is agreed again."""

    refusal: str = ""


@asynccontextmanager
async def sealed(
    dsn: str,
    sealing: Callable[[], Awaitable[Seals]],
    following: Callable[[], Awaitable[Follows | None]],
    *,
    interval_seconds: float,
    watch: HistoryWatch | None = None,
) -> AsyncIterator[None]:
    """Seal the trail every *interval_seconds* within the block, whenever this process holds the lock; else follow who does.

    *sealing* is called when the lock was taken, and may fail. *following* returns None where there is nothing to follow yet.
    Whatever fails is logged and tried again: nothing else waits for it.
    """
    sealer = _Sealer(connection_settings(dsn), sealing, following, interval_seconds, watch or HistoryWatch())
    task = asyncio.create_task(sealer.run(), name="sealer")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@dataclass(frozen=True, slots=True)
class _Sealer:
    """The task."""

    settings: Mapping[str, Any]
    sealing: Callable[[], Awaitable[Seals]]
    following: Callable[[], Awaitable[Follows | None]]
    interval_seconds: float
    watch: HistoryWatch

    async def run(self) -> None:
        """Seal or follow without end."""
        while True:
            try:
                connection = await connect(self.settings, seconds=_ANSWER_SECONDS)
                try:
                    await self._await_lock(connection)
                    await self._seal_while_held(connection)
                finally:
                    await connection.close()
            except HistoryError as refusal:
                self.watch.refusal = refusal.message
                _LOG.error("another history is not signed", expected=refusal.expected, found=refusal.found)
            except (KmsError, psycopg.Error) as error:
                _LOG.warning("the trail is not sealed", error=str(error))
            except Exception:  # noqa: BLE001  # a bug here must not end sealing, and is seen in the log
                _LOG.exception("bug in the sealer")
            await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    async def _await_lock(self, connection: DirectConnection) -> None:
        followed_at = monotonic()
        while not await connection.ask(TAKE_LOCK, {}, seconds=_ANSWER_SECONDS):
            if monotonic() - followed_at >= _FOLLOW_SECONDS:
                if (follower := await self.following()) is not None:
                    await follower.follow()
                    self.watch.refusal = ""
                followed_at = monotonic()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _seal_while_held(self, connection: DirectConnection) -> None:
        sealing = await self.sealing()
        size = -1
        while not connection.is_lost:
            found = await sealing.seal()
            self.watch.refusal = ""
            if size < 0:
                _LOG.info("sealing the trail", rows=found)
            size = found
            await asyncio.sleep(self.interval_seconds)
