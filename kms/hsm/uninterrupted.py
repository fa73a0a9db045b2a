"""Work that goes on to its end although whoever waits for it is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Return what *work* returns, or raise what it raises. Use it where half of *work* would leave something behind.

    A cancellation, however often it is repeated, takes effect only after *work* has ended. It then replaces the result.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # else asyncio reports an exception that nobody has seen
    raise cancelled
