"""Whether the database answers: asked once a second, for readiness. No decision about a call depends on it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from kms.domain.errors import KmsError
from kms.store.pool import BEFORE_LOGIN, Pool

ASK: Final = "SELECT 1 AS alive"
_INTERVAL_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 3.0


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

    task = asyncio.create_task(watch())
    try:
        yield lambda: answered
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
