"""Waiting for conditions, for as long as a slow machine may need."""

import asyncio
from collections.abc import Callable

_SECONDS_MAX = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds."""
    async with asyncio.timeout(_SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - what is looked at has no event
            await asyncio.sleep(0.02)
