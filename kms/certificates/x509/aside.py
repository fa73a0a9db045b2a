"""Long lists are written and read in a thread, so that the calls of others go on meanwhile."""

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_ENTRIES_MAX: Final = 200  # about 5 ms


async def aside(entries: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what *work* returns, done in a thread where so many *entries* take long."""
    return await asyncio.to_thread(work, *args, **kwargs) if entries > _ENTRIES_MAX else work(*args, **kwargs)
