"""Which worker seals the trail: the one that holds an advisory lock, on a connection of its own. The others follow it.

A follower remembers the checkpoints of the others on its own machine, so that it refuses another history when it takes over.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Protocol

import psycopg
import structlog

from kms.domain.history import HistoryError
from kms.store.batches import DirectConnection, connect
from kms.store.errors import unavailable

TAKE_LOCK: Final = "SELECT pg_try_advisory_lock(hashtext('audit.sealer')) AS is_held"
_ANSWER_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 1.0
_FOLLOW_SECONDS: Final = 3.0
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


def _ignore() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Sealer:
    """Signs the trail every `interval_seconds` while this process holds the lock, and follows the holder otherwise.

    `sealing` is called when the lock was taken, and may fail. `following` returns None where there is nothing to follow yet.
    `progressed` is called after each signing and each look at what the holder made.
    """

    settings: Mapping[str, Any]
    sealing: Callable[[], Awaitable[Seals]]
    following: Callable[[], Awaitable[Follows | None]]
    interval_seconds: float
    watch: HistoryWatch
    progressed: Callable[[], None] = _ignore

    async def serve_term(self) -> None:
        """Follow until the lock is free, then sign until the connection with the lock is lost.

        Raises HistoryError, also STORE_UNAVAILABLE and what `sealing`, `following` and their results raise.
        """
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
            raise
        except psycopg.Error as error:
            raise unavailable(f"the trail is not sealed: {type(error).__name__}") from error

    async def _await_lock(self, connection: DirectConnection) -> None:
        followed_at = monotonic()
        while not await connection.ask(TAKE_LOCK, {}, seconds=_ANSWER_SECONDS):
            if monotonic() - followed_at >= _FOLLOW_SECONDS:
                if (follower := await self.following()) is not None:
                    await follower.follow()
                    self.watch.refusal = ""
                self.progressed()
                followed_at = monotonic()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _seal_while_held(self, connection: DirectConnection) -> None:
        sealing = await self.sealing()
        size = -1
        while not connection.is_lost:
            found = await sealing.seal()
            self.watch.refusal = ""
            self.progressed()
            if size < 0:
                _LOG.info("sealing the trail", rows=found)
            size = found
            await asyncio.sleep(self.interval_seconds)
