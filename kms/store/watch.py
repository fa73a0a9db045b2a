"""Whether the database answers: asked once a second, for readiness. No decision about a call depends on it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final

import structlog

from kms.domain.errors import KmsError
from kms.store.pool import BEFORE_LOGIN, Pool

ASK: Final = "SELECT 1 AS alive"
CLOCK: Final = "SELECT clock_timestamp() AS now"
_INTERVAL_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 3.0
_LOG = structlog.get_logger("kms.store.watch")


async def database_time(pool: Pool) -> datetime:
    """Return the moment by the database's clock. Raises STORE_UNAVAILABLE."""
    moment: datetime = (await pool.fetch(BEFORE_LOGIN, CLOCK))[0]["now"]
    return moment


@asynccontextmanager
async def watched(pool: Pool) -> AsyncIterator[Callable[[], bool]]:
    """Yield a function that tells whether the database answered when last asked."""
    answered = True

    async def watch() -> None:
        nonlocal answered
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await pool.fetch(BEFORE_LOGIN, ASK)
                answered = True
            except (KmsError, TimeoutError):
                answered = False
            except Exception:  # noqa: BLE001 - a bug in one look must not end all later ones
                _LOG.exception("bug in the watch")
                answered = False

    task = asyncio.create_task(watch())
    try:
        yield lambda: answered
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
